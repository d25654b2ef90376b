from __future__ import annotations

from siglip_port.parity.gates import MEANING
from siglip_port.parity.results import BEST_ADDRESS


def test_every_gate_has_its_meaning() -> None:
    assert list(MEANING) == [
        "pixels",
        "environment",
        "config",
        "weights",
        "sensitivity",
        "numerics",
        "interface",
        "rounding",
    ]
    assert all(meaning.question.endswith("?") for meaning in MEANING.values())


def test_every_gate_has_its_place_among_addresses() -> None:
    assert sorted(BEST_ADDRESS) == sorted(MEANING)

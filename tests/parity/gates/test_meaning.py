from __future__ import annotations

from siglip_port.parity.gates import MEANING
from siglip_port.parity.results import GATE_PRECEDENCE


def test_every_gate_has_meaning() -> None:
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


def test_every_gate_has_precedence() -> None:
    # `second-ref` is optional, and judges the reference.
    assert sorted(GATE_PRECEDENCE) == sorted([*MEANING, "second-ref"])

from __future__ import annotations

from siglip_port.parity.causes import GATE_PRECEDENCE
from siglip_port.parity.gates import MEANING


def test_every_gate_has_meaning() -> None:
    assert list(MEANING) == [
        "pixels",
        "environment",
        "config",
        "weights",
        "sensitivity",
        "numerics",
        "gradients",
        "calls",
        "interface",
        "rounding",
    ]
    assert all(meaning.question.endswith("?") for meaning in MEANING.values())


def test_every_gate_has_precedence() -> None:
    assert set(MEANING) <= set(GATE_PRECEDENCE)

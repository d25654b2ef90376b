"""Hints: name the bug behind an error by applying known bugs to the reference's values.

A hint is given only if a bug reproduces the port's values to a relative error below `MATCH`.
"""

from siglip_port.parity.hints.explain import (
    Explanation,
    explain,
    explain_output,
    explain_tap,
    explain_taps,
)
from siglip_port.parity.hints.guess import MATCH
from siglip_port.parity.hints.patterns import is_rearranged
from siglip_port.parity.hints.weights import explain_weight

__all__ = [
    "MATCH",
    "Explanation",
    "explain",
    "explain_output",
    "explain_tap",
    "explain_taps",
    "explain_weight",
    "is_rearranged",
]

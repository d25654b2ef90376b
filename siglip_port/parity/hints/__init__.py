"""Hints: name the bug behind an error by applying known bugs to the reference's values.

A hint is given only if a bug reproduces the port's values to a relative error below `MATCH`.
"""

from siglip_port.parity.hints.explain import explain, explain_output, explain_tap
from siglip_port.parity.hints.guess import MATCH
from siglip_port.parity.hints.weights import explain_weight

__all__ = ["MATCH", "explain", "explain_output", "explain_tap", "explain_weight"]

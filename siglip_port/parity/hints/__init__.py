"""What an error looks like: known bugs are tried on the reference's own numbers.

A hint is given only where a bug explains the port's values to `MATCH`, which no chance does.
"""

from siglip_port.parity.hints.explain import explain, explain_output, explain_tap
from siglip_port.parity.hints.guess import MATCH
from siglip_port.parity.hints.weights import explain_weight

__all__ = ["MATCH", "explain", "explain_output", "explain_tap", "explain_weight"]

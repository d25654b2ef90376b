"""A parity harness: proves that a port computes what its reference does, or says where it does not.

For a port of your own: `compare` and `assert_parity`, on weights made loud by `randomize`. For the
proof of this one: `compare_origin.py`. docs/parity.md says how it works, and what it is worth.
"""

from siglip_port.parity.compare import assert_parity, compare
from siglip_port.parity.results import Comparison
from siglip_port.parity.stress_weights import randomize

__all__ = ["Comparison", "assert_parity", "compare", "randomize"]

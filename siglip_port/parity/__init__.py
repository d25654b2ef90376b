"""Parity harness: compare a port with its reference and locate every difference.

`compare` and `assert_parity` take any two modules; `randomize` fills them with weights on which
bugs show. `siglip-port verify` runs the same gates on this package's encoder. See docs/parity.md.
"""

from siglip_port.parity.compare import assert_parity, compare
from siglip_port.parity.results import Comparison
from siglip_port.parity.stress_weights import randomize

__all__ = ["Comparison", "assert_parity", "compare", "randomize"]

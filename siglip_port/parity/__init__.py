"""Parity harness: compare a port with its reference and locate every difference.

`compare` and `assert_parity` take any module and any port of it; `randomize` fills them with
weights on which bugs show, and `suggest_taps` proposes the points to compare. `siglip-port verify`
runs the same gates on this package's encoder. See docs/parity.md.
"""

from siglip_port.parity.compare import assert_parity, compare
from siglip_port.parity.results import Comparison
from siglip_port.parity.stress_weights import randomize
from siglip_port.parity.suggest import suggest_taps

__all__ = ["Comparison", "assert_parity", "compare", "randomize", "suggest_taps"]

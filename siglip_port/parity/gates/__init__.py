"""The gates: checks that a port must pass to be equal to its reference, in order.

One file per gate; all of them work on any pair of modules. Call them through this package
(`gates.check_weights(...)`), so that replacing a gate reaches every caller.
"""

from siglip_port.parity.gates.calls import check_calls
from siglip_port.parity.gates.config import check_config
from siglip_port.parity.gates.environment import (
    check_environment,
    check_shared_modules,
    check_switches,
)
from siglip_port.parity.gates.gradients import check_gradients
from siglip_port.parity.gates.meaning import MEANING
from siglip_port.parity.gates.numerics import check_numerics
from siglip_port.parity.gates.rounding import check_rounding
from siglip_port.parity.gates.sensitivity import check_sensitivity
from siglip_port.parity.gates.weights import check_weights

__all__ = [
    "MEANING",
    "check_calls",
    "check_config",
    "check_environment",
    "check_gradients",
    "check_numerics",
    "check_rounding",
    "check_sensitivity",
    "check_shared_modules",
    "check_switches",
    "check_weights",
]

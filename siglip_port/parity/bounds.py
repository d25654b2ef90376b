"""The bounds of the gates, and where each comes from.

No bound is a number of absolute size. What is not finite is inside no bound. Read these through
the module (`bounds.FLOAT64_BOUND`), so that a change of one reaches every gate.
"""

from __future__ import annotations

FLOAT64_BOUND = 1e-10
"""Largest relative error of float64 computations that agree."""

FLOAT64_ORIGIN = (
    "float64 rounding was measured at up to 3e-13, the weakest bug of the catalog at 1e-8 "
    "at its tap"
)

ROUNDING_FACTOR = 3.0
"""How coarsely a port may round, in units of the reference's own rounding."""

WORST_FACTOR = 5.0
"""The same for the worst vector."""

ROUNDING_ORIGIN = (
    f"{ROUNDING_FACTOR:g} x the reference's own distance from float64, measured in this run "
    f"({WORST_FACTOR:g} x for the worst vector); where the reference is exact, so must be the port"
)

UPCAST_BOUND = 1e-6
"""Largest relative error in float64 that rounding to float32 inside one step can cause."""

UPCAST_COSINE = 0.5
"""Largest cosine between such errors on inputs that differ by 1e-4: rounding is not smooth."""


def within_float64_bound(error: float) -> bool:
    """Whether a relative error is no larger than float64 rounding explains."""
    return error <= FLOAT64_BOUND

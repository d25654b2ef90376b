"""Bounds of the gates, and how each was chosen.

All bounds are relative. NaN and infinity are outside every bound. Read them through the module
(`bounds.FLOAT64_BOUND`), so that a change reaches every gate.
"""

from __future__ import annotations

FLOAT64_BOUND = 1e-10
"""Largest relative error between float64 computations that agree."""

FLOAT64_ORIGIN = (
    "measured: rounding at a tap at most 2e-13 (weights L8), smallest bug of the catalog 1.6e-07 "
    "(eps of post_layernorm)"
)

ROUNDING_FACTOR = 3.0
"""Largest rounding error of a port, relative to the reference's own rounding error."""

WORST_FACTOR = 5.0
"""The same for the worst vector."""

ROUNDING_ORIGIN = (
    f"{ROUNDING_FACTOR:g}x the reference's own rounding error, measured in this run "
    f"({WORST_FACTOR:g}x for the worst vector); 0 where the reference is exact"
)

UPCAST_BOUND = 1e-6
"""Largest relative difference in float64 from a second reference that rounds to float32 inside."""

SYSTEMATIC_SHARE = 0.5
"""Largest systematic part of an error in float64 that is float32 rounding, relative to all of it.

Rounding changes completely on inputs that differ by 1e-4, the error of a bug does not.
"""

ROUGH_SHARE = 0.9
"""The same where the reference in float32 has a systematic error as well, as from constants."""

SYSTEMATIC_FACTOR = 3.0
"""Largest systematic error of a step in a dtype, relative to the reference's."""

SYSTEMATIC_NOISE = 0.3
"""Largest systematic error of a step in a dtype, relative to the reference's rounding error."""


def within_float64_bound(error: float) -> bool:
    """Return whether a relative error can be float64 rounding."""
    return error <= FLOAT64_BOUND

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
"""Largest relative error in float64 that a float32 step inside a module can cause."""

UPCAST_COSINE = 0.5
"""Largest cosine between such errors on inputs that differ by 1e-4: rounding is not smooth."""

GRADIENT_BOUND = 1e-6
"""Largest relative error of a gradient in float64.

The reference of NaFlex models interpolates positions in float32, whose gradients are sums of
rounded numbers.
"""

GRADIENT_UPCAST_BOUND = 1e-3
"""The same for a port with float32 steps, whose rounding sums up in small gradients."""

FLOAT32_MODEL_BOUND = 1e-5
"""Largest relative error of outputs in float64 that a model computed in float32 can have."""


def within_float64_bound(error: float) -> bool:
    """Return whether a relative error can be float64 rounding."""
    return error <= FLOAT64_BOUND

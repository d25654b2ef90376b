"""Bounds of the gates, and how each was chosen.

All bounds are relative. NaN and infinity are outside every bound. Read them through the module
(`bounds.FLOAT64_BOUND`), so that a change reaches every gate.

In bfloat16 and float16, the systematic error of single steps is bounded as well. Measured on the
small model with odd sizes and the weights S1, with bugs that are active in these dtypes only, in
units of the reference's rounding error: equivalent variants reach 0.6 (1.5 at the queries of the
pooling head, which depend on no input), of 3 times the reference's own or 0.9. An MLP multiplied
by 1.005 is at 3.5 in bfloat16 and 24 in float16, by 1.01 at 6 and 49; attention scaled by 1.03 at
2.4 and 19, by 1.01 at 0.8 and 6; eps 1.1e-6 instead of 1e-6 at 8 and 67; sample variance over 144
features at 1.4 and 11. Exact instead of tanh GELU, at 0.6 and 1.5, is in bfloat16 detected by the
errors that it adds up to.
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
    f"({WORST_FACTOR:g}x for the worst vector); 0 where the reference is exact; in bfloat16 and "
    "float16 also the part that does not average out over perturbed inputs"
)

UPCAST_BOUND = 1e-6
"""Largest relative difference in float64 from a second reference that rounds to float32 inside."""

SYSTEMATIC_SHARE = 0.5
"""Largest systematic part of an error in float64 that is float32 rounding, relative to all of it.

Rounding changes on inputs and weights that differ by 1e-3, the error of a bug hardly. A larger part
is accepted up to `SYSTEMATIC_FACTOR` times the reference's own in float32, as from constants.
"""

ROUGH_SHARE = 0.98
"""A systematic part above this share is all of an error."""

SYSTEMATIC_FACTOR = 3.0
"""Largest systematic error in a dtype, relative to the reference's."""

SYSTEMATIC_NOISE = 0.9
"""Largest systematic error of a step in a dtype, relative to the reference's rounding error."""

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

"""Reversible changes of shape and order between stored tensors and parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Transform:
    """A conversion between a parameter and its stored tensor.

    Both directions only move values, so they are exact.

    Attributes:
        name: Dimensions of the stored tensor; empty if they are the parameter's.
        to_stored: (parameter, number of heads) -> stored tensor.
        from_stored: (stored tensor, shape of the parameter) -> parameter.
    """

    name: str
    to_stored: Callable[[Tensor, int], Tensor]
    from_stored: Callable[[Tensor, tuple[int, ...]], Tensor]


def positions_to_grid(positions: Tensor) -> Tensor:
    """Reshape [position, out] to [y, x, out]."""
    side = math.isqrt(len(positions))
    grid: Tensor = positions.unflatten(0, (side, side))
    return grid


def kernel_to_patches(weight: Tensor) -> Tensor:
    """Reshape [out, channel, y, x] to [out, y x channel]."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def patches_to_kernel(patches: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Reshape [out, y x channel] to [out, channel, y, x]."""
    out, channels, height, width = shape
    return patches.reshape(out, height, width, channels).permute(0, 3, 1, 2)


# fmt: off
PLAIN = Transform("", lambda t, _: t, lambda t, _: t)

# Weights: flax stores [in, out], and attention with a dimension for the heads.
TRANSPOSED = Transform("[in, out]",
    lambda t, _: t.T,
    lambda t, _: t.T)
HEADS_LAST = Transform("[in, head, out of head]",
    lambda t, heads: t.T.unflatten(-1, (heads, -1)),
    lambda t, _: t.flatten(1).T)
HEADS_FIRST = Transform("[head, in of head, out]",
    lambda t, heads: t.T.unflatten(0, (heads, -1)),
    lambda t, _: t.flatten(0, 1).T)
BIAS_OF_HEADS = Transform("[head, out of head]",
    lambda t, heads: t.unflatten(0, (heads, -1)),
    lambda t, _: t.flatten())

# Patch embedding; the parameter is a convolution's, [out, channel, y, x].
KERNEL = Transform("[y, x, channel, out]",
    lambda t, _: t.permute(2, 3, 1, 0),
    lambda t, _: t.permute(3, 2, 0, 1))
CHANNEL_LAST = Transform("[out, y, x, channel]",
    lambda t, _: t.permute(0, 2, 3, 1),
    lambda t, _: t.permute(0, 3, 1, 2))
PATCHES = Transform("[out, y x channel]",
    lambda t, _: kernel_to_patches(t),
    lambda t, shape: patches_to_kernel(t, shape))
PATCHES_TRANSPOSED = Transform("[y x channel, out]",
    lambda t, _: kernel_to_patches(t).T,
    lambda t, shape: patches_to_kernel(t.T, shape))
PATCHES_CHANNEL_FIRST = Transform("[out, channel y x]",
    lambda t, _: t.flatten(1),
    lambda t, shape: t.reshape(shape))

# Position embedding; the parameter is [position, out].
BATCHED = Transform("[1, position, out]",
    lambda t, _: t[None],
    lambda t, _: t[0])
GRID = Transform("[y, x, out]",
    lambda t, _: positions_to_grid(t),
    lambda t, _: t.flatten(0, 1))
BATCHED_GRID = Transform("[1, y, x, out]",
    lambda t, _: positions_to_grid(t)[None],
    lambda t, _: t.flatten(0, 2))
# fmt: on

"""How files store single tensors that are stored otherwise than we have them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Transform:
    """How a stored tensor is made of ours, and ours of it.

    Both ways are exact: they only move values.

    Attributes:
        name: the dimensions of the stored tensor in words; empty where they are ours.
        store: (ours, number of heads) -> stored.
        load: (stored, the shape of ours) -> ours.
    """

    name: str
    store: Callable[[Tensor, int], Tensor]
    load: Callable[[Tensor, tuple[int, ...]], Tensor]


def positions_to_grid(positions: Tensor) -> Tensor:
    """[position, out] -> [y, x, out]."""
    side = math.isqrt(len(positions))
    grid: Tensor = positions.unflatten(0, (side, side))
    return grid


def kernel_to_patches(weight: Tensor) -> Tensor:
    """[out, channel, y, x] -> [out, y x channel]."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def patches_to_kernel(patches: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[out, y x channel] -> [out, channel, y, x]."""
    out, channels, height, width = shape
    return patches.reshape(out, height, width, channels).permute(0, 3, 1, 2)


# fmt: off
PLAIN = Transform("", lambda t, _: t, lambda t, _: t)

# Of weights: flax stores [in, out], and attention with its heads as a dimension.
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

# Of the patch embedding: ours is a convolution's, [out, channel, y, x].
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

# Of positions: ours are [position, out].
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

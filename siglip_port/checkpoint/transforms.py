"""Forms: how files store single tensors that are stored otherwise than we have them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Form:
    """How a stored tensor is made of ours, and ours of it. Both ways are exact.

    They only move values.

    Attributes:
        name: the dimensions of the stored tensor in words; empty where they are ours.
        store: (ours, number of heads) -> stored.
        load: (stored, the shape of ours) -> ours.
    """

    name: str
    store: Callable[[Tensor, int], Tensor]
    load: Callable[[Tensor, tuple[int, ...]], Tensor]


def _grid(positions: Tensor) -> Tensor:
    side = math.isqrt(len(positions))
    grid: Tensor = positions.unflatten(0, (side, side))
    return grid


def _patches(weight: Tensor) -> Tensor:
    return weight.permute(0, 2, 3, 1).flatten(1)


def _convolution(patches: Tensor, shape: tuple[int, ...]) -> Tensor:
    out, channels, height, width = shape
    return patches.reshape(out, height, width, channels).permute(0, 3, 1, 2)


# fmt: off
PLAIN = Form("", lambda t, _: t, lambda t, _: t)

# Of weights: flax stores [in, out], and attention with its heads as a dimension.
TRANSPOSED = Form("[in, out]",
    lambda t, _: t.T,
    lambda t, _: t.T)
HEADS_LAST = Form("[in, head, out of head]",
    lambda t, heads: t.T.unflatten(-1, (heads, -1)),
    lambda t, _: t.flatten(1).T)
HEADS_FIRST = Form("[head, in of head, out]",
    lambda t, heads: t.T.unflatten(0, (heads, -1)),
    lambda t, _: t.flatten(0, 1).T)
BIAS_OF_HEADS = Form("[head, out of head]",
    lambda t, heads: t.unflatten(0, (heads, -1)),
    lambda t, _: t.flatten())

# Of the patch embedding: ours is a convolution's, [out, channel, y, x].
KERNEL = Form("[y, x, channel, out]",
    lambda t, _: t.permute(2, 3, 1, 0),
    lambda t, _: t.permute(3, 2, 0, 1))
CHANNEL_LAST = Form("[out, y, x, channel]",
    lambda t, _: t.permute(0, 2, 3, 1),
    lambda t, _: t.permute(0, 3, 1, 2))
PATCHES = Form("[out, y x channel]",
    lambda t, _: _patches(t),
    lambda t, shape: _convolution(t, shape))
PATCHES_TRANSPOSED = Form("[y x channel, out]",
    lambda t, _: _patches(t).T,
    lambda t, shape: _convolution(t.T, shape))
PATCHES_CHANNEL_FIRST = Form("[out, channel y x]",
    lambda t, _: t.flatten(1),
    lambda t, shape: t.reshape(shape))

# Of positions: ours are [position, out].
BATCHED = Form("[1, position, out]",
    lambda t, _: t[None],
    lambda t, _: t[0])
GRID = Form("[y, x, out]",
    lambda t, _: _grid(t),
    lambda t, _: t.flatten(0, 1))
BATCHED_GRID = Form("[1, y, x, out]",
    lambda t, _: _grid(t)[None],
    lambda t, _: t.flatten(0, 2))
# fmt: on

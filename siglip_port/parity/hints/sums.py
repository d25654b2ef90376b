"""Guesses for sums: embeddings and residual connections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from siglip_port.parity.hints.guess import Guess, matches

MAX_SUMMANDS = 12
"""How many of the last taps are tried as summands."""


def embedding_guesses(before: Mapping[str, Tensor], truth: Tensor) -> Iterator[Guess]:
    """For patches, [B, D, H, W], plus a table of positions: [B, N, D]."""
    images = [tensor for tensor in before.values() if tensor.ndim == 4]
    if not images or truth.ndim != 3:
        return
    patches = images[-1]
    tokens = patches.flatten(2).transpose(1, 2)
    if tokens.shape != truth.shape:
        return
    table = (truth - tokens)[:1]
    length = truth.shape[1]
    height = patches.shape[2]

    yield "no position embedding", tokens
    yield "position embedding added twice", tokens + 2 * table
    yield "every token at position 0", tokens + table[:, :1]
    for shift in (1, -1):
        yield f"positions shifted by {shift}", tokens + table.roll(shift, 1)
    yield "positions reversed", tokens + table.flip(1)
    if height * height == length:
        grid = table.unflatten(1, (height, -1))
        columns = patches.transpose(2, 3).flatten(2).transpose(1, 2)
        yield "position grid transposed (x for y)", tokens + grid.transpose(1, 2).flatten(1, 2)
        yield "patches in columns", columns + table
    yield "patches reversed", tokens.flip(1) + table
    untransposed = patches.flatten(2).reshape(tokens.shape)
    yield "patches flattened without the transpose", untransposed + table
    yield "position table rounded to bfloat16", tokens + table.float().bfloat16()


def residual_guesses(before: Mapping[str, Tensor], truth: Tensor) -> Iterator[Guess]:
    """For the sum of two earlier tensors, x + y: which one is missing, or is another."""
    same_shape = [(name, tensor) for name, tensor in before.items() if tensor.shape == truth.shape]
    candidates = same_shape[-MAX_SUMMANDS:]
    for i in reversed(range(len(candidates))):
        remainder = truth - candidates[i][1]
        for j in range(i):
            if matches(candidates[j][1], remainder):
                others = [item for k, item in enumerate(candidates) if k not in (i, j)]
                yield from summand_guesses(candidates[j], candidates[i], others)
                return


def summand_guesses(
    first: tuple[str, Tensor], second: tuple[str, Tensor], others: list[tuple[str, Tensor]]
) -> Iterator[Guess]:
    """For the sum of two named tensors."""
    x_name, x = first
    y_name, y = second
    yield f"without {y_name}", x
    yield f"without the residual connection from {x_name}", y
    yield f"{y_name} added twice", x + 2 * y
    yield f"{y_name} and {x_name} normalized", nn.functional.layer_norm(x + y, x.shape[-1:])
    for name, tensor in others:
        yield f"the residual connection comes from {name}", tensor + y

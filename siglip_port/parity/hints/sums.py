"""Guesses for sums: embeddings and residual connections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from siglip_port.parity.hints.guess import Guess, matches

MAX_SUMMANDS = 12
"""Number of preceding taps that are tried as summands."""


def embedding_guesses(before: Mapping[str, Tensor], exact: Tensor) -> Iterator[Guess]:
    """Yield guesses for patch embeddings [B, D, H, W] plus position embeddings: [B, N, D]."""
    images = [tensor for tensor in before.values() if tensor.ndim == 4]
    if not images or exact.ndim != 3:
        return
    patches = images[-1]
    tokens = patches.flatten(2).transpose(1, 2)
    if tokens.shape != exact.shape:
        return
    table = (exact - tokens)[:1]
    length = exact.shape[1]
    height = patches.shape[2]

    yield "position embedding not added", tokens
    yield "position embedding added twice", tokens + 2 * table
    yield "position 0 used for every token", tokens + table[:, :1]
    for shift in (1, -1):
        yield f"positions shifted by {shift}", tokens + table.roll(shift, 1)
    yield "positions reversed", tokens + table.flip(1)
    if height * height == length:
        grid = table.unflatten(1, (height, -1))
        columns = patches.transpose(2, 3).flatten(2).transpose(1, 2)
        yield (
            "position grid transposed (x and y swapped)",
            tokens + grid.transpose(1, 2).flatten(1, 2),
        )
        yield "patches in column-major order", columns + table
    yield "patches reversed", tokens.flip(1) + table
    untransposed = patches.flatten(2).reshape(tokens.shape)
    yield "patches flattened without transpose", untransposed + table
    yield "position embedding rounded to bfloat16", tokens + table.float().bfloat16()


def residual_guesses(before: Mapping[str, Tensor], exact: Tensor) -> Iterator[Guess]:
    """Yield guesses for the sum of two earlier taps, such as a residual connection."""
    same_shape = [(name, tensor) for name, tensor in before.items() if tensor.shape == exact.shape]
    candidates = same_shape[-MAX_SUMMANDS:]
    for i in reversed(range(len(candidates))):
        remainder = exact - candidates[i][1]
        for j in range(i):
            if matches(candidates[j][1], remainder):
                others = [item for k, item in enumerate(candidates) if k not in (i, j)]
                yield from summand_guesses(candidates[j], candidates[i], others)
                return


def summand_guesses(
    first: tuple[str, Tensor], second: tuple[str, Tensor], others: list[tuple[str, Tensor]]
) -> Iterator[Guess]:
    """Yield guesses for the sum of two named tensors, x + y."""
    x_name, x = first
    y_name, y = second
    yield f"{y_name} not added", x
    yield f"no residual connection from {x_name}", y
    yield f"{y_name} added twice", x + 2 * y
    yield (
        f"LayerNorm of {x_name} + {y_name} (post-norm)",
        nn.functional.layer_norm(x + y, x.shape[-1:]),
    )
    for name, tensor in others:
        yield f"residual connection from {name} instead of {x_name}", tensor + y

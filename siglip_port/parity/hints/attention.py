"""Guesses for attention: projections, scores, softmax and heads."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from siglip_port.parity.hints.guess import NARROW_DTYPES, Guess
from siglip_port.parity.hints.layers import linear_guesses
from siglip_port.parity.sides import dtype_name

SWAPPED_HEADS = "[head_dim, heads] instead of [heads, head_dim]"
PADDED_HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)


def projection_guesses(attention: nn.MultiheadAttention, part: str, x: Tensor) -> Iterator[Guess]:
    """Yield guesses for `part`, one of q, k and v, of an `nn.MultiheadAttention` with input `x`."""
    if attention.in_proj_weight is None or attention.in_proj_bias is None:
        return
    weights = attention.in_proj_weight.chunk(3)
    biases = attention.in_proj_bias.chunk(3)
    index = "qkv".index(part)
    yield from linear_guesses(weights[index], biases[index], x)
    for i, other in enumerate("qkv"):
        if i != index:
            yield f"weight and bias of {other}", F.linear(x, weights[i], biases[i])
            yield f"bias of {other}", F.linear(x, weights[index], biases[i])
    interleaved_weight = attention.in_proj_weight[index::3]
    interleaved_bias = attention.in_proj_bias[index::3]
    interleaved = F.linear(x, interleaved_weight, interleaved_bias)
    yield "fused qkv weight read as interleaved", interleaved


def attention_guesses(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Iterator[Guess]:
    """Yield guesses for the context [B, Q, D] of q [B, Q, D], k [B, N, D] and v [B, N, D]."""
    if q.shape[-1] % heads or q.ndim != 3:
        return
    attention = Attention(q, k, v, heads)
    yield from scale_guesses(attention)
    yield from mask_guesses(attention)
    yield from softmax_guesses(attention)
    yield from head_guesses(attention)


class Attention:
    """Variants of attention on the same queries, keys and values.

    Args:
        q: Queries, [B, Q, D].
        k: Keys, [B, N, D].
        v: Values, [B, N, D].
        heads: Number of heads.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> None:
        self.q = q
        self.k = k
        self.v = v
        self.heads = heads
        self.width = q.shape[-1]
        self.head_dim = q.shape[-1] // heads
        self.scale = self.head_dim**-0.5
        self.values = split_heads(v, heads)  # [B, H, N, D/H]
        self.products = split_heads(q, heads) @ split_heads(k, heads).mT  # [B, H, Q, N]
        self.scores = self.products * self.scale

    def with_scale(self, scale: float) -> Tensor:
        """Return the context with another scale of the scores."""
        return self.from_scores(self.products * scale)

    def from_scores(self, scores: Tensor) -> Tensor:
        """Return the context for scores [B, H, Q, N]."""
        return self.from_weights(scores.softmax(-1))

    def from_weights(self, weights: Tensor) -> Tensor:
        """Return the context for attention weights [B, H, Q, N]."""
        return merge_heads(weights @ self.values)

    def with_heads(self, heads: int) -> Tensor:
        """Return the context with another number of heads."""
        q, k, v = (split_heads(x, heads) for x in (self.q, self.k, self.v))
        scores = q @ k.mT * (self.width // heads) ** -0.5
        return merge_heads(scores.softmax(-1) @ v)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Split heads: [B, N, D] -> [B, H, N, D/H]."""
    split: Tensor = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return split


def merge_heads(x: Tensor) -> Tensor:
    """Merge heads: [B, H, N, D/H] -> [B, N, D]."""
    return x.transpose(1, 2).flatten(2)


def scale_guesses(attention: Attention) -> Iterator[Guess]:
    """Yield contexts with other scales of the scores."""
    scales = {
        "attention scores not scaled by 1/sqrt(head_dim)": 1.0,
        "attention scaled by 1/sqrt(embed_dim) instead of 1/sqrt(head_dim)": attention.width**-0.5,
        "attention scaled by 1/sqrt(num_heads) instead of 1/sqrt(head_dim)": attention.heads**-0.5,
        "attention scaled twice by 1/sqrt(head_dim)": 1 / attention.head_dim,
        "attention scaled by sqrt(head_dim) instead of its inverse": attention.head_dim**0.5,
    }
    for label, scale in scales.items():
        yield label, attention.with_scale(scale)
    for head_dim in PADDED_HEAD_DIMS:
        if head_dim > attention.head_dim:
            label = f"attention scaled by 1/sqrt({head_dim}), the padded head_dim"
            yield label, attention.with_scale(head_dim**-0.5)


def mask_guesses(attention: Attention) -> Iterator[Guess]:
    """Yield contexts with masks."""
    queries, keys = attention.scores.shape[-2:]
    query = torch.arange(queries, device=attention.scores.device)[:, None]
    key = torch.arange(keys, device=attention.scores.device)[None]
    masks = {
        "causal mask": key > query,
        "last key masked": key == keys - 1,
        "first key masked": key == 0,
    }
    yield "mask not applied", attention.from_scores(attention.scores)
    for label, mask in masks.items():
        yield label, attention.from_scores(attention.scores.masked_fill(mask, -math.inf))


def softmax_guesses(attention: Attention) -> Iterator[Guess]:
    """Yield contexts with another softmax, or one in a narrower dtype."""
    scores = attention.scores
    yield "softmax over queries instead of keys", attention.from_weights(scores.softmax(-2))
    plus_one = F.pad(scores, (0, 1)).softmax(-1)[..., :-1]
    yield "softmax with 1 added to the denominator", attention.from_weights(plus_one)
    for dtype in (*NARROW_DTYPES, torch.float32):
        name = dtype_name(dtype)
        weights = scores.to(dtype).softmax(-1).double()
        yield f"softmax in {name}", attention.from_weights(weights)
        rounded = scores.softmax(-1).to(dtype).double()
        yield f"attention weights rounded to {name}", attention.from_weights(rounded)


def head_guesses(attention: Attention) -> Iterator[Guess]:
    """Yield contexts with another number of heads, or another way to split or merge them."""
    width = attention.width
    for heads in range(1, width + 1):
        if heads != attention.heads and width % heads == 0:
            label = f"{heads} heads instead of {attention.heads}"
            yield label, attention.with_heads(heads)
    uniform = torch.full_like(attention.scores, 1 / attention.scores.shape[-1])
    yield "uniform attention", attention.from_weights(uniform)

    context = attention.scores.softmax(-1) @ attention.values
    queries = context.shape[-2]
    untransposed = context.flatten(1).unflatten(1, (queries, -1))
    yield "heads merged without transpose", untransposed
    yield f"heads merged as {SWAPPED_HEADS}", context.permute(0, 2, 3, 1).flatten(2)
    yield from split_guesses(attention)


def split_guesses(attention: Attention) -> Iterator[Guess]:
    """Yield contexts with another way to split heads."""
    inputs = (attention.q, attention.k, attention.v)
    scale = attention.scale
    if attention.q.shape[1] == attention.k.shape[1]:
        shape = (len(attention.q), attention.heads, -1, attention.head_dim)
        q, k, v = (x.reshape(shape) for x in inputs)
        context = (q @ k.mT * scale).softmax(-1) @ v
        yield "heads split without transpose", merge_heads(context)
    q, k, v = (x.unflatten(-1, (-1, attention.heads)).permute(0, 3, 1, 2) for x in inputs)
    context = (q @ k.mT * scale).softmax(-1) @ v
    yield f"heads split as {SWAPPED_HEADS}", merge_heads(context)
    yield f"heads split and merged as {SWAPPED_HEADS}", context.permute(0, 2, 3, 1).flatten(2)

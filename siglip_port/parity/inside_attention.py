"""Tensors inside an `nn.MultiheadAttention`, which calls no module for its projections."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

INSIDE_ATTENTION = ("q", "k", "v", "context")


def unsupported_attention(attention: nn.Module | type[nn.Module]) -> str:
    """Explain why the inside of a module cannot be tapped; empty if it can.

    Of a type, only whether it is attention is known.
    """
    if isinstance(attention, type):
        is_attention = issubclass(attention, nn.MultiheadAttention)
        return "" if is_attention else f"needs an nn.MultiheadAttention, got a {attention.__name__}"
    if not isinstance(attention, nn.MultiheadAttention):
        return f"needs an nn.MultiheadAttention, got a {type(attention).__name__}"
    extras = []
    if attention.bias_k is not None:
        extras.append("add_bias_kv")
    if attention.add_zero_attn:
        extras.append("add_zero_attn")
    if extras:
        return f"needs an nn.MultiheadAttention without {' and '.join(extras)}"
    return ""


def bind_arguments(
    attention: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a call of an `nn.MultiheadAttention` by name."""
    signature = inspect.signature(nn.MultiheadAttention.forward)
    return dict(signature.bind(attention, *args, **kwargs).arguments)


def inside_attention(
    attention: nn.MultiheadAttention, arguments: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Recompute the tensors inside an `nn.MultiheadAttention`.

    Args:
        attention: Attention module without `add_bias_kv` and `add_zero_attn`.
        arguments: Arguments of its call: `query`, `key`, `value`, and masks.

    Returns:
        `q`, `k`, `v` and `context`, [B, N, D], whatever the layout of the inputs is.
    """
    projected = {}
    for part, name in (("q", "query"), ("k", "key"), ("v", "value")):
        x = batch_first(attention, arguments[name])
        weight, bias = projection(attention, part)
        projected[part] = nn.functional.linear(x, weight, bias)
    q, k, v = (
        x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in projected.values()
    )
    mask = combined_mask(attention, arguments, q)
    context = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return {**projected, "context": context.transpose(1, 2).flatten(2)}


def batch_first(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Return an input as [B, N, D]: it may be [N, B, D], or [N, D] for a single example."""
    if x.ndim == 2:
        return x[None]
    if attention.batch_first:
        return x
    return x.transpose(0, 1)


def projection(attention: nn.MultiheadAttention, part: str) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of the projection to `part`: `q`, `k` or `v`."""
    index = "qkv".index(part)
    bias = None
    if attention.in_proj_bias is not None:
        bias = attention.in_proj_bias.chunk(3)[index]
    if attention.in_proj_weight is not None:
        return attention.in_proj_weight.chunk(3)[index], bias
    weight = getattr(attention, f"{part}_proj_weight")  # keys or values of another width
    return weight, bias


def combined_mask(
    attention: nn.MultiheadAttention, arguments: Mapping[str, Any], queries: Tensor
) -> Tensor | None:
    """Return both masks of a call as one that is added to the scores; None without masks.

    Args:
        attention: Attention module.
        arguments: Arguments of its call; True in a mask of bools means that a key is ignored.
        queries: Queries, [B, H, N, D/H], which the mask takes its dtype from.

    Returns:
        Mask that broadcasts to [B, H, N, S].
    """
    masks = []
    attn_mask = arguments.get("attn_mask")
    if attn_mask is not None:
        mask = additive(attn_mask, queries.dtype)
        if mask.ndim == 3:  # [B * H, N, S]
            mask = mask.unflatten(0, (-1, attention.num_heads))
        masks.append(mask)
    padding_mask = arguments.get("key_padding_mask")
    if padding_mask is not None:
        mask = additive(padding_mask, queries.dtype)
        if mask.ndim == 1:  # [S] of a single example
            mask = mask[None]
        masks.append(mask[:, None, None])
    if not masks:
        return None
    if len(masks) == 1:
        return masks[0]
    return masks[0] + masks[1]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as values that are added to the scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)

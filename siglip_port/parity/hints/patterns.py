"""Hints by the numbers alone, whatever computed them: scaled, permuted, cast."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from siglip_port.parity.hints.guess import MATCH, NARROW_DTYPES, matches, round_to
from siglip_port.parity.metrics import is_finite
from siglip_port.parity.sides import dtype_name


def explain_pattern(value: Tensor, truth: Tensor) -> str:
    """Say what a value looks like beside the truth of the same shape; empty if like nothing."""
    if not is_finite(value):
        return "not finite"
    if not value.any():
        return "all zero"
    return (
        explain_scale(value, truth)
        or explain_permutation(value, truth)
        or explain_cast(value, truth)
    )


def explain_scale(value: Tensor, truth: Tensor) -> str:
    """Say whether all is scaled by one factor, or every vector to one length."""
    value = value.double()
    truth = truth.double()
    factor = float((value * truth).sum() / truth.square().sum())
    if factor and matches(value, factor * truth) and abs(factor - 1) > MATCH:
        return f"scaled by {factor:.6g}"
    if value.ndim > 1:
        lengths = value.norm(dim=-1)
        ratios = value.norm(dim=-1, keepdim=True) / truth.norm(dim=-1, keepdim=True)
        if matches(ratios * truth, value) and float(lengths.std()) < MATCH:
            return f"every vector scaled to length {float(lengths.mean()):.6g}"
    return ""


def explain_permutation(value: Tensor, truth: Tensor) -> str:
    """Say whether the numbers are the truth's in another order along one axis."""
    axes = ["pictures", "features"]
    if value.ndim == 3:
        axes.insert(1, "tokens")
    for dim, axis in enumerate(axes):
        if dim < value.ndim and value.shape[dim] > 1:
            for label, order in permutations(value.shape[dim]):
                index = torch.tensor(order, device=truth.device)
                if matches(truth.index_select(dim, index), value):
                    return f"{axis} {label}"
    if value.ndim == 3 and min(value.shape[1:]) > 1:
        reshaped = truth.transpose(1, 2).reshape(truth.shape)
        if matches(reshaped, value):
            return "reshaped where it should be transposed"
    return ""


def permutations(length: int) -> Iterator[tuple[str, list[int]]]:
    """Orders in which bugs leave an axis of some length, with their names."""
    indices = list(range(length))
    yield "reversed", indices[::-1]
    for shift in (1, -1):
        yield f"shifted by {shift}", [(i - shift) % length for i in indices]
    side = math.isqrt(length)
    if side * side == length and side > 1:
        yield "transposed as a grid", [(i % side) * side + i // side for i in indices]


def explain_cast(value: Tensor, truth: Tensor) -> str:
    """Say whether the numbers lie on the grid of a narrower dtype, and the truth's do not."""
    for dtype in (*NARROW_DTYPES, torch.float32):
        if is_on_grid(value, dtype) and not is_on_grid(truth, dtype):
            return f"cast to {dtype_name(dtype)}"
    return ""


def is_on_grid(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a dtype holds every number of a tensor exactly."""
    return torch.equal(round_to(tensor, dtype), tensor)

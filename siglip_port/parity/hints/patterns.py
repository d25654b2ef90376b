"""Hints for tensors of any origin: scaled, permuted or cast."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from siglip_port.parity.hints.guess import MATCH, MAX_REST, NARROW_DTYPES, explains, round_to
from siglip_port.parity.metrics import is_finite
from siglip_port.parity.sides import dtype_name


def explain_pattern(value: Tensor, exact: Tensor) -> str:
    """Return the hint for a value of the same shape as the exact one; empty if there is none."""
    if not is_finite(value):
        return "NaN or Inf in the port"
    if not value.any():
        return "all zeros"
    return (
        explain_scale(value, exact)
        or explain_permutation(value, exact)
        or explain_cast(value, exact)
    )


def is_rearranged(value: Tensor, exact: Tensor) -> bool:
    """Return whether a value is the exact one, scaled or in another order."""
    if value.shape != exact.shape or not is_finite(value):
        return False
    return bool(explain_scale(value, exact) or explain_permutation(value, exact))


def explain_scale(value: Tensor, exact: Tensor) -> str:
    """Detect a constant factor, or vectors scaled to the same norm."""
    value = value.double()
    exact = exact.double()
    factor = float((value * exact).sum() / exact.square().sum())
    if factor and explains(factor * exact, value, exact) and abs(factor - 1) > MATCH:
        return f"scaled by {factor:.6g}"
    if value.ndim > 1:
        norms = value.norm(dim=-1)
        ratios = value.norm(dim=-1, keepdim=True) / exact.norm(dim=-1, keepdim=True)
        if explains(ratios * exact, value, exact) and float(norms.std()) < MATCH:
            return f"vectors normalized to norm {float(norms.mean()):.6g}"
    return ""


def explain_permutation(value: Tensor, exact: Tensor) -> str:
    """Detect the exact values in another order along one axis."""
    axes = ["images", "features"]
    if value.ndim == 3:
        axes.insert(1, "tokens")
    for dim, axis in enumerate(axes):
        if dim < value.ndim and value.shape[dim] > 1:
            for label, order in permutations(value.shape[dim]):
                index = torch.tensor(order, device=exact.device)
                if explains(exact.index_select(dim, index), value, exact):
                    return f"{axis} {label}"
    if value.ndim == 3 and min(value.shape[1:]) > 1:
        reshaped = exact.transpose(1, 2).reshape(exact.shape)
        if explains(reshaped, value, exact):
            return "reshaped instead of transposed"
    return ""


def permutations(length: int) -> Iterator[tuple[str, list[int]]]:
    """Yield the orders that bugs give to an axis: name and index list."""
    indices = list(range(length))
    yield "reversed", indices[::-1]
    for shift in (1, -1):
        yield f"shifted by {shift}", [(i - shift) % length for i in indices]
    side = math.isqrt(length)
    if side * side == length and side > 1:
        yield "transposed as a square grid", [(i % side) * side + i // side for i in indices]


def explain_cast(value: Tensor, exact: Tensor) -> str:
    """Detect the exact values rounded to a narrower dtype."""
    for dtype in (*NARROW_DTYPES, torch.float32):
        rounded = round_to(exact.double(), dtype)
        difference = (exact.double() - value.double()).norm()
        rest = (rounded - value.double()).norm()
        if is_representable(value, dtype) and rest < MAX_REST * difference:
            return f"cast to {dtype_name(dtype)}"
    return ""


def is_representable(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a dtype represents every element of a tensor exactly."""
    return torch.equal(round_to(tensor, dtype), tensor)

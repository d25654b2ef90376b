"""Hints for tensors of weights that differ."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from siglip_port.parity.hints.guess import NARROW_DTYPES, round_to
from siglip_port.parity.hints.patterns import explain_scale
from siglip_port.parity.metrics import tensors_equal
from siglip_port.parity.sides import dtype_name


def explain_weight(value: Tensor, name: str, reference: Mapping[str, Tensor]) -> str:
    """Return the hint for a tensor; empty if no known bug explains it.

    Args:
        value: The port's tensor, of the same shape as the reference's.
        name: Name in the reference's `state_dict`.
        reference: The reference's `state_dict`.
    """
    exact = reference[name]
    if not value.any():
        return "all zeros (not loaded?)"
    for other, tensor in reference.items():
        if other != name and tensor.shape == value.shape and tensors_equal(tensor, value):
            return f"same as {other}"
    if is_square(value) and torch.equal(value.T, exact):
        return "transposed"
    for dtype in (*NARROW_DTYPES, torch.float32):
        if torch.equal(round_to(exact, dtype), value):
            return f"rounded to {dtype_name(dtype)}"
    differs = value != exact
    if not value[differs].any():
        return f"{int(differs.sum())} elements are zero (truncated file?)"
    return explain_order(value, exact) or explain_scale(value, exact)


def is_square(tensor: Tensor) -> bool:
    """Return whether a tensor is a square matrix."""
    return tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1]


def explain_order(value: Tensor, exact: Tensor) -> str:
    """Detect permuted rows or elements."""
    if torch.equal(sorted_columns(value), sorted_columns(exact)):
        return "rows permuted"
    if torch.equal(value.flatten().sort().values, exact.flatten().sort().values):
        return "elements permuted"
    return ""


def sorted_columns(tensor: Tensor) -> Tensor:
    """Sort every column; rows are along the first axis."""
    rows = tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None]
    return rows.sort(dim=0).values

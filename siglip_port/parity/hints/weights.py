"""The hint for a tensor of parameters that is not the reference's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from siglip_port.parity.hints.guess import NARROW_DTYPES, round_to
from siglip_port.parity.hints.patterns import explain_scale
from siglip_port.parity.metrics import tensors_equal
from siglip_port.parity.sides import dtype_name


def explain_weight(value: Tensor, name: str, reference: Mapping[str, Tensor]) -> str:
    """Say what a tensor looks like; empty where it looks like nothing known.

    Args:
        value: the port's, of the shape of the reference's.
        name: in the reference.
        reference: all its tensors.
    """
    truth = reference[name]
    if not value.any():
        return "all zero: not loaded?"
    for other, tensor in reference.items():
        if other != name and tensor.shape == value.shape and tensors_equal(tensor, value):
            return f"it is {other}"
    if is_square(value) and torch.equal(value.T, truth):
        return "transposed"
    for dtype in (*NARROW_DTYPES, torch.float32):
        if torch.equal(round_to(truth, dtype), value):
            return f"rounded to {dtype_name(dtype)}"
    differs = value != truth
    if not value[differs].any():
        return f"{int(differs.sum())} elements are zero: a truncated file?"
    return explain_order(value, truth) or explain_scale(value, truth)


def is_square(tensor: Tensor) -> bool:
    """Whether it is a matrix with as many rows as columns."""
    return tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1]


def explain_order(value: Tensor, truth: Tensor) -> str:
    """Say whether the numbers are the truth's in another order."""
    if torch.equal(sorted_columns(value), sorted_columns(truth)):
        return "the same rows in another order"
    if torch.equal(value.flatten().sort().values, truth.flatten().sort().values):
        return "the same numbers in another order"
    return ""


def sorted_columns(tensor: Tensor) -> Tensor:
    """Every column sorted for itself; the rows are along the first axis."""
    rows = tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None]
    return rows.sort(dim=0).values

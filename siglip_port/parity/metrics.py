"""Figures: how far two tensors are apart. All in float64, none of an absolute size."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def relative_error(value: Tensor, truth: Tensor) -> float:
    """||value - truth|| / ||truth|| over all elements; not finite where the truth is all zero."""
    truth = truth.double()
    return float((value.double() - truth).norm() / truth.norm())


def cosine(value: Tensor, truth: Tensor) -> Tensor:
    """Cosine similarity along the feature axis, the last one: [..., D], [..., D] -> [...]."""
    return F.cosine_similarity(value.double(), truth.double(), dim=-1)


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: 0 and -0 differ in them, and a NaN equals itself."""
    return tensor.contiguous().view(torch.uint8)

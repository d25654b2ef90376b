"""Metrics: how far two tensors are apart. All in float64, none of an absolute size."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def relative_error(value: Tensor, truth: Tensor) -> float:
    """||value - truth|| / ||truth|| over all elements; not finite where the truth is all zero."""
    truth = truth.double()
    return float((value.double() - truth).norm() / truth.norm())


def cosine(value: Tensor, truth: Tensor) -> Tensor:
    """Cosine similarity along the feature axis, the last one: [..., D], [..., D] -> [...]."""
    return torch.cosine_similarity(value.double(), truth.double(), dim=-1)


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: 0 and -0 differ in them, and a NaN equals itself."""
    return tensor.contiguous().view(torch.uint8)


def tensors_equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one shape and dtype agree in every bit."""
    return torch.equal(bits(first), bits(second))


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    return bool(tensor.isfinite().all())


class RelativeError(NamedTuple):
    """How far a tensor [..., D] is from its truth.

    Attributes:
        overall: ||value - truth|| / ||truth||.
        worst: ||value - truth|| of the worst vector, in units of the vectors' root mean square
            length.
    """

    overall: float
    worst: float


class ErrorMeter:
    """Measures the error of a tensor that arrives in parts.

    The parts follow each other along the first axis, and the whole may pass several times.
    """

    def __init__(self, truth: Tensor) -> None:
        self.truth = truth
        self.length = 0
        self.shapes_match = True
        self._squared_error = 0.0
        self._worst = 0.0

    @property
    def is_first_pass(self) -> bool:
        """Whether the truth has not yet been covered once."""
        return self.length < len(self.truth)

    @property
    def is_complete(self) -> bool:
        """Whether the parts so far cover the truth, once or several times."""
        return self.shapes_match and self.length > 0 and self.length % self._period == 0

    @property
    def _period(self) -> int:
        return max(1, len(self.truth))

    def add(self, part: Tensor) -> Tensor | None:
        """Compare the next part. Returns its truth; None where there is none of its shape."""
        start = self.length % self._period
        truth = self.truth[start : start + len(part)]
        if truth.shape != part.shape:
            self.shapes_match = False
            return None
        self.length += len(part)
        distances = (part.double() - truth.double()).norm(dim=-1)
        self._squared_error += float(distances.square().sum())
        if math.isfinite(self._squared_error):
            self._worst = max(self._worst, float(distances.max()))
        else:
            self._worst = math.nan
        return truth

    def error(self) -> RelativeError:
        """The error of all parts; infinite where they do not cover the truth."""
        if not self.is_complete:
            return RelativeError(math.inf, math.inf)
        norm = float(self.truth.double().norm())
        if norm == 0:
            return RelativeError(math.nan, math.nan)
        passes = self.length // self._period
        num_vectors = self.truth.numel() / self.truth.shape[-1]
        overall = math.sqrt(self._squared_error / passes) / norm
        return RelativeError(overall, self._worst / norm * math.sqrt(num_vectors))

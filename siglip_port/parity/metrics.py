"""Distances between two tensors, computed in float64; all of them relative."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Return ||value - exact|| / ||exact|| over all elements; not finite if `exact` is zero."""
    exact = exact.double()
    return float((value.double() - exact).norm() / exact.norm())


def cosine(value: Tensor, exact: Tensor) -> Tensor:
    """Return the cosine similarity along the last axis: [..., D], [..., D] -> [...], float64."""
    return torch.cosine_similarity(value.double(), exact.double(), dim=-1)


def bits(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor as uint8: 0 and -0 differ, and a NaN equals itself."""
    return tensor.contiguous().view(torch.uint8)


def tensors_equal(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors of the same shape and dtype are bitwise equal."""
    return torch.equal(bits(first), bits(second))


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor contains neither NaN nor infinity."""
    return bool(tensor.isfinite().all())


class RelativeError(NamedTuple):
    """Error of a tensor [..., D].

    Attributes:
        overall: ||value - exact|| / ||exact|| over all elements.
        worst: Largest ||value - exact|| of one vector [D], divided by the root mean square norm of
            the exact vectors.
    """

    overall: float
    worst: float


class ErrorMeter:
    """Meter of the error of a tensor that arrives in parts.

    Parts are consecutive along the first axis; the whole tensor may pass several times.

    Args:
        exact: Expected tensor.
        defined: Positions [B, N] of a tensor [B, N, D] to compare; None for all. Tensors of another
            shape are compared everywhere.
    """

    def __init__(self, exact: Tensor, defined: Tensor | None = None) -> None:
        self.exact = exact
        self.undefined: Tensor | None = None
        if defined is not None and exact.ndim == 3 and exact.shape[:2] == defined.shape:
            self.undefined = ~defined
        self.length = 0
        self.shapes_match = True
        self._squared_error = 0.0
        self._worst = 0.0

    @property
    def is_first_pass(self) -> bool:
        """Whether the parts so far are shorter than the expected tensor."""
        return self.length < len(self.exact)

    @property
    def is_complete(self) -> bool:
        """Whether the parts so far cover the expected tensor, once or several times."""
        return self.shapes_match and self.length > 0 and self.length % self._period == 0

    @property
    def _period(self) -> int:
        return max(1, len(self.exact))

    def add(self, part: Tensor) -> Tensor | None:
        """Compare the next part.

        Returns:
            The expected part; None if the shapes differ.
        """
        start = self.length % self._period
        exact = self.exact[start : start + len(part)]
        if exact.shape != part.shape:
            self.shapes_match = False
            return None
        self.length += len(part)
        distances = (part.double() - exact.double()).norm(dim=-1)
        if self.undefined is not None:
            distances = distances.masked_fill(self.undefined[start : start + len(part)], 0.0)
        self._squared_error += float(distances.square().sum())
        if math.isfinite(self._squared_error):
            self._worst = max(self._worst, float(distances.max()))
        else:
            self._worst = math.nan
        return exact

    def error(self) -> RelativeError:
        """Return the error of all parts; infinite if they do not cover the expected tensor."""
        if not self.is_complete:
            return RelativeError(math.inf, math.inf)
        norms = self.exact.double().norm(dim=-1)
        num_vectors = norms.numel()
        if self.undefined is not None:
            norms = norms.masked_fill(self.undefined, 0.0)
            num_vectors -= int(self.undefined.sum())
        norm = float(norms.norm())
        if norm == 0:
            return RelativeError(math.nan, math.nan)
        passes = self.length // self._period
        overall = math.sqrt(self._squared_error / passes) / norm
        return RelativeError(overall, self._worst / norm * math.sqrt(num_vectors))

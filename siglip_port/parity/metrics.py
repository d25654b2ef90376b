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
        undefined = self._undefined_in(start, len(part))
        if undefined is not None:
            distances = distances.masked_fill(undefined, 0.0)
        self._squared_error += float(distances.square().sum())
        if math.isfinite(self._squared_error):
            self._worst = max(self._worst, float(distances.max()))
        else:
            self._worst = math.nan
        return exact

    def _undefined_in(self, start: int, length: int) -> Tensor | None:
        if self.undefined is None:
            return None
        return self.undefined[start : start + length]

    def last_defined(self, part: Tensor, exact: Tensor) -> Tensor:
        """Return a copy of the last part with the exact values where it is undefined."""
        start = (self.length - len(part)) % self._period
        undefined = self._undefined_in(start, len(part))
        if undefined is None:
            return part.clone()
        return torch.where(undefined[..., None], exact.to(part.dtype), part)

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


def share_of_differences(value: Tensor, exact: Tensor) -> RelativeError:
    """Return the share of elements that differ, for tensors of integers or bools.

    It is infinite if the shapes differ.
    """
    if value.shape != exact.shape:
        return RelativeError(math.inf, math.inf)
    share = float((value != exact).double().mean())
    return RelativeError(share, share)


class ErrorStatistics(NamedTuple):
    """Errors of a tensor on several inputs that differ slightly.

    Attributes:
        total: Root mean square of the relative errors.
        systematic: Part that all errors have in common. Rounding changes completely with the
            inputs, so that its part is near 0; that of a bug is near `total`.
        varies: Whether the exact tensor depends on the inputs. If not, neither does its rounding.
    """

    total: float
    systematic: float
    varies: bool = True


MAX_SAMPLED = 65536
"""Largest number of elements per tensor that count for `ErrorStatistics`."""


class SystematicErrorMeter:
    """Meter of the part of an error that inputs which differ slightly have in common.

    The mean product of the errors on two different inputs is an unbiased estimate of its square.
    Fixed elements, which change by less than their rounding step, as outliers do, do not count
    beside others: their rounding averages out over nothing.
    """

    def __init__(self) -> None:
        self.count = 0
        self._first = torch.zeros(0)
        self._change = torch.zeros(0)
        self._sum = torch.zeros(0)
        self._squares = torch.zeros(0)
        self._exact_squares = 0.0
        self._step = 0.0

    def add(self, value: Tensor, exact: Tensor) -> None:
        """Add the error on one of the inputs; large tensors are sampled at fixed elements."""
        if value.is_floating_point():
            self._step = torch.finfo(value.dtype).eps
        exact = sample_elements(exact).double()
        error = sample_elements(value).double() - exact
        if self.count == 0:
            self._first = exact
            self._change, self._sum, self._squares = (torch.zeros_like(exact) for _ in range(3))
        self.count += 1
        self._change = torch.maximum(self._change, (exact - self._first).abs())
        self._sum = self._sum + error
        self._squares = self._squares + error.square()
        self._exact_squares += float(exact.square().sum())

    def statistics(self) -> ErrorStatistics:
        """Return the statistics; the systematic part is NaN before the second input."""
        if self.count < 2 or self._exact_squares == 0:
            return ErrorStatistics(math.nan, math.nan)
        unit = math.sqrt(self._exact_squares / self.count)
        total = math.sqrt(float(self._squares.sum()) / self.count) / unit
        varies = bool((self._change > 0).any())
        products = (self._sum.square() - self._squares)[self._counted()]
        mean_product = float(products.sum()) / (self.count * (self.count - 1))
        if not math.isfinite(mean_product):
            return ErrorStatistics(total, math.nan, varies)
        return ErrorStatistics(total, math.sqrt(max(0.0, mean_product)) / unit, varies)

    def _counted(self) -> Tensor:
        """Return the mask of the elements that are not fixed; of all if all are."""
        changes = self._change > self._step * self._first.abs()
        return changes if changes.any() else torch.ones_like(changes)


def sample_elements(tensor: Tensor) -> Tensor:
    """Return the elements of a tensor, or a fixed sample of those of a large one: [N]."""
    flat = tensor.flatten()
    if len(flat) <= MAX_SAMPLED:
        return flat
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(flat), (MAX_SAMPLED,), generator=generator)
    return flat[index.to(flat.device)]

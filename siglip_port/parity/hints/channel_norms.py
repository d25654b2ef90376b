"""Guesses for norms over other axes than the last one, and for factors per feature."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from siglip_port.parity.hints.guess import Guess

OTHER_EPS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-12)


def batch_norm_guesses(norm: _BatchNorm, x: Tensor) -> Iterator[Guess]:
    """Yield other normalizations of the input [B, C, ...] of a BatchNorm in `eval()` mode."""
    mean = norm.running_mean
    variance = norm.running_var
    if mean is None or variance is None:
        return

    def normalize(mean: Tensor, variance: Tensor, eps: float = norm.eps) -> Tensor:
        return F.batch_norm(x, mean, variance, norm.weight, norm.bias, eps=eps)

    for eps in OTHER_EPS:
        if eps != norm.eps:
            yield f"eps {eps:g} instead of {norm.eps:g}", normalize(mean, variance, eps)
    zeros = torch.zeros_like(mean)
    ones = torch.ones_like(variance)
    yield "running mean and variance not loaded", normalize(zeros, ones)
    yield "running mean not loaded", normalize(zeros, variance)
    yield "running variance not loaded", normalize(mean, ones)
    yield (
        "statistics of the batch instead of the running ones (training mode)",
        F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps),
    )
    yield "BatchNorm weight and bias not applied", F.batch_norm(x, mean, variance, eps=norm.eps)
    yield "BatchNorm not applied", x


def group_norm_guesses(norm: nn.GroupNorm, x: Tensor) -> Iterator[Guess]:
    """Yield other normalizations of the input [B, C, ...] of a GroupNorm."""

    def normalize(groups: int, eps: float = norm.eps) -> Tensor:
        return F.group_norm(x, groups, norm.weight, norm.bias, eps)

    for eps in OTHER_EPS:
        if eps != norm.eps:
            yield f"eps {eps:g} instead of {norm.eps:g}", normalize(norm.num_groups, eps)
    for groups in range(1, x.shape[1] + 1):
        if groups != norm.num_groups and x.shape[1] % groups == 0:
            yield f"{groups} groups instead of {norm.num_groups}", normalize(groups)
    yield (
        "GroupNorm weight and bias not applied",
        F.group_norm(x, norm.num_groups, eps=norm.eps),
    )
    yield "GroupNorm not applied", x


def factor_guesses(module: nn.Module, x: Tensor, exact: Tensor) -> Iterator[Guess]:
    """Yield other results of a module with a factor per feature, such as a LayerScale."""
    parameters = list(module.parameters())
    if len(parameters) != 1 or parameters[0].ndim != 1 or x.shape != exact.shape:
        return
    name = type(module).__name__
    yield f"{name} not applied", x
    if x.shape[-1:] == parameters[0].shape:
        yield f"{name} applied twice", exact * parameters[0]

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from siglip_port.parity import randomize
from siglip_port.parity.hints import explain
from tests.parity.toy_models import double_noise

X = double_noise(3, 6, 5, 5)


def batch_norm() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(6).double().eval()
    randomize(norm)
    return norm


def hint(module: nn.Module, value: Tensor, x: Tensor = X) -> str:
    """Hint for the value of a port at the output of a module."""
    with torch.no_grad():
        exact = module(x)
    model = nn.ModuleDict({"norm": module})
    return explain(model, "norm", x, {"norm": exact}, value.detach())


BatchNormBug = Callable[[nn.BatchNorm2d], Tensor]


@pytest.mark.parametrize(
    ("bug", "expected"),
    [
        (
            lambda n: F.batch_norm(X, n.running_mean, n.running_var, n.weight, n.bias, eps=1e-3),
            "eps 0.001 instead of 1e-05",
        ),
        (
            lambda n: F.batch_norm(X, n.running_mean * 0, n.running_var, n.weight, n.bias),
            "running mean not loaded",
        ),
        (
            lambda n: F.batch_norm(
                X, n.running_mean, torch.ones_like(n.running_var), n.weight, n.bias
            ),
            "running variance not loaded",
        ),
        (
            lambda n: F.batch_norm(X, None, None, n.weight, n.bias, training=True),
            "statistics of the batch instead of the running ones (training mode)",
        ),
        (
            lambda n: F.batch_norm(X, n.running_mean, n.running_var),
            "BatchNorm weight and bias not applied",
        ),
    ],
)
def test_batch_norm(bug: BatchNormBug, expected: str) -> None:
    norm = batch_norm()
    assert hint(norm, bug(norm)) == expected


def test_group_norm() -> None:
    norm = nn.GroupNorm(3, 6).double()
    randomize(norm)
    more = F.group_norm(X, 2, norm.weight, norm.bias, norm.eps)
    assert hint(norm, more) == "2 groups instead of 3"
    other_eps = F.group_norm(X, 3, norm.weight, norm.bias, 1e-6)
    assert hint(norm, other_eps) == "eps 1e-06 instead of 1e-05"


def test_layer_norm_without_parameters() -> None:
    norm = nn.LayerNorm(5, elementwise_affine=False).double()
    assert hint(norm, F.layer_norm(X, (5,), eps=1e-6)) == "eps 1e-06 instead of 1e-05"


@pytest.mark.parametrize(
    ("conv", "shape"),
    [(nn.Conv1d(6, 4, 3, padding=1), (2, 6, 9)), (nn.Conv3d(6, 4, 2), (2, 6, 3, 3, 3))],
)
def test_convolutions(conv: nn.Conv1d | nn.Conv3d, shape: tuple[int, ...]) -> None:
    conv.double()
    randomize(conv)
    x = double_noise(*shape)
    with torch.no_grad():
        axes = (-1,) + (1,) * (len(shape) - 2)
        assert conv.bias is not None
        without_bias = conv(x) - conv.bias.view(axes)
        flipped = conv(x.flip(-1))
    assert hint(conv, without_bias, x) == "convolution without bias"
    assert hint(conv, flipped, x) == "input reversed along the last axis"

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from siglip_port.parity import randomize
from siglip_port.parity.hints.guess import first_match
from siglip_port.parity.hints.layers import (
    activation_guesses,
    convolution_guesses,
    layer_norm_guesses,
)
from tests.parity.toy_models import double_noise


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@pytest.mark.parametrize(
    ("function", "hint"),
    [
        (F.gelu, "exact (erf) GELU instead of tanh GELU"),
        (F.silu, "SiLU instead of tanh GELU"),
        (lambda x: F.relu(x.half()).double(), "ReLU in float16 instead of tanh GELU"),
        (lambda x: tanh_gelu(x.bfloat16()).double(), "tanh GELU in bfloat16"),
        (lambda x: x, "no activation instead of tanh GELU"),
        (torch.tanh, ""),
    ],
)
def test_activations(function: object, hint: str) -> None:
    x = double_noise(2, 5, 32)
    assert callable(function)
    exact = tanh_gelu(x)
    assert first_match(activation_guesses(x, exact), function(x), exact) == hint


def test_activation_instead_of_unknown_one() -> None:
    x = double_noise(2, 5, 32)
    exact = torch.tanh(x)
    assert first_match(activation_guesses(x, exact), F.gelu(x), exact) == "exact (erf) GELU"


@torch.no_grad()
def test_layer_norms() -> None:
    norm = nn.LayerNorm(32, eps=1e-2).double()
    randomize(norm)
    x = double_noise(2, 5, 32)
    right = norm(x)
    unit = F.layer_norm(x, (32,), eps=norm.eps)
    for value, hint in [
        (x, "LayerNorm not applied"),
        (unit, "LayerNorm weight and bias not applied"),
        (unit + norm.bias, "LayerNorm weight not applied"),
        (unit * (1 + norm.weight) + norm.bias, "1 + weight instead of weight"),
        (norm(right), "LayerNorm applied twice"),
        (
            F.rms_norm(x, (32,), norm.weight, norm.eps) + norm.bias,
            "RMSNorm instead of LayerNorm (mean not subtracted)",
        ),
    ]:
        assert first_match(layer_norm_guesses(norm, x, right), value, right) == hint


@torch.no_grad()
def test_convolutions() -> None:
    conv = nn.Conv2d(3, 8, 2, stride=2).double()
    randomize(conv)
    x = double_noise(2, 3, 6, 6)
    for pixels, hint in [
        (x.flip(1), "channels reversed (BGR instead of RGB)"),
        (x.flip(3), "image mirrored"),
        ((x + 1) / 2, "pixels in [0, 1] instead of [-1, 1]"),
        ((x - 0.5) / 0.5, "pixels normalized twice"),
        (x.bfloat16().double(), "pixels rounded to bfloat16"),
        (((x + 1) / 2 - 0.1) / 0.2, ""),
    ]:
        assert first_match(convolution_guesses(conv, x), conv(pixels), conv(x)) == hint
    no_bias: Tensor = F.conv2d(x, conv.weight, None, conv.stride)
    hint = first_match(convolution_guesses(conv, x), no_bias, conv(x))
    assert hint == "convolution without bias"

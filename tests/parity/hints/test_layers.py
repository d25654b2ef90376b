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


@pytest.mark.parametrize(
    ("function", "hint"),
    [
        (F.gelu, "exact (erf) GELU"),
        (F.silu, "SiLU"),
        (lambda x: F.relu(x.half()).double(), "ReLU in float16"),
        (lambda x: x, "no activation"),
        (torch.tanh, ""),
    ],
)
def test_activations(function: object, hint: str) -> None:
    x = double_noise(2, 5, 32)
    assert callable(function)
    assert first_match(activation_guesses(x), function(x)) == hint


@torch.no_grad()
def test_layer_norms() -> None:
    norm = nn.LayerNorm(32, eps=1e-2).double()
    randomize(norm)
    x = double_noise(2, 5, 32)
    right = norm(x)
    unit = F.layer_norm(x, (32,), eps=norm.eps)
    for value, hint in [
        (x, "no LayerNorm"),
        (unit, "neither gain nor bias"),
        (unit + norm.bias, "no gain"),
        (unit * (1 + norm.weight) + norm.bias, "gain 1 + w"),
        (norm(right), "applied twice"),
        (
            F.rms_norm(x, (32,), norm.weight, norm.eps) + norm.bias,
            "RMSNorm: the mean is not taken out",
        ),
    ]:
        assert first_match(layer_norm_guesses(norm, x, right), value) == hint


@torch.no_grad()
def test_convolutions() -> None:
    conv = nn.Conv2d(3, 8, 2, stride=2).double()
    randomize(conv)
    x = double_noise(2, 3, 6, 6)
    for pixels, hint in [
        (x.flip(1), "channels reversed (BGR for RGB)"),
        (x.flip(3), "image mirrored"),
        ((x + 1) / 2, "pixels in [0, 1]"),
        ((x - 0.5) / 0.5, "pixels normalized twice"),
        (x.bfloat16().double(), "pixels rounded to bfloat16"),
        (((x + 1) / 2 - 0.1) / 0.2, ""),
    ]:
        assert first_match(convolution_guesses(conv, x), conv(pixels)) == hint
    no_bias: Tensor = F.conv2d(x, conv.weight, None, conv.stride)
    assert first_match(convolution_guesses(conv, x), no_bias) == "no bias"

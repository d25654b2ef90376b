"""A port of Whisper's encoder: Conv1d, sinusoidal positions, keys without bias."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from siglip_port.parity import Comparison, compare, randomize
from tests.parity.ports.common import (
    MLP,
    Attention,
    Bug,
    assert_first,
    change,
    in_float32,
    load,
    suitable,
)
from tests.parity.toy_models import float_noise

CONFIG = WhisperConfig(
    vocab_size=50,
    num_mel_bins=8,
    d_model=24,
    encoder_layers=2,
    encoder_attention_heads=3,
    encoder_ffn_dim=40,
    max_source_positions=10,
    attn_implementation="sdpa",
)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(24)
        self.attention = Attention(24, 3, fused=fused, key_bias=False)
        self.norm2 = nn.LayerNorm(24)
        self.mlp = MLP(24, 40, F.gelu)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        output: Tensor = x + self.mlp(self.norm2(x))
        return output


class Encoder(nn.Module):
    """Mel spectrograms [B, 8, 20] -> tokens [B, 10, D]."""

    def __init__(self, *, fused: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(8, 24, 3, padding=1)
        self.conv2 = nn.Conv1d(24, 24, 3, stride=2, padding=1)
        self.register_buffer("positions", torch.empty(10, 24))
        self.blocks = nn.ModuleList(Block(fused=fused) for _ in range(2))
        self.norm = nn.LayerNorm(24)
        self.activation = F.gelu

    def forward(self, features: Tensor) -> Tensor:
        x = self.activation(self.conv1(features))
        x = self.activation(self.conv2(x)).transpose(1, 2)
        x = x + self.get_buffer("positions")
        for block in self.blocks:
            x = block(x)
        output: Tensor = self.norm(x)
        return output


RENAMES = {
    "embed_positions.weight": "positions",
    "layers": "blocks",
    "self_attn_layer_norm": "norm1",
    "final_layer_norm": "norm2",
    "layer_norm": "norm",
    "self_attn.out_proj": "attention.out",
    "self_attn.": "attention.",
    "_proj.": ".",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
TAPS = {
    "conv1": "conv1",
    "conv2:input": "conv2:input",
    "conv2": "conv2",
    "layers.{}.self_attn_layer_norm:input": "blocks.{}.norm1:input",
    "layers.{}.self_attn_layer_norm": "blocks.{}.norm1",
    "layers.{}.self_attn.q_proj": "blocks.{}.attention.q",
    "layers.{}.self_attn.k_proj": "blocks.{}.attention.k",
    "layers.{}.self_attn.v_proj": "blocks.{}.attention.v",
    "layers.{}.self_attn.out_proj:input": "blocks.{}.attention.out:input",
    "layers.{}.self_attn": "blocks.{}.attention",
    "layers.{}.final_layer_norm": "blocks.{}.norm2",
    "layers.{}.fc1": "blocks.{}.mlp.fc1",
    "layers.{}.fc2:input": "blocks.{}.mlp.fc2:input",
    "layers.{}.fc2": "blocks.{}.mlp",
    "layer_norm": "norm",
}


@functools.cache
def reference() -> WhisperEncoder:
    model = WhisperEncoder(CONFIG).eval()
    randomize(model)
    return model


def make_port(*, fused: bool = False) -> Encoder:
    port = Encoder(fused=fused).eval()
    load(port, reference(), RENAMES)
    return port


def check(port: nn.Module) -> Comparison:
    return compare(
        reference(),
        port,
        float_noise(2, 8, 20),
        suitable(TAPS, port),
        call_reference=lambda model, x: {"output": model(x).last_hidden_state},
    )


@pytest.mark.parametrize("fused", [False, True])
def test_equal(fused: bool) -> None:
    comparison = check(make_port(fused=fused))
    assert comparison.equal, comparison


def test_float32_inside_is_equal() -> None:
    port = make_port()
    in_float32(port.conv2)
    comparison = check(port)
    assert comparison.equal, comparison


def tanh_gelu(port: Encoder) -> None:
    port.activation = functools.partial(F.gelu, approximate="tanh")


def features_shifted(port: Encoder) -> None:
    def shift(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0].roll(1, -1),)

    port.conv2.register_forward_pre_hook(shift)


def conv_bias_missing(port: Encoder) -> None:
    port.conv1.bias = None


def positions_missing(port: Encoder) -> None:
    port.get_buffer("positions").zero_()


def value_bias_missing(port: Encoder) -> None:
    change(port, "blocks.1.attention.v", bias=None)


def eps(port: Encoder) -> None:
    port.norm.eps = 1e-6


@pytest.mark.parametrize(
    ("bug", "place", "hint"),
    [
        (tanh_gelu, "conv2:input", "tanh GELU instead of exact (erf) GELU"),
        (features_shifted, "conv2:input", "features shifted by 1"),
        (conv_bias_missing, "conv1", "convolution without bias"),
        (positions_missing, "layers.0.self_attn_layer_norm:input", ""),
        (value_bias_missing, "layers.1.self_attn.v_proj", "Linear without bias"),
        (eps, "layer_norm", "eps 1e-06 instead of 1e-05"),
    ],
)
def test_bugs(bug: Bug, place: str, hint: str) -> None:
    port = make_port()
    bug(port)
    assert_first(check(port), place, hint)

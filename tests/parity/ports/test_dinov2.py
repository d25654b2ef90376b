"""A port of DINOv2: LayerScale, a class token, interpolated positions."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from siglip_port.parity import Comparison, compare, randomize
from tests.parity.ports.common import (
    MLP,
    Attention,
    Bug,
    assert_first,
    change,
    first_finding,
    in_float32,
    load,
    suitable,
)
from tests.parity.toy_models import float_noise

CONFIG = Dinov2Config(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    image_size=32,
    patch_size=8,
    attn_implementation="sdpa",
)


class LayerScale(nn.Module):
    """Factor per feature."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(24))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(24, eps=1e-6)
        self.attention = Attention(24, 3, fused=fused)
        self.scale1 = LayerScale()
        self.norm2 = nn.LayerNorm(24, eps=1e-6)
        self.mlp = MLP(24, 96, F.gelu)
        self.scale2 = LayerScale()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale1(self.attention(self.norm1(x)))
        output: Tensor = x + self.scale2(self.mlp(self.norm2(x)))
        return output


class Dinov2(nn.Module):
    """Images [B, 3, H, W] -> tokens [B, 1 + N, D]."""

    def __init__(self, *, fused: bool = False) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.empty(1, 1, 24))
        self.positions = nn.Parameter(torch.empty(1, 17, 24))
        self.patches = nn.Conv2d(3, 24, 8, stride=8)
        self.blocks = nn.ModuleList(Block(fused=fused) for _ in range(2))
        self.norm = nn.LayerNorm(24, eps=1e-6)
        self.interpolation = "bicubic"

    def forward(self, images: Tensor) -> Tensor:
        grid = self.patches(images)
        tokens = grid.flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(images), -1, -1), tokens], 1)
        x = x + self.resized_positions(*grid.shape[2:])
        for block in self.blocks:
            x = block(x)
        output: Tensor = self.norm(x)
        return output

    def resized_positions(self, height: int, width: int) -> Tensor:
        """Positions for a grid, [1, 1 + N, D], interpolated in float32 as by the reference."""
        if (height, width) == (4, 4):
            return self.positions
        grid = self.positions[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
        resized = F.interpolate(grid.float(), size=(height, width), mode=self.interpolation)
        resized = resized.to(grid.dtype).flatten(2).transpose(1, 2)
        return torch.cat([self.positions[:, :1], resized], 1)


RENAMES = {
    "embeddings.cls_token": "class_token",
    "embeddings.position_embeddings": "positions",
    "embeddings.patch_embeddings.projection": "patches",
    "encoder.layer.": "blocks.",
    "attention.o_proj": "attention.out",
    "_proj.": ".",
    "layer_scale": "scale",
    "lambda1": "gamma",
    "layernorm": "norm",
}
BLOCK = "encoder.layer.{}"
TAPS = {
    "embeddings.patch_embeddings.projection": "patches",
    "embeddings": "blocks.0.norm1:input",
    f"{BLOCK}.norm1": "blocks.{}.norm1",
    f"{BLOCK}.attention.q_proj": "blocks.{}.attention.q",
    f"{BLOCK}.attention.k_proj": "blocks.{}.attention.k",
    f"{BLOCK}.attention.v_proj": "blocks.{}.attention.v",
    f"{BLOCK}.attention.o_proj:input": "blocks.{}.attention.out:input",
    f"{BLOCK}.attention": "blocks.{}.attention",
    f"{BLOCK}.layer_scale1": "blocks.{}.scale1",
    f"{BLOCK}.norm2:input": "blocks.{}.norm2:input",
    f"{BLOCK}.norm2": "blocks.{}.norm2",
    f"{BLOCK}.mlp.fc1": "blocks.{}.mlp.fc1",
    f"{BLOCK}.mlp.activation_fn": "blocks.{}.mlp.fc2:input",
    f"{BLOCK}.mlp": "blocks.{}.mlp",
    f"{BLOCK}.layer_scale2": "blocks.{}.scale2",
    BLOCK: "blocks.{}",
    "layernorm": "norm",
}


@functools.cache
def reference() -> Dinov2Model:
    model = Dinov2Model(CONFIG).eval()
    randomize(model)
    return model


def make_port(*, fused: bool = False) -> Dinov2:
    port = Dinov2(fused=fused).eval()
    load(port, reference(), RENAMES)
    return port


def check(port: nn.Module, height: int = 32, width: int = 32) -> Comparison:
    return compare(
        reference(),
        port,
        float_noise(2, 3, height, width),
        suitable(TAPS, port),
        call_reference=lambda model, x: {"output": model(x).last_hidden_state},
    )


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
def test_equal(fused: bool, size: tuple[int, int]) -> None:
    comparison = check(make_port(fused=fused), *size)
    assert comparison.equal, comparison


def test_float32_inside_is_equal() -> None:
    port = make_port()
    in_float32(port.get_submodule("blocks.1.norm1"))
    comparison = check(port)
    assert comparison.equal, comparison


def scale_missing(port: Dinov2) -> None:
    change(port, "blocks.1", scale1=nn.Identity())


def scale_of_other_branch(port: Dinov2) -> None:
    other = port.get_parameter("blocks.0.scale1.gamma")
    port.get_parameter("blocks.0.scale2.gamma").data = other.data


def class_token_without_position(port: Dinov2) -> None:
    port.positions.data = port.positions.data.clone()
    port.positions.data[:, 0] = 0


def tanh_gelu(port: Dinov2) -> None:
    change(port, "blocks.1.mlp", activation=functools.partial(F.gelu, approximate="tanh"))


def scale_of_head(port: Dinov2) -> None:
    change(port, "blocks.1.attention", scale=24**-0.5)


def eps(port: Dinov2) -> None:
    port.norm.eps = 1e-5


@pytest.mark.parametrize(
    ("bug", "place", "hint"),
    [
        (scale_missing, "encoder.layer.1.layer_scale1", "Dinov2LayerScale not applied"),
        (scale_of_other_branch, "encoder.layer.0.layer_scale2", ""),
        (class_token_without_position, "embeddings", ""),
        (tanh_gelu, "encoder.layer.1.mlp.activation_fn", "tanh GELU instead of exact (erf) GELU"),
        (scale_of_head, "encoder.layer.1.attention.o_proj:input", "1/sqrt(embed_dim)"),
        (eps, "layernorm", "eps 1e-05 instead of 1e-06"),
    ],
)
def test_bugs(bug: Bug, place: str, hint: str) -> None:
    port = make_port()
    bug(port)
    assert_first(check(port), place, hint)


def test_other_interpolation() -> None:
    port = make_port()
    port.interpolation = "bilinear"
    assert check(port).equal
    assert first_finding(check(port, 24, 48)).reference == "embeddings"

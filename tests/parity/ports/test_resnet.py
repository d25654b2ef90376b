"""A port of ResNet: BatchNorm, whose statistics are buffers, strides and shortcuts."""

from __future__ import annotations

import functools

import pytest
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

from siglip_port.parity import Comparison, compare, randomize
from tests.parity.ports.common import Bug, assert_first, change, in_float32, load
from tests.parity.toy_models import float_noise

CONFIG = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic")


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    """Convolution and BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(outputs),
    )


class Block(nn.Module):
    """Two convolutions with a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = convolution(inputs, outputs, 3, stride)
        self.second = convolution(outputs, outputs, 3)
        self.shortcut = None
        if inputs != outputs or stride != 1:
            self.shortcut = convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return F.relu(self.second(F.relu(self.first(x))) + shortcut)


class ResNet(nn.Module):
    """Images [B, 3, H, W] -> features [B, 16, H / 8, W / 8] and their mean [B, 16, 1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = convolution(3, 8, 7, 2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.stages = nn.ModuleList(
            [
                nn.ModuleList([Block(8, 8, 1)]),
                nn.ModuleList([Block(8, 16, 2), Block(16, 16, 1)]),
            ]
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.pool(F.relu(self.stem(images)))
        for stage in self.stages:
            assert isinstance(stage, nn.ModuleList)
            for block in stage:
                x = block(x)
        return x, x.mean((2, 3), keepdim=True)


RENAMES = {
    "embedder.embedder": "stem",
    "encoder.stages": "stages",
    ".layers.": ".",
    "layer.0": "first",
    "layer.1": "second",
    "convolution": "0",
    "normalization": "1",
}
TAPS = {
    "embedder.embedder.convolution": "stem.0",
    "embedder.embedder.normalization": "stem.1",
    "embedder": "pool",
}
for block in ("0.layers.0", "1.layers.0", "1.layers.1"):
    port_block = f"stages.{block.replace('layers.', '')}"
    for i, part in enumerate(("first", "second")):
        TAPS[f"encoder.stages.{block}.layer.{i}.convolution"] = f"{port_block}.{part}.0"
        TAPS[f"encoder.stages.{block}.layer.{i}.normalization"] = f"{port_block}.{part}.1"
    TAPS[f"encoder.stages.{block}"] = port_block
TAPS["encoder.stages.1.layers.0.shortcut"] = "stages.1.0.shortcut"


@functools.cache
def reference() -> ResNetModel:
    model = ResNetModel(CONFIG).eval()
    randomize(model)
    return model


def make_port() -> ResNet:
    port = ResNet().eval()
    load(port, reference(), RENAMES)
    return port


def check(port: nn.Module) -> Comparison:
    def call_port(port: ResNet, images: Tensor) -> dict[str, Tensor]:
        features, pooled = port(images)
        return {"last_hidden_state": features, "pooler_output": pooled}

    return compare(reference(), port, float_noise(2, 3, 32, 40), TAPS, call_port=call_port)


def test_equal() -> None:
    comparison = check(make_port())
    assert comparison.equal, comparison


def test_float32_inside_is_equal() -> None:
    port = make_port()
    in_float32(port.stem[0])
    comparison = check(port)
    assert comparison.equal, comparison


def statistics_not_loaded(port: ResNet) -> None:
    port.get_buffer("stem.1.running_mean").zero_()
    port.get_buffer("stem.1.running_var").fill_(1)


def eps(port: ResNet) -> None:
    change(port, "stages.1.0.second.1", eps=1e-3)


def stride_in_second(port: ResNet) -> None:
    change(port, "stages.1.0.first.0", stride=(1, 1))
    change(port, "stages.1.0.second.0", stride=(2, 2))


def shortcut_missing(port: ResNet) -> None:
    shortcut = nn.Identity()
    shortcut.register_forward_hook(lambda _, args, output: output * 0)
    change(port, "stages.1.1", shortcut=shortcut)


def average_instead_of_max(port: ResNet) -> None:
    change(port, "", pool=nn.AvgPool2d(3, 2, 1).eval())


@pytest.mark.parametrize(
    ("bug", "place", "hint"),
    [
        (
            statistics_not_loaded,
            "embedder.embedder.normalization",
            "running mean and variance",
        ),
        (eps, "encoder.stages.1.layers.0.layer.1.normalization", "eps 0.001 instead of 1e-05"),
        (stride_in_second, "encoder.stages.1.layers.0.layer.0.convolution", ""),
        (shortcut_missing, "encoder.stages.1.layers.1", ""),
        (average_instead_of_max, "embedder", ""),
    ],
)
def test_bugs(bug: Bug, place: str, hint: str) -> None:
    port = make_port()
    bug(port)
    assert_first(check(port), place, hint)


def test_training_mode() -> None:
    comparison = check(make_port().train())
    assert "the port is in training mode" in str(comparison)

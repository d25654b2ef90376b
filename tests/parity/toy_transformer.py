"""A small transformer for the tests of the gates, and taps of all of its parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from siglip_port.parity import randomize
from siglip_port.parity.observe import ReferenceRun, run_reference
from siglip_port.parity.sides import Side
from siglip_port.parity.taps import Tap
from tests.parity.toy_models import float_noise

WIDTH = 16
BLOCKS = 3
BLOCK_PARTS = (
    "norm1:input",
    "norm1",
    "attention.q",
    "attention.k",
    "attention.v",
    "attention.out:input",
    "attention",
    "norm2:input",
    "norm2",
    "mlp.fc1",
    "mlp.fc2:input",
    "mlp",
)


class ToyAttention(nn.Module):
    """Attention with one head: [B, N, D] -> [B, N, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k = nn.Linear(WIDTH, WIDTH)
        self.v = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.num_heads = 1
        self.scale = WIDTH**-0.5

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q(x) @ self.k(x).mT * self.scale).softmax(-1)
        projected: Tensor = self.out(weights @ self.v(x))
        return projected


class ToyMLP(nn.Module):
    """Two Linears with GELU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, 2 * WIDTH)
        self.activation = nn.GELU()
        self.fc2 = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(self.activation(self.fc1(x)))
        return x


class ToyBlock(nn.Module):
    """Attention and MLP, each after a LayerNorm and with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attention = ToyAttention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = ToyMLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class ToyTransformer(nn.Module):
    """Transformer with random weights: [B, N, 4] -> `tokens` [B, N, D] and `pooled` [B, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList([ToyBlock() for _ in range(BLOCKS)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)
        randomize(self)
        self.eval()

    def encode(self, x: Tensor) -> Tensor:
        """Run the blocks."""
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        tokens = self.norm(self.encode(self.embed(x)))
        return {"tokens": tokens, "pooled": self.head(tokens.mean(1))}


def toy_points() -> list[str]:
    """Return all points, in order of computation."""
    points = ["embed"]
    for i in range(BLOCKS):
        points += [f"blocks.{i}.{part}" for part in BLOCK_PARTS]
        points.append(f"blocks.{i}")
    return [*points, "norm:input", "norm", "head"]


def toy_taps() -> list[Tap]:
    """Pair every point with itself."""
    return [Tap(point, point) for point in toy_points()]


def toy_run(dtype: torch.dtype = torch.float32, points: list[str] | None = None) -> ReferenceRun:
    """Run the reference."""
    if points is None:
        points = toy_points()
    return run_reference(Side(ToyTransformer()), float_noise(4, 12, 4), points, dtype)

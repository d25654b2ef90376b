"""Small modules for the tests of the gates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from siglip_port.parity import randomize


class ToyEncoder(nn.Module):
    """Convolution with stride 2, which ignores the last row and column, then LayerNorm.

    [B, 3, 5, 5] -> [B, 4, 8].
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 2, stride=2)
        self.norm = nn.LayerNorm(8)
        randomize(self)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.norm(self.conv(x).flatten(2).transpose(1, 2))
        return tokens


def toy_images() -> Tensor:
    """Three images for `ToyEncoder`: [3, 3, 5, 5]."""
    return torch.randn(3, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def float_noise(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal noise, float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def double_noise(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal noise, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)

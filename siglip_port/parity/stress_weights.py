"""Random weights on which porting bugs show.

A fresh initialization hides bugs: biases are 0, LayerNorms are the identity and attention is nearly
uniform, so that a missing, swapped or repeated parameter changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 1234) -> None:
    """Fill all parameters of a module in place, such that none is 0 or 1 and every one matters.

    Linear weights are N(0, 1 / fan_in), biases 0.3 N(0, 1); LayerNorm weights exp(0.5 N(0, 1)), a
    tenth of them negative, LayerNorm biases 0.5 N(0, 1); embeddings 0.7 N(0, 1); convolutions
    1.5 N(0, 1) / sqrt(fan_in); everything else N(0, 1).

    Args:
        module: Port, reference, or a part of either. Parameters are drawn in the order of
            `named_modules` and keep their dtype.
        seed: Seed of a separate generator; the global one is not touched.
    """
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            parameter.copy_(draw(part, name, parameter.shape, generator))


def draw(part: nn.Module, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draw one parameter of a module, float32."""
    values = torch.randn(shape, generator=generator)
    if isinstance(part, nn.LayerNorm):
        if name != "weight":
            return 0.5 * values
        negative = torch.rand(shape, generator=generator) < 0.1
        return torch.exp(0.5 * values) * torch.where(negative, -1.0, 1.0)
    if name.endswith("bias"):
        return 0.3 * values
    if isinstance(part, nn.Embedding):
        return 0.7 * values
    if name.endswith("weight"):  # of a Linear, a convolution, or `in_proj_weight`
        gain = 1.5 if isinstance(part, nn.Conv2d) else 1.0
        scale: float = gain * values[0].numel() ** -0.5
        return values * scale
    return values

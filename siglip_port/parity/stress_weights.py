"""Random weights on which the bugs of a port are loud.

A freshly initialized model hides bugs: its biases are 0, its LayerNorms the identity and its
attention almost uniform, so that whatever forgets, swaps or repeats one of them goes unseen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 1234) -> None:
    """Fill all parameters of a module, so that nothing is zero, nothing is one, and all matters.

    Linear weights N(0, 1 / fan_in); biases 0.3 N; LayerNorm gains exp(0.5 N), a tenth of them
    negative, and biases 0.5 N; position embeddings 0.7 N; patch convolution 1.5 N / sqrt(fan_in);
    anything else N(0, 1).

    Args:
        module: the port, the reference, or any part of either. Parameters are drawn in the order of
            `named_modules`, and changed in place, in their own dtype.
        seed: of a generator of its own; the global one is not touched.
    """
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            parameter.copy_(draw(part, name, parameter.shape, generator))


def draw(part: nn.Module, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draw one parameter of a module."""
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

"""Random weights on which the mistakes of a port are loud."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 1234) -> None:
    """Fills all parameters of `module` with recipe N1: nothing is zero, nothing is one, every part matters.

    A freshly initialised tower hides bugs: its biases are 0, its LayerNorms the identity and its attention almost
    uniform, so that whatever forgets, swaps or repeats one of them goes unseen. N1, from the survey that this
    project started with: linear weights N(0, 1 / fan_in); biases 0.3 N; LayerNorm gains exp(0.5 N), a tenth of them
    negative, and biases 0.5 N; position embeddings 0.7 N; patch convolution 1.5 N / sqrt(fan_in); anything else,
    which is the pooling probe, N(0, 1).

    Args:
        module: the port, the reference, or any part of either. Parameters are drawn in the order of
            `named_modules`, and changed in place, in their own dtype.
        seed: of a generator of its own; the global one is not touched.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            values = normal(parameter)
            if isinstance(part, nn.LayerNorm):
                if name == "weight":
                    negative = torch.rand(parameter.shape, generator=generator) < 0.1
                    values = torch.exp(0.5 * values) * torch.where(negative, -1.0, 1.0)
                else:
                    values *= 0.5
            elif name.endswith("bias"):
                values *= 0.3
            elif isinstance(part, nn.Embedding):
                values *= 0.7
            elif name.endswith("weight"):  # of a Linear, a convolution, or `in_proj_weight`
                values *= (1.5 if isinstance(part, nn.Conv2d) else 1.0) * values[0].numel() ** -0.5
            parameter.copy_(values)

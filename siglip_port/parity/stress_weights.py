"""Random weights on which porting bugs show.

A fresh initialization hides bugs: biases are 0, LayerNorms are the identity and attention is nearly
uniform, so that a missing, swapped or repeated parameter changes nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
GAIN_NAMES = ("weight", "gamma", "scale", "lambda")


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 1234) -> None:
    """Fill all parameters of a module in place, such that none is 0 or 1 and every one matters.

    Linear weights are N(0, 1 / fan_in), biases 0.3 N(0, 1); weights of norms and LayerScales
    exp(0.5 N(0, 1)), a tenth of them negative, biases of norms 0.5 N(0, 1); embeddings
    0.7 N(0, 1); convolutions 1.5 N(0, 1) / sqrt(fan_in); numbers, such as a logit scale,
    1.5 + 0.3 N(0, 1); everything else N(0, 1). Running means of BatchNorms are 0.5 N(0, 1), running
    variances exp(0.5 N(0, 1)). All other buffers are left as they are.

    Args:
        module: Port, reference, or a part of either. Parameters are drawn in the order of
            `named_modules` and keep their dtype; shared ones are drawn once.
        seed: Seed of a separate generator; the global one is not touched.
    """
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if id(parameter) not in done and parameter.is_floating_point():
                fill(parameter, draw(part, name, parameter.shape, generator))
            done.add(id(parameter))
        for name, buffer in statistics_of(part).items():
            fill(buffer, draw_statistics(name, buffer.shape, generator))


def fill(tensor: Tensor, values: Tensor) -> None:
    """Copy values to a tensor in place; those that are 0 or 1 in its dtype become 0.5 and 1.5."""
    tensor.copy_(values)
    tensor[(tensor == 0) | (tensor == 1)] += 0.5


def draw(part: nn.Module, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draw one parameter of a module, float32."""
    values = torch.randn(shape, generator=generator)
    is_norm = isinstance(part, NORMS)
    if is_norm and name != "weight":
        return 0.5 * values
    if name.endswith("bias"):
        return 0.3 * values
    if values.ndim == 0:
        return 1.5 + 0.3 * values
    if is_norm or (values.ndim == 1 and any(word in name for word in GAIN_NAMES)):
        negative = torch.rand(shape, generator=generator) < 0.1
        return torch.exp(0.5 * values) * torch.where(negative, -1.0, 1.0)
    if isinstance(part, nn.Embedding):
        return 0.7 * values
    if "weight" in name:  # of a Linear, a convolution, or `in_proj_weight`
        gain = 1.5 if isinstance(part, _ConvNd) else 1.0
        scale: float = gain * fan_in(part, values) ** -0.5
        return values * scale
    return values


def fan_in(part: nn.Module, weight: Tensor) -> float:
    """Return the number of inputs of every output of a Linear or a convolution."""
    if isinstance(part, _ConvTransposeNd):  # [in, out / groups, ...]; strides spread the inputs
        per_channel = weight[0, 0].numel() / math.prod(part.stride)
        return len(weight) / part.groups * per_channel
    return weight[0].numel()


def statistics_of(part: nn.Module) -> dict[str, Tensor]:
    """Return the running statistics of a BatchNorm; with its parameters, if these are buffers."""
    buffers = dict(part.named_buffers(recurse=False))
    if not {"running_mean", "running_var"} <= buffers.keys():
        return {}
    names = ("running_mean", "running_var", "weight", "bias")
    return {name: buffers[name] for name in names if name in buffers}


def draw_statistics(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draw a buffer of a BatchNorm, float32."""
    values = torch.randn(shape, generator=generator)
    if name in ("running_var", "weight"):
        return torch.exp(0.5 * values)
    return 0.5 * values

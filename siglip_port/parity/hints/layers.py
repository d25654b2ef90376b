"""Guesses for single layers: activations, LayerNorms, Linears and convolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from siglip_port.parity.hints.guess import NARROW_DTYPES, Guess, explains, matches, round_to
from siglip_port.parity.sides import dtype_name

CHANNEL_STATISTICS = {
    "CLIP": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and std of the channels with which other models normalize pixels in [0, 1]."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "exact (erf) GELU": F.gelu,
    "tanh GELU": lambda x: F.gelu(x, approximate="tanh"),
    "QuickGELU (x * sigmoid(1.702 x))": lambda x: x * torch.sigmoid(1.702 * x),
    "SiLU": F.silu,
    "ReLU": F.relu,
    "no activation": lambda x: x,
}


def activation_guesses(x: Tensor, exact: Tensor) -> Iterator[Guess]:
    """Yield `x` with other activations, or with an activation in a narrower dtype.

    Args:
        x: Input of the activation, float64.
        exact: Output of the reference's activation.
    """
    expected = ""
    for label, function in ACTIVATIONS.items():
        if not expected and matches(function(x), exact):
            expected = label
    for label, function in ACTIVATIONS.items():
        instead = f" instead of {expected}" if expected and label != expected else ""
        yield f"{label}{instead}", function(x)
        for dtype in NARROW_DTYPES:
            name = dtype_name(dtype)
            yield f"{label} in {name}{instead}", function(x.to(dtype)).double()


def layer_norm_guesses(norm: nn.LayerNorm, x: Tensor, exact: Tensor) -> Iterator[Guess]:
    """Yield other normalizations of the input of a LayerNorm.

    Args:
        norm: The reference's LayerNorm.
        x: Input of the LayerNorm, [..., D].
        exact: Output of the LayerNorm, [..., D].
    """
    eps = norm.eps
    gain = norm.weight
    bias = norm.bias
    mean = x.mean(-1, keepdim=True)
    variance = x.var(-1, keepdim=True, correction=0)
    centered = x - mean
    sample_variance = x.var(-1, keepdim=True)
    mean_square = x.square().mean(-1, keepdim=True)
    normalized = centered / (variance + eps).sqrt()

    yield "LayerNorm not applied", x
    yield "sample variance (N - 1)", centered / (sample_variance + eps).sqrt() * gain + bias
    yield "eps outside the square root", centered / (variance.sqrt() + eps) * gain + bias
    yield (
        "RMSNorm instead of LayerNorm (mean not subtracted)",
        x / (mean_square + eps).sqrt() * gain + bias,
    )
    yield "LayerNorm weight not applied", normalized + bias
    yield "LayerNorm bias not applied", normalized * gain
    yield "LayerNorm weight and bias not applied", normalized
    yield "1 + weight instead of weight", normalized * (1 + gain) + bias
    yield "LayerNorm applied twice", F.layer_norm(exact, norm.normalized_shape, gain, bias, eps)
    yield "mean subtracted, but not divided by the standard deviation", centered * gain + bias
    for dtype in NARROW_DTYPES:
        narrow = F.layer_norm(
            x.to(dtype), norm.normalized_shape, gain.to(dtype), bias.to(dtype), eps
        )
        yield f"LayerNorm in {dtype_name(dtype)}", narrow.double()


def fitted_eps(norm: nn.LayerNorm, x: Tensor, value: Tensor, exact: Tensor) -> str:
    """Solve a LayerNorm for the eps of the port.

    Args:
        norm: The reference's LayerNorm.
        x: Input of the LayerNorm, [..., D].
        value: The port's output, [..., D].
        exact: The reference's output, [..., D].

    Returns:
        The hint; empty if no eps reproduces the port's values.
    """
    normalized = (value - norm.bias) / norm.weight
    mean = x.mean(-1, keepdim=True)
    variance = x.var(-1, keepdim=True, correction=0)
    factor = (normalized * (x - mean)).mean(-1, keepdim=True) / variance  # 1 / sqrt(var + eps)
    eps = float((factor**-2 - variance).median())
    round_eps = float(f"{eps:.0e}")  # code has round numbers
    if abs(eps - round_eps) < 1e-3 * abs(round_eps):
        eps = round_eps
    if eps < 0:
        return ""
    fitted = F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, eps)
    if not explains(fitted, value, exact):
        return ""
    return f"eps {eps:.3g} instead of {norm.eps:g}"


def linear_guesses(weight: Tensor, bias: Tensor | None, x: Tensor) -> Iterator[Guess]:
    """Yield other results of a Linear for the same input."""
    yield "Linear without bias", F.linear(x, weight)
    yield "Linear not applied", x
    if bias is not None:
        yield "bias only, weight not applied", bias.expand(*x.shape[:-1], -1)
        yield "bias added twice", F.linear(x, weight, 2 * bias)
        yield "bias subtracted instead of added", F.linear(x, weight, -bias)
    if weight.shape[0] == weight.shape[1]:
        yield "weight transposed", F.linear(x, weight.T, bias)
    parameters = "weight" if bias is None else "weight and bias"
    for dtype in NARROW_DTYPES:
        name = dtype_name(dtype)
        narrow_weight = round_to(weight, dtype)
        narrow_bias = None if bias is None else round_to(bias, dtype)
        yield f"{parameters} rounded to {name}", F.linear(x, narrow_weight, narrow_bias)
        yield f"weight rounded to {name}", F.linear(x, narrow_weight, bias)
        yield f"input rounded to {name}", F.linear(round_to(x, dtype), weight, bias)
    normalized = F.layer_norm(x, x.shape[-1:])
    yield "extra LayerNorm of the input", F.linear(normalized, weight, bias)


def convolution_guesses(conv: nn.Conv2d, x: Tensor) -> Iterator[Guess]:
    """Yield other convolutions, or convolutions of other pixels, for `x` [B, C, H, W]."""

    def convolve(pixels: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(pixels, weight, bias, conv.stride)

    weight = conv.weight
    bias = conv.bias
    yield "convolution without bias", convolve(x, weight, None)
    for label, kernel in kernel_guesses(weight):
        yield label, convolve(x, kernel, bias)
    for label, pixels in pixel_guesses(x):
        yield label, convolve(pixels, weight, bias)
    parameters = "weight" if bias is None else "weight and bias"
    for dtype in NARROW_DTYPES:
        name = dtype_name(dtype)
        narrow_bias = None if bias is None else round_to(bias, dtype)
        yield f"pixels rounded to {name}", convolve(round_to(x, dtype), weight, bias)
        narrow = convolve(x, round_to(weight, dtype), narrow_bias)
        yield f"{parameters} rounded to {name}", narrow
    yield "pixels quantized to 8 bits", convolve(quantize(x), weight, bias)
    yield "pixels normalized twice", convolve((x - 0.5) / 0.5, weight, bias)


def kernel_guesses(weight: Tensor) -> Iterator[Guess]:
    """Yield kernels [D, C, P, P] with axes in another order."""
    channels, height, width = weight.shape[1:]
    channels_last = weight.flatten(1).unflatten(1, (height, width, channels))
    yield "channels reversed (BGR instead of RGB)", weight.flip(1)
    yield "kernel transposed (x and y swapped)", weight.transpose(2, 3)
    yield "kernel flipped along x and y", weight.flip(2, 3)
    yield "kernel read as [H, W, C] instead of [C, H, W]", channels_last.permute(0, 3, 1, 2)


def pixel_guesses(x: Tensor) -> Iterator[Guess]:
    """Yield pixels [B, C, H, W] that are moved, or normalized to another range than [-1, 1]."""
    yield "image transposed (x and y swapped)", x.transpose(2, 3)
    yield "image mirrored", x.flip(3)
    yield "image shifted by one pixel", x.roll((1, 1), (2, 3))
    yield "pixels in [0, 1] instead of [-1, 1]", (x + 1) / 2
    yield "pixels in [0, 255] instead of [-1, 1]", (x + 1) / 2 * 255
    yield "pixels divided by 256 instead of 255", (x + 1) * 255 / 256 - 1
    for name, (mean, std) in CHANNEL_STATISTICS.items():
        if x.shape[1] == len(mean):
            offset = torch.tensor(mean, dtype=x.dtype, device=x.device)[:, None, None]
            scale = torch.tensor(std, dtype=x.dtype, device=x.device)[:, None, None]
            yield f"pixels normalized with {name}'s mean and std", ((x + 1) / 2 - offset) / scale


def quantize(x: Tensor) -> Tensor:
    """Round pixels in [-1, 1] to 256 levels."""
    return ((x + 1) * 127.5).round() / 127.5 - 1

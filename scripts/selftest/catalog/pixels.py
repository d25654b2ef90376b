"""Pixels: the port gets other pixels than the reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scripts.selftest.catalog.edits import change_input, round_to
from scripts.selftest.mutant import Mutant


def pixel(
    name: str, description: str, function: Callable[[Tensor], Tensor], source: str = "variant"
) -> Mutant:
    """Change the pixel values."""
    return Mutant(name, description, "patch inputs", source=source, edit=change_input(function))


def renormalize(
    mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Callable[[Tensor], Tensor]:
    """Return a function that normalizes with other mean and std than 0.5."""

    def function(pixel_values: Tensor) -> Tensor:
        center = torch.tensor(mean, dtype=pixel_values.dtype)[:, None, None]
        scale = torch.tensor(std, dtype=pixel_values.dtype)[:, None, None]
        return ((pixel_values + 1) / 2 - center) / scale

    return function


PIXELS = [
    pixel(
        "input_bgr",
        "BGR instead of RGB",
        lambda x: x.flip(1),
        "PaddlePaddle/PaddleClas#1312; Mikubill/sd-webui-controlnet#2735",
    ),
    pixel("input_transposed", "x and y swapped", lambda x: x.transpose(2, 3)),
    pixel(
        "input_0_1",
        "not normalized",
        lambda x: (x + 1) / 2,
        "vllm-project/semantic-router#1928; End2End-Diffusion/iREPA#8",
    ),
    pixel("input_0_255", "not rescaled", lambda x: (x + 1) * 127.5),
    pixel(
        "input_clip_mean_std",
        "CLIP's mean and std",
        renormalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        "mlfoundations/open_clip#204; huggingface/transformers#38318",
    ),
    pixel(
        "input_imagenet_mean_std",
        "ImageNet's mean and std",
        renormalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "huggingface/transformers#20995",
    ),
    pixel(
        "input_normalized_twice",
        "normalized twice",
        lambda x: (x - 0.5) / 0.5,
        "real-stanford/diffusion_policy#112",
    ),
    pixel("input_256", "divided by 256 instead of 255", lambda x: (x + 1) * 255 / 256 - 1),
    pixel(
        "input_bf16",
        "pixels cast to bfloat16",
        round_to(torch.bfloat16),
        "TensorAuto/OpenTau#482",
    ),
    pixel(
        "input_uint8",
        "pixels quantized to 8 bits",
        lambda x: ((x + 1) * 127.5).round() / 127.5 - 1,
    ),
    pixel("input_shifted", "images shifted by one pixel", lambda x: x.roll((1, 1), (2, 3))),
    pixel("input_mirrored", "images mirrored", lambda x: x.flip(3)),
    pixel("input_batch_reversed", "images in reverse order", lambda x: x.flip(0)),
]

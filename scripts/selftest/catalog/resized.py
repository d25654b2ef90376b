"""Positions interpolated for images of another size."""

from __future__ import annotations

from torch import Tensor, nn

from scripts.selftest.catalog.naflex import Rule, crop_or_pad, resize_nearest, transpose_rule
from scripts.selftest.mutant import Mutant, Patch, replace, replace_item
from siglip_port import patches


def resized(name: str, description: str, patch: Patch, source: str = "variant") -> Mutant:
    """Build a mutant of the interpolation of positions."""
    return Mutant(name, description, "embeddings", source=source, patch=patch, subject="resized")


def interpolate(rule: Rule) -> Patch:
    """Replace the interpolation rule."""
    return replace_item(patches.INTERPOLATION_RULES, "hf", rule)


def resize_by_factor(grid: Tensor, size: tuple[int, int], mode: str, **options: bool) -> Tensor:
    """Resize by a scale factor 0.1 patches too large."""
    height, width, _ = grid.shape
    factors = ((size[0] + 0.1) / height, (size[1] + 0.1) / width)
    image = grid.permute(2, 0, 1)[None]
    return nn.functional.interpolate(image, scale_factor=factors, mode=mode)[0].permute(1, 2, 0)


def resize_in_bfloat16(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Round positions before and after resizing."""
    resized = patches.resize_grid(grid.bfloat16(), size, "bicubic", antialias=False)
    return resized.to(grid.dtype)


RESIZED = [
    resized(
        "interp_bilinear",
        "bilinear instead of bicubic",
        interpolate(
            lambda grid, size: patches.resize_grid(grid, size, "bilinear", antialias=False)
        ),
        "huggingface/pytorch-image-models#2542; Blaizzy/mlx-vlm#2266",
    ),
    resized(
        "interp_nearest",
        "nearest instead of bicubic",
        replace(patches, "resize_grid", resize_nearest),
    ),
    resized(
        "interp_align_corners",
        "align_corners",
        interpolate(
            lambda grid, size: patches.resize_grid(
                grid, size, "bicubic", align_corners=True, antialias=False
            )
        ),
        "ggml-org/llama.cpp#25781",
    ),
    resized(
        "interp_antialias",
        "antialias",
        interpolate(lambda grid, size: patches.resize_grid(grid, size, "bicubic", antialias=True)),
        "openvinotoolkit/openvino.genai#4444",
    ),
    resized(
        "interp_swapped",
        "height and width swapped",
        interpolate(
            lambda grid, size: patches.resize_grid(grid, size[::-1], "bicubic", antialias=False)
        ),
    ),
    resized(
        "interp_scale_factor",
        "scale factor (plus 0.1) instead of the size",
        replace(patches, "resize_grid", resize_by_factor),
        "facebookresearch/dinov2#582; huggingface/transformers#41380",
    ),
    resized(
        "interp_columns",
        "resized positions in column-major order",
        interpolate(transpose_rule(patches.interpolate_as_transformers)),
    ),
    resized(
        "interp_bf16",
        "positions resized in bfloat16",
        interpolate(resize_in_bfloat16),
        "TensorAuto/OpenTau#483",
    ),
    resized("interp_not", "positions truncated, not resized", interpolate(crop_or_pad("constant"))),
]

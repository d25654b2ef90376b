"""Positions interpolated for images of another size."""

from __future__ import annotations

from torch import Tensor, nn

from scripts.selftest.catalog.naflex import Rule, crop_or_pad, resize_nearest, transpose_rule
from scripts.selftest.mutant import Mutant, Patch, replace, replace_item
from siglip_port import patches


def resized(name: str, description: str, patch: Patch, source: str = "variant") -> Mutant:
    """Change how positions are interpolated for images of another size."""
    return Mutant(name, description, "embeddings", source=source, patch=patch, subject="resized")


def interpolate(rule: Rule) -> Patch:
    """Interpolate positions by another rule than transformers'."""
    return replace_item(patches.INTERPOLATION_RULES, "hf", rule)


def resize_by_factor(grid: Tensor, size: tuple[int, int], mode: str, **options: bool) -> Tensor:
    """Resize by a factor that is a tenth of a patch too large."""
    height, width, _ = grid.shape
    factors = ((size[0] + 0.1) / height, (size[1] + 0.1) / width)
    image = grid.permute(2, 0, 1)[None]
    return nn.functional.interpolate(image, scale_factor=factors, mode=mode)[0].permute(1, 2, 0)


def resize_in_bfloat16(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Round positions before they are resized, and after."""
    resized = patches.resize_grid(grid.bfloat16(), size, "bicubic", antialias=False)
    return resized.to(grid.dtype)


RESIZED = [
    resized(
        "interp_bilinear",
        "bilinear for bicubic",
        interpolate(
            lambda grid, size: patches.resize_grid(grid, size, "bilinear", antialias=False)
        ),
        "huggingface/pytorch-image-models#2542; Blaizzy/mlx-vlm#2266",
    ),
    resized(
        "interp_nearest", "nearest for bicubic", replace(patches, "resize_grid", resize_nearest)
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
        "height for width",
        interpolate(
            lambda grid, size: patches.resize_grid(grid, size[::-1], "bicubic", antialias=False)
        ),
    ),
    resized(
        "interp_scale_factor",
        "a scale factor with 0.1 added for the size",
        replace(patches, "resize_grid", resize_by_factor),
        "facebookresearch/dinov2#582; huggingface/transformers#41380",
    ),
    resized(
        "interp_columns",
        "resized positions read in columns",
        interpolate(transpose_rule(patches.interpolate_as_transformers)),
    ),
    resized(
        "interp_bf16",
        "positions resized in bfloat16",
        interpolate(resize_in_bfloat16),
        "TensorAuto/OpenTau#483",
    ),
    resized("interp_not", "positions cut off, not resized", interpolate(crop_or_pad("constant"))),
]

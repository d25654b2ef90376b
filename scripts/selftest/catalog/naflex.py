"""Packed patches of images of several shapes (NaFlex)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from scripts.selftest.mutant import Mutant, Patch, replace, replace_item, wrap
from siglip_port import SigLipVisionModel, patches
from siglip_port.model import VisionEmbeddings
from siglip_port.patches import Mask, Shapes

Rule = Callable[[Tensor, tuple[int, int]], Tensor]
"""[h, w, D], (H, W) -> [H, W, D]."""


def naflex(
    name: str, description: str, locations: str, patch: Patch, source: str = "variant"
) -> Mutant:
    """Build a mutant for packed patches."""
    return Mutant(name, description, locations, source=source, patch=patch, subject="naflex")


def change_mask(function: Callable[[Tensor], Tensor]) -> Patch:
    """Change the mask [B, N] of the blocks; the pooling head gets the correct one."""

    def attention_mask(
        original: Callable[..., Tensor], tokens: Tensor, mask: Mask, shapes: Shapes
    ) -> Tensor:
        if mask is not None:
            mask = function(mask)
        return original(tokens, mask, shapes)

    return wrap(patches, "attention_mask", attention_mask)


def pool_all(pool: Callable[..., Tensor], model: object, tokens: Tensor, *_: Mask) -> Tensor:
    """Pool padding, too."""
    return pool(model, tokens)


def pool_padding(
    pool: Callable[..., Tensor], model: object, tokens: Tensor, mask: Mask = None
) -> Tensor:
    """Pool padding only, where there is any."""
    if mask is not None and not mask.bool().all():
        mask = ~mask.bool()
    return pool(model, tokens, mask)


def interpolate(rule: Rule) -> Patch:
    """Replace the interpolation of NaFlex positions, in float32 as in the reference."""

    def interpolate_in_float32(grid: Tensor, size: tuple[int, int]) -> Tensor:
        return rule(grid.float(), size).to(grid.dtype)

    return replace_item(patches.INTERPOLATION_RULES, "naflex", interpolate_in_float32)


def resize_nearest(grid: Tensor, size: tuple[int, int], mode: str, **options: bool) -> Tensor:
    """Use nearest-neighbor interpolation in every mode."""
    image = grid.permute(2, 0, 1)[None]
    return nn.functional.interpolate(image, size, mode="nearest")[0].permute(1, 2, 0)


def crop_or_pad(mode: str) -> Rule:
    """Return a rule that crops or pads the positions of a 5 x 5 grid."""

    def rule(grid: Tensor, size: tuple[int, int]) -> Tensor:
        height, width = size
        padding = (0, max(0, width - 5), 0, max(0, height - 5))
        padded = nn.functional.pad(grid.permute(2, 0, 1), padding, mode=mode)
        return padded[:, :height, :width].permute(1, 2, 0)

    return rule


def transpose_rule(rule: Rule) -> Rule:
    """Return a rule with positions in column-major order."""
    return lambda grid, size: rule(grid, size).transpose(0, 1)


def swap_sides(
    positions: Callable[..., Tensor], embeddings: VisionEmbeddings, height: int, width: int
) -> Tensor:
    """Swap height and width."""
    return positions(embeddings, width, height)


def project_channel_first(
    embeddings: VisionEmbeddings,
    pixel_values: Tensor,
    spatial_shapes: Shapes,
) -> Tensor:
    """Read packed patches as (channel, y, x)."""
    kernel = embeddings.patch_embedding.weight.flatten(1)
    tokens = nn.functional.linear(
        pixel_values.to(kernel.dtype), kernel, embeddings.patch_embedding.bias
    )
    shapes = patches.shape_pairs(spatial_shapes)
    positions = [embeddings.padded_positions(h, w, tokens.shape[1]) for h, w in shapes]
    return tokens + torch.stack(positions)


def use_first_shape(
    embed_packed: Callable[..., Tensor],
    embeddings: VisionEmbeddings,
    pixel_values: Tensor,
    spatial_shapes: Tensor,
) -> Tensor:
    """Use the positions of the first image's shape for all."""
    return embed_packed(embeddings, pixel_values, spatial_shapes[:1].expand_as(spatial_shapes))


def pad_with_zeros(embeddings: VisionEmbeddings, height: int, width: int, count: int) -> Tensor:
    """Use zero positions for padding."""
    positions = embeddings.positions(height, width)
    return nn.functional.pad(positions, (0, 0, 0, count - height * width))


NAFLEX = [
    naflex(
        "naflex_mask_ignored",
        "padding not masked",
        "context",
        replace(patches, "attention_mask", lambda tokens, mask, shapes: None),
        "Blaizzy/mlx-vlm#2266",
    ),
    naflex(
        "naflex_mask_inverted",
        "mask inverted: only padding attended to",
        "context",
        change_mask(lambda mask: ~mask.bool()),
    ),
    naflex(
        "naflex_mask_off_by_one",
        "last patch masked too",
        "context",
        change_mask(lambda mask: mask.bool() & mask.bool().roll(-1, 1)),
    ),
    naflex(
        "naflex_mask_of_first",
        "mask of the first image used for all",
        "context inputs",
        change_mask(lambda mask: mask[:1].expand_as(mask)),
    ),
    naflex(
        "naflex_head_unmasked",
        "padding not masked in the pooling head",
        "head-context",
        wrap(SigLipVisionModel, "pool", pool_all),
    ),
    naflex(
        "naflex_positions_swapped",
        "height and width swapped in the position grid",
        "embeddings",
        wrap(VisionEmbeddings, "positions", swap_sides),
        "pytorch/torchtitan#4244",
    ),
    naflex(
        "naflex_positions_columns",
        "positions in column-major order",
        "embeddings",
        replace_item(
            patches.INTERPOLATION_RULES, "naflex", transpose_rule(patches.interpolate_as_naflex)
        ),
    ),
    naflex(
        "naflex_patches_channel_first",
        "patches read as (channel, y, x) instead of (y, x, channel)",
        "embeddings 0.in",
        replace(VisionEmbeddings, "embed_packed", project_channel_first),
        "huggingface/transformers#36475",
    ),
    naflex(
        "naflex_bicubic",
        "bicubic instead of bilinear",
        "embeddings",
        interpolate(lambda grid, size: patches.resize_grid(grid, size, "bicubic", antialias=True)),
        "huggingface/pytorch-image-models#2542",
    ),
    naflex(
        "naflex_no_antialias",
        "no antialias",
        "embeddings",
        interpolate(
            lambda grid, size: patches.resize_grid(grid, size, "bilinear", antialias=False)
        ),
        "openvinotoolkit/openvino.genai#4444; keras-team/keras-hub#2113",
    ),
    naflex(
        "naflex_align_corners",
        "align_corners",
        "embeddings",
        interpolate(
            lambda grid, size: patches.resize_grid(
                grid, size, "bilinear", align_corners=True, antialias=True
            )
        ),
        "ggml-org/llama.cpp#25781",
    ),
    naflex(
        "naflex_nearest",
        "nearest instead of bilinear",
        "embeddings",
        replace(patches, "resize_grid", resize_nearest),
    ),
    naflex(
        "naflex_padding_zero",
        "zero instead of the first position at padding",
        "embeddings",
        replace(VisionEmbeddings, "padded_positions", pad_with_zeros),
    ),
    naflex(
        "naflex_shape_of_first",
        "shape of the first image used for all",
        "embeddings inputs",
        wrap(VisionEmbeddings, "embed_packed", use_first_shape),
    ),
    naflex(
        "naflex_positions_cropped",
        "positions cropped, not resized",
        "embeddings",
        interpolate(crop_or_pad("replicate")),
    ),
]

"""Patches and positions of images of the checkpoint's size."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from scripts.selftest.catalog import seams
from scripts.selftest.catalog.edits import CONVOLUTION, POSITIONS, change
from scripts.selftest.catalog.projections import loaded
from scripts.selftest.catalog.seams import convolve
from scripts.selftest.mutant import Mutant
from siglip_port.model import VisionEmbeddings


def tokens_of(grid: Tensor) -> Tensor:
    """[B, D, h, w] -> [B, N, D]."""
    return grid.flatten(2).transpose(1, 2)


def channels_last(kernel: Tensor) -> Tensor:
    """Read a kernel [D, C, P, P] as [D, P, P, C]."""
    _, channels, height, width = kernel.shape
    cells = kernel.flatten(1).unflatten(1, (height, width, channels))
    return cells.permute(0, 3, 1, 2)


def stretch(embeddings: VisionEmbeddings, pixel_values: Tensor) -> Tensor:
    """Resize images to a whole number of patches instead of cropping."""
    side = embeddings.config.grid_size * embeddings.config.patch_size
    return convolve(embeddings, nn.functional.interpolate(pixel_values, size=side, mode="bilinear"))


def crop_center(embeddings: VisionEmbeddings, pixel_values: Tensor) -> Tensor:
    """Crop half of the margin at the left and top."""
    margin = embeddings.config.image_size % embeddings.config.patch_size // 2
    return convolve(embeddings, pixel_values[..., margin:, margin:])


def transpose_positions(table: Tensor) -> Tensor:
    """Order positions column by column."""
    side = math.isqrt(len(table))
    return table.unflatten(0, (side, side)).transpose(0, 1).flatten(0, 1)


def make_sine_table(table: Tensor) -> Tensor:
    """Return sinusoidal positions."""
    return torch.sin(torch.arange(table.numel()).reshape(table.shape) / 7)


def add_swapped_axes(embeddings: VisionEmbeddings, grid: Tensor, table: Tensor) -> Tensor:
    """Add positions (x, y) to the grid (y, x)."""
    positions = table.unflatten(0, grid.shape[-2:]).permute(2, 1, 0)
    return tokens_of(grid + positions)


def drop_out(embeddings: VisionEmbeddings, grid: Tensor, table: Tensor) -> Tensor:
    """Apply dropout of 5 %."""
    return nn.functional.dropout(tokens_of(grid) + table, 0.05, training=True)


PATCHES = [
    loaded(
        "conv_transposed",
        "kernel transposed (x and y swapped)",
        "patch",
        change(lambda kernel: kernel.transpose(2, 3), f"{CONVOLUTION}.weight"),
    ),
    loaded(
        "conv_bgr",
        "kernel channels reversed",
        "patch",
        change(lambda kernel: kernel.flip(1), f"{CONVOLUTION}.weight"),
        "PaddlePaddle/PaddleClas#1312",
    ),
    loaded(
        "conv_flipped",
        "kernel flipped",
        "patch",
        change(lambda kernel: kernel.flip(2, 3), f"{CONVOLUTION}.weight"),
    ),
    loaded(
        "patchify_chw_hwc",
        "kernel read as (h, w, channel)",
        "patch",
        change(channels_last, f"{CONVOLUTION}.weight"),
        "vllm-project/vllm-omni#6702; Blaizzy/mlx-vlm#1545",
    ),
    Mutant(
        "conv_same_pad",
        "images padded by one pixel at the top left",
        "patch",
        patch=seams.patch_grid(
            lambda embeddings, pixel_values: convolve(
                embeddings, nn.functional.pad(pixel_values, (1, -1, 1, -1))
            )
        ),
    ),
    Mutant(
        "conv_stretched",
        "whole image resized to whole patches",
        "patch inputs",
        patch=seams.patch_grid(stretch),
    ),
    Mutant(
        "crop_centred",
        "centered crop to whole patches",
        "patch inputs",
        patch=seams.patch_grid(crop_center),
    ),
    Mutant(
        "patch_order_columns",
        "patches in column-major order",
        "embeddings",
        source="pytorch/torchtitan#4244",
        patch=seams.tokens_of_grid(
            lambda embeddings, grid, table: tokens_of(grid.transpose(2, 3)) + table
        ),
    ),
    Mutant(
        "patch_order_reversed",
        "patches in reverse order",
        "embeddings",
        patch=seams.tokens_of_grid(lambda embeddings, grid, table: tokens_of(grid).flip(1) + table),
    ),
    Mutant(
        "flatten_no_transpose",
        "patches flattened without the transpose",
        "embeddings",
        source="duoan/TorchCode#21",
        patch=seams.tokens_of_grid(
            lambda embeddings, grid, table: (
                grid.flatten(2).reshape(grid.shape[0], -1, grid.shape[1]) + table
            )
        ),
    ),
    loaded(
        "pos_transposed",
        "position grid transposed (x and y swapped)",
        "embeddings",
        change(transpose_positions, POSITIONS),
        "pytorch/torchtitan#4244",
    ),
    loaded(
        "pos_off_by_one",
        "positions off by one",
        "embeddings",
        change(lambda table: table.roll(1, 0), POSITIONS),
        "KempnerInstitute/KempnerForge#80; huggingface/transformers#33871",
    ),
    Mutant(
        "pos_ids_zero",
        "every token at position 0",
        "embeddings",
        source="huggingface/text-generation-inference#1064",
        patch=seams.tokens_of_grid(lambda embeddings, grid, table: tokens_of(grid) + table[:1]),
    ),
    Mutant(
        "pos_missing",
        "no position embedding",
        "embeddings",
        "sensitivity",
        "clip-vil/CLIP-ViL#13",
        patch=seams.tokens_of_grid(lambda embeddings, grid, table: tokens_of(grid)),
    ),
    Mutant(
        "pos_twice",
        "position embedding added twice",
        "embeddings",
        patch=seams.tokens_of_grid(lambda embeddings, grid, table: tokens_of(grid) + 2 * table),
    ),
    loaded(
        "pos_sincos",
        "sinusoidal positions instead of learned ones",
        "embeddings",
        change(make_sine_table, POSITIONS),
    ),
    Mutant(
        "pos_before_flatten",
        "positions added before flattening, x and y swapped",
        "embeddings",
        patch=seams.tokens_of_grid(add_swapped_axes),
    ),
    Mutant(
        "embed_scale",
        "embeddings multiplied by sqrt(D)",
        "embeddings",
        patch=seams.tokens_of_grid(
            lambda embeddings, grid, table: (
                (tokens_of(grid) + table) * embeddings.config.embed_dim**0.5
            )
        ),
    ),
    Mutant(
        "embed_dropout",
        "dropout after the embeddings",
        "embeddings 0.in pooled",
        "sensitivity",
        "huggingface/pytorch-image-models#1978",
        patch=seams.tokens_of_grid(drop_out),
    ),
]

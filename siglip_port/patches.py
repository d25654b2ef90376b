"""Grids of patches: pictures cut into patches, packed into one batch, and positions for grids of any shape.

Sources: transformers 5.23 `models/siglip`, `models/siglip2` and `models/idefics2`; timm 1.0.31
    `layers/pos_embed.py`;
big_vision `models/vit.py` (`resample_posemb`) and `models/proj/image_text/naflex_vit.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict

import torch
import torch.nn.functional as F  # noqa: N812 (the name the field uses)
from torch import Tensor

from siglip_port.config import INTERPOLATIONS


def _resized(
    grid: Tensor, size: tuple[int, int], mode: str, *, corners: bool = False, antialias: bool
) -> Tensor:
    """[h, w, D] -> [H, W, D], computed in the dtype of the grid."""
    pictures = grid.permute(2, 0, 1)[None]
    return F.interpolate(pictures, size, mode=mode, align_corners=corners, antialias=antialias)[
        0
    ].permute(1, 2, 0)


def _hf(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """The reference's `interpolate_pos_encoding=True`, in the dtype of the weights."""
    return _resized(grid, size, "bicubic", antialias=False)


def _timm(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """As timm's `resample_abs_pos_embed`, in float32 whatever the dtype of the weights."""
    return _resized(grid.float(), size, "bicubic", antialias=True).to(grid.dtype)


def _naflex(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """SigLIP 2 NaFlex; as transformers does, on a CPU in float32 whatever the dtype of the weights, float64 too."""
    wide = grid.float() if grid.device.type == "cpu" else grid
    return _resized(wide, size, "bilinear", antialias=True).to(grid.dtype)


def _big_vision(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """As big_vision's `scipy.ndimage.zoom(order=1)`: linear, corners on corners."""
    return _resized(grid, size, "bilinear", corners=True, antialias=False)


def _navit(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """The position of the same place in the picture, as Idefics2, Idefics3, SmolVLM, MiniCPM-V and Phi-4 read them.

    In float32, operation by operation as transformers 5 does it, since the rounding decides on
    which side of a boundary a place lies. Releases before 5.0 round differently.
    """
    height, width, _ = grid.shape
    rows, columns = (
        torch.bucketize(
            (torch.arange(n, device=grid.device, dtype=torch.float32) * (1.0 / torch.tensor(n, device=grid.device)))
            .clamp(max=1.0 - 1e-6),
            torch.arange(1 / own, 1.0, 1 / own, device=grid.device, dtype=torch.float32),
            right=True,
        )
        for n, own in zip(size, (height, width), strict=True)
    )  # fmt: skip
    return grid[rows[:, None], columns]


# [h, w, D], (H, W) -> [H, W, D]
_RULES: dict[str, Callable[[Tensor, tuple[int, int]], Tensor]] = dict(
    zip(INTERPOLATIONS, (_hf, _timm, _naflex, _big_vision, _navit), strict=True)
)


def positions(table: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Fits learned positions to a grid of patches.

    On their own grid, every rule leaves them as they are.

    Args:
        table: [N, D], of a square grid, row by row.
        size: patches downwards and across, (H, W).
        interpolation: one of `INTERPOLATIONS`.

    Returns:
        [H * W, D], in the dtype of the table.
    """
    side = round(len(table) ** 0.5)
    if size == (side, side):
        return table
    return _RULES[interpolation](table.unflatten(0, (side, side)), size).flatten(0, 1)


def patchify(pixel_values: Tensor, patch_size: int) -> Tensor:
    """Cuts pictures into patches, as NaFlex towers take them.

    Row by row, in each the channel fastest.

    Args:
        pixel_values: [..., C, H, W]. What is left beyond the last whole patch is ignored.
        patch_size: P, in pixels.

    Returns:
        [..., (H // P) * (W // P), P * P * C].
    """
    rows, columns = (size // patch_size for size in pixel_values.shape[-2:])
    whole = pixel_values[..., : rows * patch_size, : columns * patch_size]
    cells = whole.unflatten(-1, (columns, patch_size)).unflatten(
        -3, (rows, patch_size)
    )  # [..., C, h, P, w, P]
    patches: Tensor = (
        cells.movedim((-4, -2, -3, -1, -5), (-5, -4, -3, -2, -1)).flatten(-5, -4).flatten(-3)
    )
    return patches


class Packed(TypedDict):
    """Pictures of several shapes in one batch, by the names that transformers' NaFlex towers take.

    Attributes:
        pixel_values: [B, N, P * P * C], patches; zero at the padding.
        pixel_attention_mask: [B, N], int64; 1 for a patch and 0 for padding.
        spatial_shapes: [B, 2], int64; patches downwards and across.
    """

    pixel_values: Tensor
    pixel_attention_mask: Tensor
    spatial_shapes: Tensor


def pack(pictures: Sequence[Tensor], patch_size: int, num_patches: int | None = None) -> Packed:
    """Packs pictures of several shapes into one batch for a tower.

    `model(**pack(pictures, patch_size))`.

    The result has the names and shapes of what transformers' `Siglip2ImageProcessor` returns.

    Args:
        pictures: B tensors [C, H, W], of one dtype.
        patch_size: P, in pixels.
        num_patches: to which every picture is padded, N; None for as many as the largest has.

    Returns:
        What `SigLipVisionModel` takes: a dictionary to be passed on by `**`.

    Raises:
        ValueError: there are no pictures, one has no whole patch, or has more than `num_patches`.
    """
    if len(pictures) == 0 or not all(isinstance(p, Tensor) and p.ndim == 3 for p in pictures):
        kinds = [list(p.shape) if isinstance(p, Tensor) else type(p).__name__ for p in pictures]
        raise ValueError(f"pictures must be one or more tensors of shape [C, H, W], got {kinds}")
    if not isinstance(patch_size, int) or patch_size < 1:
        raise ValueError(f"patch_size must be a positive integer, got {patch_size!r}")
    channels, dtypes = {p.shape[0] for p in pictures}, {p.dtype for p in pictures}
    if len(channels) > 1 or len(dtypes) > 1:
        raise ValueError(
            f"pictures must have one number of channels and one dtype, got {channels} and {dtypes}"
        )
    shapes = [(p.shape[-2] // patch_size, p.shape[-1] // patch_size) for p in pictures]
    counts = [rows * columns for rows, columns in shapes]
    if not min(counts):
        small = next(list(p.shape) for p, count in zip(pictures, counts, strict=True) if not count)
        raise ValueError(
            f"every picture must hold a patch of {patch_size} x {patch_size} pixels, got one of "
            f"shape {small}"
        )
    size = max(counts) if num_patches is None else num_patches
    if max(counts) > size:
        raise ValueError(
            f"a picture has {max(counts)} patches, more than num_patches={size}; make it smaller"
        )
    patches = [patchify(picture, patch_size) for picture in pictures]
    return {
        "pixel_values": torch.stack([F.pad(p, (0, 0, 0, size - len(p))) for p in patches]),
        "pixel_attention_mask": (torch.arange(size) < torch.tensor(counts)[:, None])
        .long()
        .to(patches[0].device),
        "spatial_shapes": torch.tensor(shapes, device=patches[0].device),
    }

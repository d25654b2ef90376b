"""Grids of patches: cutting images, packing them into one batch, and positions for any grid.

Sources: transformers 5.23 `models/siglip`, `models/siglip2` and `models/idefics2`; timm 1.0.31
`layers/pos_embed.py`; big_vision `models/vit.py` (`resample_posemb`) and
`models/proj/image_text/naflex_vit.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypedDict

import torch
import torch.nn.functional as F  # noqa: N812 (the name the field uses)
from torch import Tensor

from siglip_port.validation import validate_attention_mask, validate_images_to_pack

Mask = Tensor | None
"""Which patches of a batch of packed ones are no padding, [B, N]; None where `Shapes` tell."""

Shapes = Tensor | Sequence[tuple[int, int]] | None
"""Patches downwards and across of B images, (h, w): a tensor [B, 2] or pairs of ints, with which
nothing waits for the device and `torch.compile` sees constants; None for images of one size."""


class PackedImages(TypedDict):
    """Images of several shapes in one batch, by the names that transformers' NaFlex models take.

    Attributes:
        pixel_values: [B, N, P * P * C], patches; zero at the padding.
        pixel_attention_mask: [B, N], int64; 1 for a patch and 0 for padding.
        spatial_shapes: [B, 2], int64; patches downwards and across.
    """

    pixel_values: Tensor
    pixel_attention_mask: Tensor
    spatial_shapes: Tensor


class ImageBatch(NamedTuple):
    """What the model is called with: images of one size, or packed patches.

    Attributes:
        pixel_values: [B, C, height, width]; or, with `spatial_shapes`, [B, N, P * P * C].
        pixel_attention_mask: [B, N], zero at the padding; None for what `spatial_shapes` say.
        spatial_shapes: patches downwards and across; None for images of one size.
    """

    pixel_values: Tensor
    pixel_attention_mask: Mask = None
    spatial_shapes: Shapes = None


def patchify(pixel_values: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches, as NaFlex models take them: row by row, in each the channel fastest.

    Args:
        pixel_values: [..., C, H, W]. What is left beyond the last whole patch is ignored.
        patch_size: P, in pixels.

    Returns:
        [..., (H // P) * (W // P), P * P * C].
    """
    height, width = pixel_values.shape[-2:]
    rows = height // patch_size
    columns = width // patch_size
    whole = pixel_values[..., : rows * patch_size, : columns * patch_size]
    cells = whole.unflatten(-1, (columns, patch_size)).unflatten(-3, (rows, patch_size))
    # [..., C, h, P, w, P] -> [..., h, w, P, P, C]
    patches: Tensor = cells.movedim((-4, -2, -3, -1, -5), (-5, -4, -3, -2, -1))
    return patches.flatten(-5, -4).flatten(-3)


def pack(images: Sequence[Tensor], patch_size: int, num_patches: int | None = None) -> PackedImages:
    """Pack images of several shapes into one batch: `model(**pack(images, patch_size))`.

    The result has the names and shapes of what transformers' `Siglip2ImageProcessor` returns.

    Args:
        images: B tensors [C, H, W], of one dtype.
        patch_size: P, in pixels.
        num_patches: to which every image is padded, N; None for as many as the largest has.

    Returns:
        What `SigLipVisionModel` takes: a dictionary to be passed on by `**`.

    Raises:
        ValueError: there are no images, one has no whole patch, or has more than `num_patches`.
    """
    validate_images_to_pack(images, patch_size, num_patches)
    shapes = [(image.shape[-2] // patch_size, image.shape[-1] // patch_size) for image in images]
    counts = [rows * columns for rows, columns in shapes]
    size = max(counts) if num_patches is None else num_patches
    patches = [patchify(image, patch_size) for image in images]
    device = patches[0].device
    is_patch = torch.arange(size) < torch.tensor(counts)[:, None]
    return {
        "pixel_values": torch.stack([F.pad(p, (0, 0, 0, size - len(p))) for p in patches]),
        "pixel_attention_mask": is_patch.long().to(device),
        "spatial_shapes": torch.tensor(shapes, device=device),
    }


def shape_pairs(spatial_shapes: Shapes) -> list[tuple[int, int]]:
    """Return the shapes as pairs of ints; none at all where they are no pairs of whole numbers."""
    rows: object = spatial_shapes
    if spatial_shapes is not None and hasattr(spatial_shapes, "tolist"):
        rows = spatial_shapes.tolist()
    if not isinstance(rows, (list, tuple)):
        return []
    pairs = []
    for row in rows:
        if not isinstance(row, (list, tuple)) or len(row) != 2:
            return []
        if not isinstance(row[0], int) or not isinstance(row[1], int):
            return []
        pairs.append((row[0], row[1]))
    return pairs


def attention_mask(tokens: Tensor, pixel_attention_mask: Mask, spatial_shapes: Shapes) -> Mask:
    """Return which tokens [B, N, D] are not padding, as attention takes it: [B, 1, 1, N], bool.

    Without a `pixel_attention_mask` [B, N], the shapes tell: what comes after an image's last patch
    is padding. Images of one size have none: None.

    Raises:
        ValueError: there is a mask, but no shapes; or it has another shape.
    """
    if spatial_shapes is None:
        if pixel_attention_mask is not None:
            raise ValueError(
                "pixel_attention_mask goes with spatial_shapes, got the mask alone; pass both or "
                "neither"
            )
        return None
    if pixel_attention_mask is not None:
        return key_mask(tokens, pixel_attention_mask)
    shapes = torch.as_tensor(shape_pairs(spatial_shapes), device=tokens.device)
    places = torch.arange(tokens.shape[1], device=tokens.device)
    return (places < shapes.prod(1, keepdim=True))[:, None, None]


def key_mask(tokens: Tensor, pixel_attention_mask: Mask) -> Mask:
    """Return a mask [B, N] of tokens [B, N, D] as attention takes it: [B, 1, 1, N], bool.

    Raises:
        ValueError: it is no tensor of that shape.
    """
    if pixel_attention_mask is None:
        return None
    validate_attention_mask(tokens, pixel_attention_mask)
    return pixel_attention_mask.bool()[:, None, None]


def mean_of_tokens(tokens: Tensor, mask: Mask) -> Tensor:
    """Average tokens, [B, N, D] -> [B, D], but for those that a mask [B, 1, 1, N] leaves out."""
    if mask is None:
        return tokens.mean(dim=1)
    counted = mask[:, 0, 0, :, None].to(torch.promote_types(tokens.dtype, torch.float32))
    shares = counted / counted.sum(dim=1, keepdim=True)
    return (tokens * shares.to(tokens.dtype)).sum(dim=1)


# --- positions for other grids --------------------------------------------------------------------


def interpolate_positions(table: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Fit learned positions to a grid of patches. Their own grid keeps them as they are.

    Args:
        table: [N, D], of a square grid, row by row.
        size: patches downwards and across, (H, W).
        interpolation: one of `siglip_port.config.INTERPOLATIONS`.

    Returns:
        [H * W, D], in the dtype of the table.
    """
    side = round(len(table) ** 0.5)
    if size == (side, side):
        return table
    grid = table.unflatten(0, (side, side))
    return INTERPOLATION_RULES[interpolation](grid, size).flatten(0, 1)


def resize_grid(
    grid: Tensor, size: tuple[int, int], mode: str, *, align_corners: bool = False, antialias: bool
) -> Tensor:
    """Resize a grid, [h, w, D] -> [H, W, D], computed in its dtype."""
    image = grid.permute(2, 0, 1)[None]
    resized = F.interpolate(
        image, size, mode=mode, align_corners=align_corners, antialias=antialias
    )
    return resized[0].permute(1, 2, 0)


def interpolate_as_transformers(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize as the reference's `interpolate_pos_encoding=True`, in the dtype of the weights."""
    return resize_grid(grid, size, "bicubic", antialias=False)


def interpolate_as_timm(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize as timm's `resample_abs_pos_embed`, in float32 whatever the dtype of the weights."""
    return resize_grid(grid.float(), size, "bicubic", antialias=True).to(grid.dtype)


def interpolate_as_naflex(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize as SigLIP 2 NaFlex in transformers: on a CPU in float32, for float64 weights too."""
    if grid.device.type == "cpu":
        return resize_grid(grid.float(), size, "bilinear", antialias=True).to(grid.dtype)
    return resize_grid(grid, size, "bilinear", antialias=True)


def interpolate_as_big_vision(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize as big_vision's `scipy.ndimage.zoom(order=1)`: linear, corners on corners."""
    return resize_grid(grid, size, "bilinear", align_corners=True, antialias=False)


def interpolate_as_navit(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Take the position of the same place in the image, as NaViT models do.

    Idefics2, Idefics3, SmolVLM, MiniCPM-V and Phi-4. In float32, operation by operation as
    transformers 5 does it, since the rounding decides on which side of a boundary a place lies.
    Releases before 5.0 round differently.
    """
    rows = nearest_indices(size[0], grid.shape[0], grid.device)
    columns = nearest_indices(size[1], grid.shape[1], grid.device)
    return grid[rows[:, None], columns]


def nearest_indices(count: int, own_count: int, device: torch.device) -> Tensor:
    """Return, for `count` places along an axis, which of `own_count` positions each reads."""
    step = 1.0 / torch.tensor(count, device=device)
    places = torch.arange(count, device=device, dtype=torch.float32) * step
    boundaries = torch.arange(1 / own_count, 1.0, 1 / own_count, device=device, dtype=torch.float32)
    return torch.bucketize(places.clamp(max=1.0 - 1e-6), boundaries, right=True)


INTERPOLATION_RULES: dict[str, Callable[[Tensor, tuple[int, int]], Tensor]] = {
    "hf": interpolate_as_transformers,
    "timm": interpolate_as_timm,
    "naflex": interpolate_as_naflex,
    "big_vision": interpolate_as_big_vision,
    "navit": interpolate_as_navit,
}
"""By the names of `siglip_port.config.INTERPOLATIONS`: [h, w, D], (H, W) -> [H, W, D]."""

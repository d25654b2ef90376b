"""Patches: cutting and packing images, attention masks, and position embeddings for any grid.

Sources: transformers 5.23 `models/siglip`, `models/siglip2` and `models/idefics2`; timm 1.0.31
`layers/pos_embed.py`; big_vision `models/vit.py` (`resample_posemb`) and
`models/proj/image_text/naflex_vit.py`; MiniCPM-V `modeling_navit_siglip.py`; VILA
`multimodal_encoder/siglip/modeling_siglip.py`; BAGEL `data/data_utils.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypedDict

import torch
import torch.nn.functional as F  # noqa: N812 (the name the field uses)
from torch import Tensor

from siglip_port.validation import validate_attention_mask, validate_images_to_pack

Mask = Tensor | None
"""Padding mask of packed patches, [B, N]: nonzero for patches, 0 for padding; None if unpadded."""

Shapes = Tensor | Sequence[tuple[int, int]] | None
"""Height and width of B images in patches: a tensor [B, 2], or pairs of ints, which avoid a device
sync and are constants for `torch.compile`. None for images of one size."""


class PackedImages(TypedDict):
    """Images of different shapes in one batch; the keys are those of transformers' NaFlex models.

    Attributes:
        pixel_values: Patches, [B, N, P * P * C]; zero where padded.
        pixel_attention_mask: 1 for patches and 0 for padding, [B, N], int64.
        spatial_shapes: Height and width in patches, [B, 2], int64.
    """

    pixel_values: Tensor
    pixel_attention_mask: Tensor
    spatial_shapes: Tensor


class ImageBatch(NamedTuple):
    """Arguments of `SigLipVisionModel.forward`: images of one size, or packed patches.

    Attributes:
        pixel_values: Images [B, C, H, W], or packed patches [B, N, P * P * C].
        pixel_attention_mask: Padding mask [B, N]; None to derive it from `spatial_shapes`.
        spatial_shapes: Height and width in patches, B pairs; None for images of one size.
    """

    pixel_values: Tensor
    pixel_attention_mask: Mask = None
    spatial_shapes: Shapes = None


def patchify(pixel_values: Tensor, patch_size: int) -> Tensor:
    """Cut images into flattened patches in row-major order, channels last.

    Args:
        pixel_values: Images [..., C, H, W]. Pixels beyond the last whole patch are ignored.
        patch_size: Patch size P, in pixels.

    Returns:
        Patches [..., (H // P) * (W // P), P * P * C].
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
    """Pack images of different shapes into one batch: `model(**pack(images, patch_size))`.

    Keys and shapes are those of transformers' `Siglip2ImageProcessor`.

    Args:
        images: B tensors [C, H, W] of one dtype.
        patch_size: Patch size P, in pixels.
        num_patches: Padded number of patches N; None for that of the largest image.

    Returns:
        Keyword arguments of `SigLipVisionModel.forward`.

    Raises:
        ValueError: `images` is empty, or an image is smaller than a patch or has more than
            `num_patches` patches.
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
    """Convert shapes to pairs of ints; return an empty list if they are anything else."""
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
    """Return the attention mask of tokens [B, N, D]: [B, 1, 1, N], bool, True for patches.

    Without a `pixel_attention_mask` [B, N], the mask follows from `spatial_shapes`. Images of one
    size need no mask: None.

    Raises:
        ValueError: The mask has another shape, or was passed without `spatial_shapes`.
    """
    if spatial_shapes is None:
        if pixel_attention_mask is not None:
            raise ValueError("pixel_attention_mask requires spatial_shapes; pass both or neither")
        return None
    if pixel_attention_mask is not None:
        return key_mask(tokens, pixel_attention_mask)
    shapes = torch.as_tensor(shape_pairs(spatial_shapes), device=tokens.device)
    indices = torch.arange(tokens.shape[1], device=tokens.device)
    return (indices < shapes.prod(1, keepdim=True))[:, None, None]


def key_mask(tokens: Tensor, pixel_attention_mask: Mask) -> Mask:
    """Convert a padding mask [B, N] of tokens [B, N, D] to an attention mask [B, 1, 1, N], bool.

    Raises:
        ValueError: The mask is not a tensor of that shape.
    """
    if pixel_attention_mask is None:
        return None
    validate_attention_mask(tokens, pixel_attention_mask)
    return pixel_attention_mask.bool()[:, None, None]


def mean_of_tokens(tokens: Tensor, mask: Mask) -> Tensor:
    """Average the unmasked tokens: [B, N, D], mask [B, 1, 1, N] -> [B, D]."""
    if mask is None:
        return tokens.mean(dim=1)
    weights = mask[:, 0, 0, :, None].to(torch.promote_types(tokens.dtype, torch.float32))
    weights = weights / weights.sum(dim=1, keepdim=True)  # before the sum, which overflows float16
    return (tokens * weights.to(tokens.dtype)).sum(dim=1)


# --- position embeddings for other grids ----------------------------------------------------------


def interpolate_positions(table: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Resize learned position embeddings to another grid of patches.

    Args:
        table: Position embeddings of a square grid, row-major, [N, D].
        size: Height and width of the new grid in patches, (H, W).
        interpolation: One of `siglip_port.config.INTERPOLATIONS`.

    Returns:
        [H * W, D] in the dtype of `table`; `table` itself if the grid is unchanged.
    """
    side = round(len(table) ** 0.5)
    if size == (side, side):
        return table
    grid = table.unflatten(0, (side, side))
    return INTERPOLATION_RULES[interpolation](grid, size).flatten(0, 1)


def resize_grid(
    grid: Tensor, size: tuple[int, int], mode: str, *, align_corners: bool = False, antialias: bool
) -> Tensor:
    """Resize a grid in its dtype: [h, w, D] -> [H, W, D]."""
    image = grid.permute(2, 0, 1)[None]
    resized = F.interpolate(
        image, size, mode=mode, align_corners=align_corners, antialias=antialias
    )
    return resized[0].permute(1, 2, 0)


def interpolate_as_transformers(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize as transformers' `interpolate_pos_encoding=True`: bicubic, in the weights' dtype."""
    return resize_grid(grid, size, "bicubic", antialias=False)


def interpolate_as_timm(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize as timm's `resample_abs_pos_embed`: bicubic, antialiased, always in float32."""
    return resize_grid(grid.float(), size, "bicubic", antialias=True).to(grid.dtype)


def interpolate_as_naflex(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize as SigLIP 2 NaFlex in transformers: bilinear, antialiased; in float32 on CPUs."""
    if grid.device.type == "cpu":
        return resize_grid(grid.float(), size, "bilinear", antialias=True).to(grid.dtype)
    return resize_grid(grid, size, "bilinear", antialias=True)


def interpolate_as_big_vision(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize as big_vision's `scipy.ndimage.zoom(order=1)`: bilinear, corners aligned."""
    return resize_grid(grid, size, "bilinear", align_corners=True, antialias=False)


def interpolate_as_vila(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize as VILA, vLLM and transformers 4.43: bicubic, scaled by (H + 0.1) / h.

    The 0.1 keeps the output from being one row short; it also moves every sampling point.
    """
    scales = ((size[0] + 0.1) / grid.shape[0], (size[1] + 0.1) / grid.shape[1])
    resized = F.interpolate(grid.permute(2, 0, 1)[None], scale_factor=scales, mode="bicubic")
    return resized[0].permute(1, 2, 0)


def interpolate_as_crop(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Take the top left corner, as BAGEL does.

    Raises:
        ValueError: The new grid is larger than the learned one.
    """
    height, width = grid.shape[:2]
    if size[0] > height or size[1] > width:
        raise ValueError(
            f"with interpolation='crop', images must have at most {height} x {width} patches, got "
            f"{size[0]} x {size[1]}; pass smaller images, or another interpolation= to from_hf or "
            "SigLipVisionConfig"
        )
    return grid[: size[0], : size[1]]


def interpolate_as_navit(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Take the nearest position, as NaViT models of transformers do.

    These are Idefics2, Idefics3, SmolVLM and Phi-4. Coordinates are float32, computed in the same
    order as in transformers 5, because rounding decides ties.
    """
    rows = nearest_indices(navit_coordinates(size[0], grid.device), grid.shape[0])
    columns = nearest_indices(navit_coordinates(size[1], grid.device), grid.shape[1])
    return grid[rows[:, None], columns]


def interpolate_as_minicpm(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Take the nearest position, as MiniCPM-V's own code does, and transformers 4.40 to 4.52.

    Ties are rounded differently than by `interpolate_as_navit`. MiniCPM-V computes the indices on
    the CPU.
    """
    rows = nearest_indices(minicpm_coordinates(size[0]), grid.shape[0]).to(grid.device)
    columns = nearest_indices(minicpm_coordinates(size[1]), grid.shape[1]).to(grid.device)
    return grid[rows[:, None], columns]


def nearest_indices(coordinates: Tensor, table_size: int) -> Tensor:
    """Map coordinates in [0, 1) along an axis to indices into `table_size` positions."""
    width = 1 / table_size
    boundaries = torch.arange(width, 1.0, width, device=coordinates.device, dtype=torch.float32)
    return torch.bucketize(coordinates, boundaries, right=True)


def navit_coordinates(count: int, device: torch.device) -> Tensor:
    """Return the relative places of `count` patches along an axis: [count], float32."""
    step = 1.0 / torch.tensor(count, device=device)
    coordinates = torch.arange(count, device=device, dtype=torch.float32) * step
    return coordinates.clamp(max=1.0 - 1e-6)


def minicpm_coordinates(count: int) -> Tensor:
    """Return what `torch.arange(0, 1 - 1e-6, step)` returns on a CPU, step = 1 / count in float32.

    It computes vectors of 8 elements from a first element that it rounds to float32, and the
    elements after the last two vectors one by one. A compiled `arange` rounds differently, so this
    function does not call it.
    """
    step = (1.0 / torch.tensor(count)).double()
    index = torch.arange(count)
    start = index // 8 * 8
    in_vectors = (start * step).float().double() + (index - start) * step
    vectorized = index < count // 16 * 16
    return torch.where(vectorized, in_vectors, index * step).float()


INTERPOLATION_RULES: dict[str, Callable[[Tensor, tuple[int, int]], Tensor]] = {
    "hf": interpolate_as_transformers,
    "timm": interpolate_as_timm,
    "naflex": interpolate_as_naflex,
    "big_vision": interpolate_as_big_vision,
    "navit": interpolate_as_navit,
    "minicpm": interpolate_as_minicpm,
    "vila": interpolate_as_vila,
    "crop": interpolate_as_crop,
}
"""Name in `siglip_port.config.INTERPOLATIONS` -> function [h, w, D], (H, W) -> [H, W, D]."""

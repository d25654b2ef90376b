"""Input regimes: batch sizes, memory layouts, pixel values, grids and packings.

A bug may show in one of them only. Every regime is compared on a small model with stress weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from siglip_port.config import SigLipVisionConfig
from siglip_port.parity.sides import Inputs

LARGEST_PIXEL = 9.5
"""Just inside the range that the port accepts."""

ROUNDED = (torch.float32, torch.bfloat16)
"""Dtypes in which rounding is checked."""

RESIZED_GATES = (
    "weights",
    "config",
    "sensitivity",
    "numerics",
    "gradients",
    "calls",
    "rounding",
)
"""Gates of resized positions and packed images: both may be cached, or detached."""


@dataclass(frozen=True)
class Regime:
    """Inputs of one kind.

    Attributes:
        name: Name in reports.
        inputs: Images [B, C, H, W], or packed patches by the names of the model's arguments.
        gates: Names of the gates to run.
        dtypes: Dtypes in which rounding is checked; weights are rounded to the first one.
        arrange: Function that changes the memory layout of the port's images; None for none.
        uses_embed: Whether embeddings come from the port's `embed` instead of `pool`.
    """

    name: str
    inputs: Inputs
    gates: tuple[str, ...] = ("numerics",)
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    arrange: Callable[[Tensor], Tensor] | None = None
    uses_embed: bool = False


def image_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Return uniform noise in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tuple(shape), generator=generator) * 2 - 1


def own_shape(config: SigLipVisionConfig, batch: int) -> tuple[int, int, int, int]:
    """Return the shape of a batch of images of the model's own size."""
    return (batch, config.num_channels, config.image_size, config.image_size)


def image_regimes(config: SigLipVisionConfig, seed: int) -> list[Regime]:
    """Return the regimes for images of the model's own size."""
    return [
        *batch_regimes(config, seed),
        *pixel_regimes(config, seed),
        *memory_regimes(config, seed),
    ]


def batch_regimes(config: SigLipVisionConfig, seed: int) -> list[Regime]:
    """Return 1, 3, 9 and 33 images; the other regimes have two or more."""
    regimes = []
    for size in (1, 3, 9, 33):
        images = image_noise(own_shape(config, size), seed)
        gates: tuple[str, ...] = ("numerics",)
        if size in (1, 9):
            gates = ("numerics", "rounding")
        regimes.append(Regime(f"batch of {size}", images, gates, ROUNDED))
    return regimes


def pixel_regimes(config: SigLipVisionConfig, seed: int) -> list[Regime]:
    """Return images of unusual values, each kind alone and all of them in one batch."""
    generator = torch.Generator().manual_seed(seed)
    wide = 3 * torch.randn(own_shape(config, 2), generator=generator)
    wide = wide.clamp(-LARGEST_PIXEL, LARGEST_PIXEL)
    constant = torch.tensor([0.0, 1.0, -1.0])[:, None, None, None].expand(own_shape(config, 3))
    noise = image_noise(own_shape(config, 2), seed)
    impulses = impulse_images(config)
    mixed = torch.cat([wide[:1], constant, 1e-4 * noise[:1], impulses[:1], noise[1:]])
    return [
        Regime(f"pixels up to {LARGEST_PIXEL:g}", wide),
        Regime("constant images", constant.contiguous()),
        # Not fainter, and not 0 around the pixels: small relative changes must have an effect, to
        # separate float32 steps from bugs.
        Regime("pixels below 0.01", 0.01 * noise),
        Regime("one pixel set", impulses + 0.25),
        Regime("images of mixed contrast", mixed),
    ]


def impulse_images(config: SigLipVisionConfig) -> Tensor:
    """Return two images that are 0 but for one pixel, in the first and in another patch."""
    impulses = torch.zeros(own_shape(config, 2))
    impulses[0, 0, 0, 1] = 1
    impulses[1, -1, config.patch_size + 1, config.patch_size] = -1
    return impulses


def memory_regimes(config: SigLipVisionConfig, seed: int) -> list[Regime]:
    """Return images in other memory layouts."""
    noise = image_noise(own_shape(config, 2), seed)
    gray = noise[:, :1].repeat(1, config.num_channels, 1, 1)
    same = noise[:1].repeat(3, 1, 1, 1)
    return [
        Regime("transposed images", noise, arrange=to_transposed),
        Regime("channels-last images", noise, arrange=to_channels_last),
        Regime("images in a larger buffer", noise, arrange=to_slice),
        Regime("images at the end of a buffer", noise, arrange=to_end),
        Regime("expanded channels", gray, arrange=to_expanded_channels),
        Regime("expanded batch", same, arrange=to_expanded_batch),
    ]


def to_transposed(images: Tensor) -> Tensor:
    """Store columns first."""
    return images.transpose(2, 3).contiguous().transpose(2, 3)


def to_channels_last(images: Tensor) -> Tensor:
    """Store the channels of a pixel together."""
    return images.contiguous(memory_format=torch.channels_last)


def to_slice(images: Tensor) -> Tensor:
    """Store images as a part of larger ones, which contain other values around it."""
    batch, channels, height, width = images.shape
    buffer = images.new_full((batch + 1, channels + 1, height + 3, width + 5), 0.5)
    view = buffer[1:, 1:, 2:-1, 2:-3]
    view.copy_(images)
    return view


def to_end(images: Tensor) -> Tensor:
    """Store images behind others, as contiguous ones that do not start their memory."""
    return torch.cat([images.flip(0) + 0.5, images])[len(images) :]


def to_expanded_channels(images: Tensor) -> Tensor:
    """Store one channel, for gray images."""
    return images[:, :1].clone().expand_as(images)


def to_expanded_batch(images: Tensor) -> Tensor:
    """Store one image, for a batch of the same image."""
    return images[:1].clone().expand_as(images)


def grid_regimes(config: SigLipVisionConfig, seed: int) -> list[Regime]:
    """Return images of other sizes than the model's own, for interpolated positions."""
    patch = config.patch_size
    side = config.grid_size
    own = config.image_size
    sizes = {
        "its own grid": (own, own),
        "a larger grid": ((side + 3) * patch, (side + 3) * patch),
        "a smaller grid": ((side - 2) * patch, (side - 2) * patch),
        "a wide grid": ((side - 1) * patch, (side + 1) * patch),
        "a tall grid": ((side + 1) * patch, (side - 1) * patch),
        "more columns": (own, (side + 3) * patch),
        "more rows": ((side + 3) * patch, own),
        "one row": (patch, (2 * side - 1) * patch),
        "one column": ((side - 2) * patch, patch),
        "one patch": (patch, patch),
        "as many patches in one row": (patch, side * side * patch),
        "parts of patches": ((side + 1) * patch + 1, (side + 3) * patch + patch - 1),
        "its own grid in another shape": (own, side * patch),
        "twice its own grid": (2 * side * patch, 2 * side * patch),
        "a much larger grid": ((3 * side + 1) * patch, (3 * side - 2) * patch),
    }
    regimes = []
    for name, (height, width) in sizes.items():
        images = image_noise((2, config.num_channels, height, width), seed)
        gates: tuple[str, ...] = ("numerics",)
        if name == "a wide grid":
            gates = RESIZED_GATES
        regimes.append(Regime(name, images, gates, ROUNDED))
    return regimes


# --- packed patches -------------------------------------------------------------------------------

MANY_SHAPES = ((4, 6), (6, 4), (5, 5), (25, 1), (7, 3), (2, 9), (1, 1))
"""Grids of images in one batch: equal numbers of patches in other shapes, and the learned grid."""


def packed_regimes(config: SigLipVisionConfig, seed: int) -> list[Regime]:
    """Return whole images of a NaFlex model, and batches of packed patches."""
    many = pack_noise(config, MANY_SHAPES, seed)
    mask = many["pixel_attention_mask"]
    pairs = [tuple(shape) for shape in many["spatial_shapes"].tolist()]
    default_mask = {name: many[name] for name in ("pixel_values", "spatial_shapes")}
    fewer = mask.clone()
    fewer[:, 0] = 0  # the first patch of images that have another one
    fewer[:, 2] = 0
    fewer[mask.sum(1) == 1] = mask[mask.sum(1) == 1]
    gray = many["pixel_values"].clone()
    gray[:, 1] = 0
    first_full = pack_noise(config, ((5, 5), (2, 3), (4, 4)), seed)
    equal_counts = pack_noise(config, ((4, 6), (6, 4), (3, 8), (2, 12)), seed)
    return [
        *whole_image_regimes(config, seed),
        Regime("packed images", many, RESIZED_GATES, ROUNDED),
        Regime("packed images, embed", many, uses_embed=True),
        Regime("packed images, default mask", default_mask, uses_embed=True),
        Regime("packed images, mask of bools", {**many, "pixel_attention_mask": mask.bool()}),
        Regime("packed images, mask of floats", {**many, "pixel_attention_mask": mask.float()}),
        Regime("packed images, patches masked", {**many, "pixel_attention_mask": fewer}),
        Regime("packed images, the first one full", first_full),
        Regime("packed images, gray patches", {**many, "pixel_values": gray}),
        Regime("packed images, shapes as pairs", {**many, "spatial_shapes": pairs}),
        Regime("packed images without padding", equal_counts),
        Regime("one packed image", pack_noise(config, ((3, 6),), seed), uses_embed=True),
        Regime("one packed image with padding", pack_noise(config, ((3, 4),), seed, 30)),
        Regime("much padding", pack_noise(config, ((2, 2), (3, 1), (1, 5)), seed, 70)),
        Regime("nine packed images", pack_noise(config, nine_shapes(), seed)),
    ]


def nine_shapes() -> list[tuple[int, int]]:
    """Return the grids of nine images, none like its neighbors."""
    return [(2 + 3 * i % 5, 2 + 2 * i % 7) for i in range(9)]


def whole_image_regimes(config: SigLipVisionConfig, seed: int) -> list[Regime]:
    """Return whole images of a NaFlex model."""
    patch = config.patch_size
    side = config.grid_size
    grids = {
        "whole images, its own grid": (side, side),
        "whole images, a wide grid": (side - 1, side + 3),
        "whole images, a tall grid": (side + 3, side - 1),
        "whole images, a larger grid": (2 * side + 1, 2 * side + 2),
    }
    regimes = []
    for name, (rows, columns) in grids.items():
        shape = (2, config.num_channels, rows * patch, columns * patch + 1)
        regimes.append(Regime(name, image_noise(shape, seed)))
    return regimes


def pack_noise(
    config: SigLipVisionConfig,
    shapes: Sequence[tuple[int, int]],
    seed: int,
    num_patches: int | None = None,
) -> dict[str, Tensor]:
    """Return packed patches of noise, one image per shape.

    Written without the port's `pack`, which could be wrong.

    Args:
        config: Configuration of the model.
        shapes: Height and width of each image in patches.
        seed: Seed of the noise.
        num_patches: Padded number of patches; None for that of the largest image.

    Returns:
        Arguments of both models by name.
    """
    counts = torch.tensor([rows * columns for rows, columns in shapes])
    length = num_patches or int(counts.max())
    width = config.patch_size**2 * config.num_channels
    is_patch = torch.arange(length) < counts[:, None]
    noise = image_noise((len(shapes), length, width), seed)
    return {
        "pixel_values": noise * is_patch[..., None],
        "pixel_attention_mask": is_patch.long(),
        "spatial_shapes": torch.tensor(shapes),
    }

"""Options of image processors, parsed from `preprocessor_config.json`.

Imports neither Pillow nor NumPy, so that loading a checkpoint can check its file. Sources:
transformers 5.23 `image_processing_utils.py` and `image_processing_backends.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch

from siglip_port.config import is_int, is_number

RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
"""PIL's number of each resampling filter."""

MAX_SIDE = 65536
"""Upper limit on image sides in pixels and on patches per image."""

OTHER_SIZES = (
    {"shortest_edge"},
    {"longest_edge"},
    {"shortest_edge", "longest_edge"},
    {"max_height", "max_width"},
    {"min_pixels", "max_pixels"},
)
"""Keys of `size` in transformers that keep the aspect ratio."""


class UnsupportedOptionsError(ValueError):
    """Options that are valid in transformers, but not supported for SigLIP."""


@dataclass(frozen=True)
class ImageOptions:
    """Options of an image processor.

    Attributes:
        size: Target (height, width) in pixels; None for NaFlex.
        patch_size: Patch size of NaFlex models in pixels; None for other models.
        max_num_patches: Maximum and padded number of patches of NaFlex models.
        do_resize: Whether to resize images.
        resample: Pillow's resampling filter.
        rescale_factor: Factor for values 0 to 255; None for no rescaling.
        mean: Mean per channel, subtracted after rescaling; None for no normalization.
        std: Standard deviation per channel; None for no normalization.
    """

    size: tuple[int, int] | None
    patch_size: int | None
    max_num_patches: int | None
    do_resize: bool
    resample: int
    rescale_factor: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def parse_options(config: Mapping[str, Any]) -> ImageOptions:
    """Parse `preprocessor_config.json`; missing keys have the defaults of transformers' class.

    Raises:
        ValueError: A field has an invalid value, even if another field makes it ineffective.
        UnsupportedOptionsError: All fields are valid, but not supported.
    """
    naflex = is_naflex(config)
    parse_flag(config, "do_convert_rgb")  # images are converted in any case
    size = None
    patch_size = None
    max_num_patches = None
    if naflex:
        patch_size = parse_count(config, "patch_size", 16)
        max_num_patches = parse_count(config, "max_num_patches", 256)
    do_resize = parse_flag(config, "do_resize")
    resample = parse_resample(config, "bilinear" if naflex else "bicubic")
    do_rescale = parse_flag(config, "do_rescale")
    rescale_factor = parse_rescale_factor(config, is_used=do_rescale)
    do_normalize = parse_flag(config, "do_normalize")
    mean = parse_channel_values(config, "image_mean", is_used=do_normalize)
    std = parse_channel_values(config, "image_std", is_used=do_normalize)
    crops = parse_flag(config, "do_center_crop", default=False)
    pads = parse_flag(config, "do_pad", default=False)
    if not naflex:
        size = parse_size(config.get("size", (224, 224)))
    if crops or pads:
        raise UnsupportedOptionsError(
            "do_center_crop and do_pad are not supported for SigLIP; set them to false"
        )
    return ImageOptions(
        size=size,
        patch_size=patch_size,
        max_num_patches=max_num_patches,
        do_resize=do_resize,
        resample=resample,
        rescale_factor=rescale_factor if do_rescale else None,
        mean=mean if do_normalize else None,
        std=std if do_normalize else None,
    )


def is_naflex(config: Mapping[str, Any]) -> bool:
    """Return whether a processor is that of SigLIP 2 NaFlex.

    Raises:
        UnsupportedOptionsError: It is neither SigLIP's nor SigLIP 2's.
    """
    kind = str(config.get("image_processor_type", "SiglipImageProcessor"))
    if not kind.startswith(("Siglip2", "SiglipImage")):
        raise UnsupportedOptionsError(
            f"image_processor_type must be that of a SigLIP or SigLIP 2 image processor, got {kind}"
        )
    return kind.startswith("Siglip2")


def parse_size(size: object) -> tuple[int, int]:
    """Parse `size` as (height, width); a single number would mean the shorter side."""
    expected = f"size must be {{'height': H, 'width': W}} with integers from 1 to {MAX_SIDE}"
    keeps_aspect_ratio = is_count(size)
    sides: list[object] = []
    if isinstance(size, Mapping):
        are_positive = all(is_int(side) and side >= 1 for side in size.values())
        keeps_aspect_ratio = size.keys() in OTHER_SIZES and are_positive
        if size.keys() == {"height", "width"}:
            sides = [size["height"], size["width"]]
    elif isinstance(size, (list, tuple)):
        sides = list(size)
    if keeps_aspect_ratio:
        raise UnsupportedOptionsError(
            f"{expected}, got {size!r}; resizing with a fixed aspect ratio is not supported"
        )
    if len(sides) == 2:
        height, width = sides
        if is_count(height) and is_count(width):
            return height, width
    raise ValueError(f"{expected}, got {size!r}")


def parse_resample(config: Mapping[str, Any], default: str) -> int:
    """Parse `resample`, the number of a Pillow filter."""
    value = config.get("resample", RESAMPLE[default])
    filters = sorted(RESAMPLE.values())
    if not is_number(value) or value not in filters:
        raise ValueError(f"resample must be one of {filters} (Pillow's filters), got {value!r}")
    return int(value)


def parse_flag(config: Mapping[str, Any], name: str, *, default: bool = True) -> bool:
    """Parse a flag; null means false, as in transformers."""
    value = config.get(name, default)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return bool(value)


def parse_count(config: Mapping[str, Any], name: str, default: int) -> int:
    """Parse a number of pixels or patches."""
    value = config.get(name, default)
    if not is_count(value):
        raise ValueError(f"{name} must be an integer from 1 to {MAX_SIDE}, got {value!r}")
    return value


def parse_channel_values(
    config: Mapping[str, Any], name: str, *, is_used: bool
) -> tuple[float, ...] | None:
    """Parse one number per channel; a single number applies to all three.

    Args:
        config: Contents of the file.
        name: `image_mean` or `image_std`.
        is_used: Whether the values have an effect; otherwise they may be null.
    """
    value = config.get(name, [0.5] * 3)
    if value is None and not is_used:
        return None
    values = value if isinstance(value, (list, tuple)) else [value] * 3
    if len(values) != 3 or not all(is_finite_number(number) for number in values):
        raise ValueError(f"{name} must be three numbers, got {value!r}")
    numbers = tuple(float(number) for number in values)
    if name == "image_std" and not torch.tensor(numbers, dtype=torch.float32).all():
        raise ValueError(f"image_std must be three nonzero numbers, got {value!r}")
    return numbers


def parse_rescale_factor(config: Mapping[str, Any], *, is_used: bool) -> float | None:
    """Parse `rescale_factor`, which may be null if it has no effect."""
    value = config.get("rescale_factor", 1 / 255)
    if value is None and not is_used:
        return None
    if not is_finite_number(value) or not value:
        raise ValueError(f"rescale_factor must be a nonzero number, got {value!r}")
    return float(value)


def is_count(value: object) -> TypeGuard[int]:
    """Return whether a value is an integer from 1 to `MAX_SIDE`."""
    return is_int(value) and 1 <= value <= MAX_SIDE


def is_finite_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a number that float32 can represent."""
    return is_number(value) and abs(value) < 1e30

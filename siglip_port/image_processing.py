"""An image becomes `pixel_values`, bit for bit as the image processors of transformers make them.

What is done follows the checkpoint's `preprocessor_config.json`; where that has no say, the rules
are those of docs/pixels.md. Sources: transformers 5.23 `image_processing_backends.py`,
`image_transforms.py`, `models/siglip*`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, NotRequired, TypedDict, TypeGuard, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from siglip_port.checkpoint.preprocessor_config import RESAMPLE
from siglip_port.extras import require
from siglip_port.image_reading import Backend, ImageError, ImageInput, to_rgb
from siglip_port.patches import pack

__all__ = [
    "Backend",
    "ImageError",
    "ImageInput",
    "ImageProcessor",
    "Pixels",
    "naflex_size",
    "to_rgb",
]

MAX_SIDE = 65536
"""The most pixels a side, and patches an image, that a configuration may ask for."""

RULES_VERSION = 1
"""To change one of the rules that no configuration has a say in is to change this number."""


class Pixels(TypedDict):
    """What a model takes: `model(**pixels)`.

    The last two, of NaFlex models, are those of `siglip_port.pack`.
    """

    pixel_values: Tensor
    pixel_attention_mask: NotRequired[Tensor]
    spatial_shapes: NotRequired[Tensor]


@dataclass(frozen=True)
class ImageProcessor:
    """Turns images into what a model takes. Made by `from_config`; small, and can be pickled.

    Attributes:
        size: (height, width) that every image is resized to; None for NaFlex.
        patch_size: of NaFlex models, in pixels; None for others.
        max_num_patches: of NaFlex models: an image is resized to at most so many, and padded to
            them.
        do_resize: whether images are resized at all.
        resample: Pillow's number of the filter.
        rescale_factor: what the values 0 to 255 are multiplied by; None for nothing.
        mean: subtracted afterwards, one number a channel; None for nothing.
        std: divided by; None for nothing.
        backend: whose arithmetic it is. `pil` gives the same bits on every machine. The results of
            `torchvision` depend on the processor's instructions, and differ by up to one of 255
            levels.
    """

    size: tuple[int, int] | None
    patch_size: int | None
    max_num_patches: int | None
    do_resize: bool
    resample: int
    rescale_factor: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    backend: Backend = "pil"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], backend: Backend = "pil") -> ImageProcessor:
        """Read the contents of a `preprocessor_config.json`; `model.preprocessor_config` is one.

        Args:
            config: of `SiglipImageProcessor` or `Siglip2ImageProcessor`.
            backend: `pil` or `torchvision`, which is an extra.

        Raises:
            ValueError: a field is not supported by these processors, or is of the wrong kind.
        """
        kind = str(config.get("image_processor_type", "SiglipImageProcessor"))
        if not kind.startswith(("Siglip2", "SiglipImage")):
            raise ValueError(f"image_processor_type must be that of SigLIP or SigLIP 2, got {kind}")
        naflex = kind.startswith("Siglip2")
        size = None if naflex else parse_size(config.get("size", (224, 224)))
        if config.get("do_center_crop") or config.get("do_pad"):
            raise ValueError(
                "the preprocessor crops or pads, as no SigLIP checkpoint does; set that to false"
            )
        resample = parse_resample(config, "bilinear" if naflex else "bicubic")
        check_backend(backend, resample)
        do_normalize = parse_flag(config, "do_normalize")
        patch_size: int | None = None
        max_num_patches: int | None = None
        rescale_factor: float | None = None
        mean: tuple[float, ...] | None = None
        std: tuple[float, ...] | None = None
        if naflex:
            patch_size = parse_count(config, "patch_size", 16)
            max_num_patches = parse_count(config, "max_num_patches", 256)
        do_resize = parse_flag(config, "do_resize")
        if parse_flag(config, "do_rescale"):
            rescale_factor = parse_rescale_factor(config)
        if do_normalize:
            mean = parse_channel_values(config, "image_mean")
            std = parse_channel_values(config, "image_std")
        return cls(
            size=size,
            patch_size=patch_size,
            max_num_patches=max_num_patches,
            do_resize=do_resize,
            resample=resample,
            rescale_factor=rescale_factor,
            mean=mean,
            std=std,
            backend=backend,
        )

    @property
    def factor(self) -> float:
        """What the values 0 to 255 are multiplied by, 1.0 for nothing."""
        return 1.0 if self.rescale_factor is None else self.rescale_factor

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with every choice that changes a pixel.

        Not with versions of decoders.
        """
        choices = json.dumps([RULES_VERSION, asdict(self)], sort_keys=True)
        return hashlib.sha256(choices.encode()).hexdigest()[:16]

    def __call__(self, images: ImageInput | Sequence[ImageInput]) -> Pixels:
        """Turn images into a batch: `model.embed(**processor(images))`.

        Args:
            images: one, or several.

        Returns:
            `pixel_values`, [B, 3, S, S], float32; for NaFlex packed patches, see
            `siglip_port.pack`.

        Raises:
            ImageError: an image cannot be read, or they have no common shape (without resizing).
        """
        several = as_list(images)
        pixels = []
        for number, image in enumerate(several):
            try:
                pixels.append(self.one(image))
            except ImageError as error:
                name = f"picture {number} of {len(several)}"
                if isinstance(image, (str, os.PathLike)):
                    name = str(image)
                raise ImageError(f"{name}: {error}") from error
        return self.batch(pixels)

    def one(self, image: ImageInput) -> Tensor:
        """Turn one image into [3, H, W], float32.

        Raises:
            ImageError: it cannot be read.
        """
        rgb = to_rgb(image, self.backend)
        size = None
        if self.do_resize:
            size = self.target_size(rgb.shape[1], rgb.shape[2])
        if self.backend == "torchvision":
            return self.transform_with_torchvision(torch.from_numpy(rgb.copy()), size)
        return self.transform_with_pillow(rgb, size)

    def batch(self, pixels: Sequence[Tensor]) -> Pixels:
        """Put what `one` returned into a batch.

        Raises:
            ImageError: there is none, they have no common shape, or more patches than fit.
        """
        if not pixels:
            raise ImageError("there are no images; pass at least one")
        if self.patch_size is not None:
            try:
                return cast("Pixels", pack(pixels, self.patch_size, self.max_num_patches))
            except ValueError as error:
                raise ImageError(str(error)) from error
        shapes = {tuple(image.shape[1:]) for image in pixels}
        if len(shapes) > 1:
            raise ImageError(f"without resizing, images must be of one size, got {sorted(shapes)}")
        return {"pixel_values": torch.stack(list(pixels))}

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) that an image of this height and width is resized to."""
        if self.size is not None:
            return self.size
        assert self.patch_size is not None
        assert self.max_num_patches is not None
        return naflex_size(height, width, self.patch_size, self.max_num_patches)

    def transform_with_pillow(self, rgb: NDArray[np.uint8], size: tuple[int, int] | None) -> Tensor:
        """Resize with Pillow, rescale and normalize with numpy: [3, H, W] -> the same, float32.

        Args:
            rgb: 0 to 255.
            size: (height, width) to resize to; None for no resizing.
        """
        if size is not None:
            height, width = size
            image = Image.fromarray(np.moveaxis(rgb, 0, -1))
            resized = image.resize((width, height), Image.Resampling(self.resample))
            rgb = np.moveaxis(np.asarray(resized), -1, 0)
        values = (rgb.astype(np.float64) * self.factor).astype(np.float32)
        if self.mean is not None and self.std is not None:
            mean = np.array(self.mean, dtype=np.float32)[:, None, None]
            std = np.array(self.std, dtype=np.float32)[:, None, None]
            values = (values - mean) / std
        return torch.from_numpy(np.ascontiguousarray(values))

    def transform_with_torchvision(self, rgb: Tensor, size: tuple[int, int] | None) -> Tensor:
        """Resize, rescale and normalize with torchvision: [3, H, W] -> the same, float32.

        Args:
            rgb: 0 to 255.
            size: (height, width) to resize to; None for no resizing.
        """
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional

        if size is not None:
            names = {number: name for name, number in RESAMPLE.items()}
            names[RESAMPLE["nearest"]] = "nearest-exact"  # which is Pillow's nearest
            mode = InterpolationMode(names[self.resample])
            rgb = functional.resize(rgb, list(size), interpolation=mode, antialias=True)
        if self.mean is None or self.std is None:
            return rgb.float() if self.rescale_factor is None else rgb * self.rescale_factor
        scale = 1.0 / self.factor
        mean = (torch.tensor(self.mean) * scale).tolist()
        std = (torch.tensor(self.std) * scale).tolist()
        values: Tensor = functional.normalize(rgb.float(), mean, std)
        return values


def as_list(images: ImageInput | Sequence[ImageInput]) -> list[ImageInput]:
    """Return one image or several, as several."""
    if isinstance(images, (list, tuple)):
        return list(images)
    return [cast("ImageInput", images)]


def move_pixels(pixels: Pixels, device: torch.device, *, pinned: bool = False) -> Pixels:
    """Copy a batch to a device.

    Args:
        pixels: on the CPU.
        device: where to.
        pinned: whether to copy by way of pinned memory, while this process goes on.
    """
    moved = {}
    for name, tensor in pixels.items():
        assert isinstance(tensor, Tensor)
        if pinned:
            tensor = tensor.pin_memory()
        moved[name] = tensor.to(device, non_blocking=pinned)
    return cast("Pixels", moved)


def naflex_size(height: int, width: int, patch_size: int, max_num_patches: int) -> tuple[int, int]:
    """Return the largest size of about the same shape that has at most so many patches.

    By the same bisection as the reference, to the last bit.

    Returns:
        (height, width), in pixels.
    """

    def scaled(scale: float, side: int) -> int:
        return max(patch_size, math.ceil(side * scale / patch_size) * patch_size)

    smallest = 1e-6
    largest = 100.0
    while largest - smallest >= 1e-5:
        scale = (smallest + largest) / 2
        rows = scaled(scale, height) / patch_size
        columns = scaled(scale, width) / patch_size
        if rows * columns <= max_num_patches:
            smallest = scale
        else:
            largest = scale
    return scaled(smallest, height), scaled(smallest, width)


# --- the configuration ----------------------------------------------------------------------------


def check_backend(backend: str, resample: int) -> None:
    """Raise ValueError or MissingExtraError unless a backend is installed and has a filter."""
    if backend not in ("pil", "torchvision"):
        raise ValueError(f"backend must be 'pil' or 'torchvision', got {backend!r}")
    if backend == "pil":
        return
    require("torchvision")
    installed = version("torchvision")
    release = tuple(int(number) for number in installed.split(".")[:2])
    if resample == RESAMPLE["lanczos"] and release < (0, 27):
        raise ValueError(f"torchvision has no Lanczos filter before 0.27, this is {installed}")


def parse_size(size: object) -> tuple[int, int]:
    """Read a size: (height, width). One number would be the shorter side's, and is refused."""
    sides: list[object] = []
    if isinstance(size, Mapping):
        sides = [size.get("height"), size.get("width")]
    elif isinstance(size, (list, tuple)):
        sides = list(size)
    if len(sides) == 2:
        height, width = sides
        if is_count(height) and is_count(width):
            return height, width
    raise ValueError(
        f"size must be {{'height': H, 'width': W}}, of 1 to {MAX_SIDE}, got {size!r}; SigLIP "
        "keeps no aspect ratio"
    )


def parse_resample(config: Mapping[str, Any], default: str) -> int:
    """Read Pillow's number of a filter."""
    value = config.get("resample", RESAMPLE[default])
    filters = sorted(RESAMPLE.values())
    if value not in filters or isinstance(value, bool):
        raise ValueError(f"resample must be one of {filters} (Pillow's filters), got {value!r}")
    return int(value)


def parse_flag(config: Mapping[str, Any], name: str) -> bool:
    """Read a flag; null means no, for the reference too."""
    value = config.get(name, True)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return bool(value)


def parse_count(config: Mapping[str, Any], name: str, default: int) -> int:
    """Read a number of pixels or patches."""
    value = config.get(name, default)
    if not is_count(value):
        raise ValueError(f"{name} must be a whole number from 1 to {MAX_SIDE}, got {value!r}")
    return value


def parse_channel_values(config: Mapping[str, Any], name: str) -> tuple[float, ...]:
    """Read one number a channel; a single one is that of all three."""
    value = config.get(name, [0.5] * 3)
    numbers = value if isinstance(value, (list, tuple)) else [value] * 3
    if len(numbers) != 3 or not all(is_finite_number(number) for number in numbers):
        raise ValueError(f"{name} must be three numbers, got {value!r}")
    if name == "image_std" and 0 in np.array(numbers, dtype=np.float32):
        raise ValueError(f"image_std must be three numbers other than 0, got {value!r}")
    return tuple(float(number) for number in numbers)


def parse_rescale_factor(config: Mapping[str, Any]) -> float:
    """Read what values are multiplied by."""
    value = config.get("rescale_factor", 1 / 255)
    if not is_finite_number(value) or not value:
        raise ValueError(f"rescale_factor must be a number other than 0, got {value!r}")
    return float(value)


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number from 1 to `MAX_SIDE`."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_SIDE


def is_finite_number(value: object) -> bool:
    """Whether a value is a number that fits into any float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 1e30

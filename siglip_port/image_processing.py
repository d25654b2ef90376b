"""Preprocessing: images to `pixel_values`, bit for bit as in transformers' image processors.

`backend="pil"` equals transformers' Pillow processors, `backend="torchvision"` its torchvision
processors. Options come from the checkpoint's `preprocessor_config.json`; docs/pixels.md describes
the rest. Sources: transformers 5.23 `image_processing_backends.py`, `image_transforms.py` and
`models/siglip*`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from siglip_port.config import SigLipVisionConfig
from siglip_port.extras import require
from siglip_port.image_options import RESAMPLE, ImageOptions, parse_options
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

RULES_VERSION = 1
"""Part of the fingerprint; increase it when a rule outside the configuration changes."""


class Pixels(TypedDict):
    """Keyword arguments of a model: `model(**pixels)`.

    NaFlex models also need the last two: see `siglip_port.pack`.
    """

    pixel_values: Tensor
    pixel_attention_mask: NotRequired[Tensor]
    spatial_shapes: NotRequired[Tensor]


@dataclass(frozen=True)
class ImageProcessor(ImageOptions):
    """Image processor, created by `from_config`; small and picklable.

    The other attributes are those of `siglip_port.image_options.ImageOptions`.

    Attributes:
        backend: `pil` gives the same bits on every machine. `torchvision` depends on the CPU's
            instruction set; results differ by up to 1 of 255 levels.
    """

    backend: Backend = "pil"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], backend: Backend = "pil") -> ImageProcessor:
        """Build a processor from `preprocessor_config.json` or `model.preprocessor_config`.

        Args:
            config: Configuration of `SiglipImageProcessor` or `Siglip2ImageProcessor`.
            backend: `pil`, or `torchvision` (needs the extra).

        Raises:
            ValueError: A field has an invalid or unsupported value.
            siglip_port.extras.MissingExtraError: torchvision is not installed.
        """
        options = parse_options(config)
        check_backend(backend, options.resample)
        return cls(**vars(options), backend=backend)

    @classmethod
    def for_model(
        cls, config: SigLipVisionConfig, preprocessor: Mapping[str, Any], backend: Backend = "pil"
    ) -> ImageProcessor:
        """Build the processor of a model: `from_config`, if the model takes RGB images.

        Args:
            config: Configuration of the model.
            preprocessor: Its `preprocessor_config`.
            backend: As for `from_config`.

        Raises:
            ValueError: The model takes images of another number of channels, for which no mean and
                std are defined, or see `from_config`.
        """
        if config.num_channels != 3:
            raise ValueError(
                "num_channels of the model must be 3 (RGB channels) to read images, got "
                f"{config.num_channels}; pass pixel_values to model.embed yourself"
            )
        return cls.from_config(preprocessor, backend)

    @property
    def factor(self) -> float:
        """Factor for values 0 to 255; 1.0 for no rescaling."""
        return 1.0 if self.rescale_factor is None else self.rescale_factor

    @property
    def fingerprint(self) -> str:
        """Hash of every option that affects pixels, 16 hexadecimal digits.

        Versions of image decoders are not included.
        """
        options = json.dumps([RULES_VERSION, asdict(self)], sort_keys=True)
        return hashlib.sha256(options.encode()).hexdigest()[:16]

    def __call__(self, images: ImageInput | Sequence[ImageInput]) -> Pixels:
        """Preprocess images into a batch: `model.embed(**processor(images))`.

        Args:
            images: One image or several.

        Returns:
            `pixel_values` [B, 3, H, W], float32, where (H, W) is `size`; for NaFlex, packed patches
            as from `siglip_port.pack`.

        Raises:
            ImageError: An image cannot be read, or sizes differ and `do_resize` is false.
        """
        pixels = []
        for number, image in enumerate(as_list(images)):
            try:
                pixels.append(self.one(image))
            except ImageError as error:
                name = f"images[{number}]"
                if isinstance(image, (str, os.PathLike)):
                    name = str(image)
                raise ImageError(f"{name}: {error}") from error
        return self.batch(pixels)

    def one(self, image: ImageInput) -> Tensor:
        """Preprocess one image: [3, H, W], float32.

        Raises:
            ImageError: The image cannot be read.
        """
        rgb = to_rgb(image, self.backend)
        size = None
        if self.do_resize:
            size = self.target_size(rgb.shape[1], rgb.shape[2])
        if self.backend == "torchvision":
            return self.transform_with_torchvision(torch.from_numpy(rgb.copy()), size)
        return self.transform_with_pillow(rgb, size)

    def batch(self, pixels: Sequence[Tensor]) -> Pixels:
        """Collate results of `one` into a batch.

        Raises:
            ImageError: There are no images, their sizes differ, or one has more than
                `max_num_patches` patches.
        """
        if not pixels:
            raise ImageError("images is empty; pass at least one image")
        if self.patch_size is not None:
            try:
                return cast("Pixels", pack(pixels, self.patch_size, self.max_num_patches))
            except ValueError as error:
                raise ImageError(str(error)) from error
        shapes = {tuple(image.shape[1:]) for image in pixels}
        if len(shapes) > 1:
            raise ImageError(
                f"images must have the same size if do_resize is false, got {sorted(shapes)}"
            )
        return {"pixel_values": torch.stack(list(pixels))}

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) to which an image of this size is resized, in pixels."""
        if self.size is not None:
            return self.size
        assert self.patch_size is not None
        assert self.max_num_patches is not None
        return naflex_size(height, width, self.patch_size, self.max_num_patches)

    def transform_with_pillow(self, rgb: NDArray[np.uint8], size: tuple[int, int] | None) -> Tensor:
        """Resize with Pillow, then rescale and normalize with NumPy: -> [3, H, W], float32.

        Args:
            rgb: Image [3, h, w], uint8.
            size: Target (height, width); None to keep the size.
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
        """Resize, rescale and normalize with torchvision: -> [3, H, W], float32.

        Args:
            rgb: Image [3, h, w], uint8.
            size: Target (height, width); None to keep the size.
        """
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional

        if size is not None:
            names = {number: name for name, number in RESAMPLE.items()}
            names[RESAMPLE["nearest"]] = "nearest-exact"  # as Pillow's nearest
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
    """Return images as a list; a single image becomes a list of one."""
    if isinstance(images, (list, tuple)):
        return list(images)
    return [cast("ImageInput", images)]


def move_pixels(pixels: Pixels, device: torch.device, *, pinned: bool = False) -> Pixels:
    """Copy a batch to a device.

    Args:
        pixels: Batch on the CPU.
        device: Target device.
        pinned: Whether to copy asynchronously from pinned memory.
    """
    result = {}
    for name, tensor in pixels.items():
        assert isinstance(tensor, Tensor)
        if pinned:
            tensor = tensor.pin_memory()
        result[name] = tensor.to(device, non_blocking=pinned)
    return cast("Pixels", result)


def naflex_size(height: int, width: int, patch_size: int, max_num_patches: int) -> tuple[int, int]:
    """Return the largest size with about the same aspect ratio and at most `max_num_patches`.

    Uses the same bisection as transformers, with identical results.

    Returns:
        (height, width) in pixels, multiples of `patch_size`.
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


def check_backend(backend: str, resample: int) -> None:
    """Raise ValueError or MissingExtraError unless the backend supports the resampling filter."""
    if backend not in ("pil", "torchvision"):
        raise ValueError(f"backend must be 'pil' or 'torchvision', got {backend!r}")
    if backend == "pil":
        return
    require("torchvision")
    installed = version("torchvision")
    release = tuple(int(number) for number in installed.split(".")[:2])
    if resample == RESAMPLE["lanczos"] and release < (0, 27):
        raise ValueError(
            f"resample={resample} (Lanczos) needs torchvision 0.27 or newer, got {installed}; "
            "upgrade it or use backend='pil'"
        )

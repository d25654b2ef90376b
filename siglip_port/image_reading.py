"""Reading images of any kind as RGB arrays, with the same results as transformers."""

from __future__ import annotations

import io
import os
import re
import stat
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

ImageInput = str | os.PathLike[str] | bytes | Image.Image | NDArray[Any] | Tensor
"""A path, an encoded file (bytes), a PIL image, or a uint8 array or tensor.

Arrays and tensors are [H, W], [H, W, C] or [C, H, W] with C of 1, 3 or 4.
"""

Backend = Literal["pil", "torchvision"]

URL = re.compile(r"[a-z][a-z0-9+.-]+:/|data:", re.ASCII | re.IGNORECASE)
"""Start of a URL, also after `Path` has removed a slash; drives of Windows have only one letter."""

MAX_FILE_BYTES = 4 << 30
"""Limit on file size; larger than any uncompressed image that Pillow opens."""


class ImageError(ValueError):
    """An image cannot be used; the message gives the reason."""


def to_rgb(image: ImageInput, backend: Backend = "pil") -> NDArray[np.uint8]:
    """Read an image as RGB: uint8, [3, H, W], 0 to 255.

    Files are rotated by their EXIF orientation, transparency is composited on white, the first
    frame of an animation is used, and other modes are converted by Pillow's `convert`.

    Args:
        image: Image of any supported kind.
        backend: Backend whose rounding applies to transparent arrays and tensors.

    Raises:
        ImageError: The image is damaged, unsupported, or exceeds Pillow's limit on pixels.
    """
    if isinstance(image, (Tensor, np.ndarray)):
        return array_to_rgb(image, backend)
    try:
        if isinstance(image, (str, os.PathLike)):
            image = read_file(image)
        if isinstance(image, bytes):
            image = open_upright(image)
        return pillow_to_rgb(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:  # its own message contains a memory address
        raise ImageError(
            "the image cannot be read: not an image format that Pillow supports"
        ) from error
    except Exception as error:  # Pillow's decoders raise many types
        raise ImageError(
            f"the image cannot be read: {str(error).strip() or type(error).__name__}"
        ) from error


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Read a file.

    Raises:
        ImageError: The file does not exist, is not readable, is a URL or a folder, or is not a
            regular file (a pipe or device may never end).
    """
    try:
        if is_url(path):
            raise ImageError(
                "the image cannot be read: it is a URL; download it first, or pass its bytes"
            )
        status = Path(path).stat()
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(
                "the image cannot be read: not a regular file but a folder; pass its files, or use "
                "siglip-port embed"
            )
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("the image cannot be read: not a regular file")
        check_file_size(status.st_size)
        return Path(path).read_bytes()
    except ImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: the path contains a null byte
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"the image cannot be read: {reason}") from error


def is_url(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a URL, such as `https://...` or `s3://...`, and no existing file."""
    return URL.match(os.fspath(path)) is not None and not Path(path).exists()


def check_file_size(size: int) -> None:
    """Check the size of a file, in bytes, before it is read.

    Raises:
        ImageError: The file is larger than `MAX_FILE_BYTES`.
    """
    if size > MAX_FILE_BYTES:
        raise ImageError(
            f"the image cannot be read: file size {size:,} bytes exceeds the limit of "
            f"{MAX_FILE_BYTES:,}"
        )


def open_upright(content: bytes) -> Image.Image:
    """Open an encoded file and rotate it by its EXIF orientation."""
    image = Image.open(io.BytesIO(content))
    if image.format == "EPS":
        raise ImageError("the image cannot be read: EPS is not supported (it is a program)")
    return ImageOps.exif_transpose(image)


def pillow_to_rgb(image: object) -> NDArray[np.uint8]:
    """Convert a PIL image, composited on white: uint8, [3, H, W]."""
    if not isinstance(image, Image.Image):
        raise ImageError(
            "an image must be a path, bytes, a PIL image, an array or a tensor, got "
            f"{type(image).__name__}"
        )
    if 0 in image.size:
        raise ImageError("the image has no pixels")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.moveaxis(np.asarray(image.convert("RGB")), -1, 0)


def array_to_rgb(image: NDArray[Any] | Tensor, backend: Backend) -> NDArray[np.uint8]:
    """Convert a uint8 array or tensor, composited on white: uint8, [3, H, W]."""
    uint8 = torch.uint8 if isinstance(image, Tensor) else np.uint8
    if image.dtype != uint8:
        raise ImageError(
            f"an array or tensor must be uint8, 0 to 255, got {image.dtype}; pass normalized "
            "images directly to the model"
        )
    if isinstance(image, Tensor):
        image = image.detach().cpu().numpy()
    array: NDArray[np.uint8] = image
    if array.ndim == 2:
        array = array[None]
    channels = {1, 3, 4}
    if array.ndim != 3 or 0 in array.shape or not channels & {array.shape[0], array.shape[2]}:
        raise ImageError(
            "an array or tensor must be [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels, "
            f"got {list(array.shape)}"
        )
    if array.shape[0] not in channels:  # channels first if ambiguous, as in transformers
        array = np.moveaxis(array, -1, 0)
    if len(array) == 1:
        return np.repeat(array, 3, axis=0)
    if len(array) == 4:
        return composite_on_white(array, backend)
    return array


def composite_on_white(rgba: NDArray[np.uint8], backend: Backend) -> NDArray[np.uint8]:
    """Composite on white, [4, H, W] -> [3, H, W]; the backends round differently."""
    if backend == "torchvision":
        from torchvision.transforms.v2 import functional

        image: Tensor = functional.to_dtype(
            torch.from_numpy(rgba.copy()), torch.float32, scale=True
        )
        blended = image[:3] * image[3:] + (1 - image[3:])
        rgb: NDArray[np.uint8] = functional.to_dtype(blended, torch.uint8, scale=True).numpy()
        return rgb
    alpha = rgba[3:] / 255
    return np.round(alpha * rgba[:3] + (1 - alpha) * 255).astype(np.uint8)

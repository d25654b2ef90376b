"""An image of any kind becomes an RGB array, as the image processors of transformers read it."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

ImageInput = str | os.PathLike[str] | bytes | Image.Image | NDArray[Any] | Tensor
"""A file, its contents, or an image of Pillow's.

Or uint8, [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels.
"""

Backend = Literal["pil", "torchvision"]

MAX_FILE_BYTES = 4 << 30
"""More than the largest file that Pillow opens would take, uncompressed."""


class ImageError(ValueError):
    """An image cannot be used; the message says why."""


def to_rgb(image: ImageInput, backend: Backend = "pil") -> NDArray[np.uint8]:
    """Read an image: [3, H, W], 0 to 255.

    Files are turned as their EXIF orientation says; what is transparent becomes white; of several
    frames, the first is taken; all other kinds of pixels become RGB as Pillow's `convert` does it.

    Args:
        image: any.
        backend: whose arithmetic lays arrays and tensors with transparency onto white.

    Raises:
        ImageError: it cannot be read: damaged, no image, or so large that Pillow takes it for an
            attack.
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
    except UnidentifiedImageError as error:  # whose own message names an object in memory
        raise ImageError("the image cannot be read: it is of no kind that Pillow knows") from error
    except Exception as error:
        # Pillow's own kinds, the system's, and those of its decoders, of all kinds.
        raise ImageError(
            f"the image cannot be read: {str(error).strip() or type(error).__name__}"
        ) from error


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Read a file.

    Raises:
        ImageError: it is not there, may not be read, or is no regular file: pipes and devices may
            never end.
    """
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("the image cannot be read: it is no regular file")
        check_file_size(status.st_size)
        return Path(path).read_bytes()
    except ImageError:
        raise
    except (OSError, ValueError) as error:  # the latter of names with a null in them
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"the image cannot be read: {reason}") from error


def check_file_size(size: int) -> None:
    """Refuse a file of so many bytes before it is read.

    Raises:
        ImageError: it is larger than any image that Pillow opens.
    """
    if size > MAX_FILE_BYTES:
        raise ImageError(
            f"the image cannot be read: {size:,} bytes, more than the {MAX_FILE_BYTES:,} of the "
            "largest"
        )


def open_upright(content: bytes) -> Image.Image:
    """Open the contents of a file, turned as its EXIF orientation says."""
    image = Image.open(io.BytesIO(content))
    if image.format == "EPS":
        raise ImageError("the image cannot be read: PostScript is a program, and is not run")
    return ImageOps.exif_transpose(image)


def pillow_to_rgb(image: object) -> NDArray[np.uint8]:
    """Return the pixels of an image of Pillow's, laid onto white: [3, H, W]."""
    if not isinstance(image, Image.Image):
        raise ImageError(
            f"an image must be a path, bytes, a PIL image, an array or a tensor, got {type(image)}"
        )
    if 0 in image.size:
        raise ImageError("the image has no pixels")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.moveaxis(np.asarray(image.convert("RGB")), -1, 0)


def array_to_rgb(image: NDArray[Any] | Tensor, backend: Backend) -> NDArray[np.uint8]:
    """Return an array or tensor as [3, H, W], laid onto white."""
    uint8 = torch.uint8 if isinstance(image, Tensor) else np.uint8
    if image.dtype != uint8:
        raise ImageError(
            f"an array or tensor must be of uint8, 0 to 255, got {image.dtype}; what is already "
            "normalized needs no preprocessing: pass it to the model as it is"
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
    if array.shape[0] not in channels:  # where both can be, the first are, as for the reference
        array = np.moveaxis(array, -1, 0)
    if len(array) == 1:
        return np.repeat(array, 3, axis=0)
    if len(array) == 4:
        return composite_on_white(array, backend)
    return array


def composite_on_white(rgba: NDArray[np.uint8], backend: Backend) -> NDArray[np.uint8]:
    """[4, H, W] -> [3, H, W]. The backends round differently."""
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

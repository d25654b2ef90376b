"""Sample images of all sizes, modes and types."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Sample = str | Image.Image | NDArray[np.uint8] | Tensor
"""Input of an image processor: path, PIL image, array [H, W, C] or tensor [C, H, W]."""

EXIF_ORIENTATION = 0x0112
QUARTER_TURN = 6  # common in images from phones


def sample_images(image: Image.Image) -> Iterator[tuple[str, Sample]]:
    """Yield (name, sample) for all samples derived from one image.

    Args:
        image: Image of any size and mode.
    """
    image = image.convert("RGB")
    small = image.resize((60, 50))
    random = np.random.default_rng(0)
    yield from samples_of_all_sizes(image)
    yield "noise", Image.fromarray(random.integers(0, 256, (70, 90, 3), dtype=np.uint8))
    for mode in ("1", "L", "P", "CMYK", "YCbCr", "F"):
        yield mode, small.convert(mode)
    yield "I;16", Image.fromarray(np.arange(3000, dtype=np.uint16).reshape(50, 60) * 20)
    yield from samples_with_transparency(small, random)
    yield "JPEG", round_trip(image, "JPEG")
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/turned.jpg"
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = QUARTER_TURN
        image.save(path, exif=exif)
        yield "JPEG with EXIF rotation", path
    array = np.array(small)
    yield "array [H, W, 3]", array
    yield "array [H, W, 4]", random.integers(0, 256, (50, 60, 4), dtype=np.uint8)
    yield "tensor [3, H, W]", torch.from_numpy(array).movedim(-1, 0).contiguous()


def samples_of_all_sizes(image: Image.Image) -> Iterator[tuple[str, Image.Image]]:
    """Yield the image, and portrait, thin, tiny and large versions."""
    width, height = image.size
    yield "the image", image
    yield "portrait", image.resize((height // 3 + 1, width))
    yield "2 x 199 pixels", image.resize((2, 199))
    yield "1 x 1 pixel", image.resize((1, 1))
    yield "1111 x 901 pixels", image.resize((1111, 901))


def samples_with_transparency(
    image: Image.Image, random: np.random.Generator
) -> Iterator[tuple[str, Image.Image]]:
    """Yield the image with a noise alpha channel, and with one transparent palette color."""
    translucent = image.copy()
    translucent.putalpha(Image.fromarray(random.integers(0, 256, (50, 60), dtype=np.uint8)))
    yield "RGBA", translucent
    yield "LA", translucent.convert("LA")
    palette = image.quantize(16)
    palette.info["transparency"] = 3
    yield "P with transparency", palette


def round_trip(image: Image.Image, file_format: str) -> Image.Image:
    """Encode and decode an image."""
    file = io.BytesIO()
    image.save(file, file_format)
    return Image.open(io.BytesIO(file.getvalue()))


def synthetic_image() -> Image.Image:
    """Return a smooth synthetic image with every level and no symmetry."""
    levels = np.random.default_rng(1).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((451, 300), Image.Resampling.BICUBIC)

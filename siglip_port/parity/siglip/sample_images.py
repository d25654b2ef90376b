"""Images in every shape and mode that a file can bring."""

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
"""What an image processor takes: a path, an image, [H, W, C] or [C, H, W]."""

EXIF_ORIENTATION = 0x0112
QUARTER_TURN = 6  # as phones have it


def sample_images(image: Image.Image) -> Iterator[tuple[str, Sample]]:
    """All samples made of one image: their names, and what an image processor takes.

    Args:
        image: of any size and mode.
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
    yield "a JPEG file", read_again(image, "JPEG")
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/turned.jpg"
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = QUARTER_TURN
        image.save(path, exif=exif)
        yield "a JPEG file that lies on its side", path
    array = np.array(small)
    yield "an array", array
    yield "an array with transparency", random.integers(0, 256, (50, 60, 4), dtype=np.uint8)
    yield "a tensor, channels first", torch.from_numpy(array).movedim(-1, 0).contiguous()


def samples_of_all_sizes(image: Image.Image) -> Iterator[tuple[str, Image.Image]]:
    """The image, upright, thin, tiny and large."""
    width, height = image.size
    yield "the image", image
    yield "upright", image.resize((height // 3 + 1, width))
    yield "a thin line", image.resize((2, 199))
    yield "one pixel", image.resize((1, 1))
    yield "larger than any encoder's", image.resize((1111, 901))


def samples_with_transparency(
    image: Image.Image, random: np.random.Generator
) -> Iterator[tuple[str, Image.Image]]:
    """The image with an alpha channel of noise, and with a palette of which one color is clear."""
    clear = image.copy()
    clear.putalpha(Image.fromarray(random.integers(0, 256, (50, 60), dtype=np.uint8)))
    yield "RGBA", clear
    yield "LA", clear.convert("LA")
    palette = image.quantize(16)
    palette.info["transparency"] = 3
    yield "P, transparent", palette


def read_again(image: Image.Image, file_format: str) -> Image.Image:
    """The image, written and read."""
    file = io.BytesIO()
    image.save(file, file_format)
    return Image.open(io.BytesIO(file.getvalue()))


def synthetic_image() -> Image.Image:
    """An image where there is no image: smooth, with every level, and no two sides alike."""
    levels = np.random.default_rng(1).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((451, 300), Image.Resampling.BICUBIC)

"""Sample images of all sizes, modes and types."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageChops
from torch import Tensor

Sample = str | bytes | Image.Image | NDArray[np.uint8] | Tensor
"""Input of an image processor: path, encoded file, PIL image, array [H, W, C] or tensor."""

EXIF_ORIENTATION = 0x0112
ORIENTATIONS = range(1, 9)
QUARTER_TURN = 6  # common in images from phones
ANIMATED = ("GIF", "PNG", "WEBP")


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
    # `convert` uses three of the four colors.
    printed = Image.fromarray(random.integers(0, 256, (50, 60, 4), dtype=np.uint8), "CMYK")
    yield "CMYK with black", printed
    yield "JPEG of CMYK", encode(printed, "JPEG")
    yield from samples_with_transparency(small, random)
    yield "JPEG", round_trip(image, "JPEG")
    yield from encoded_files(small)
    yield "PIL image with EXIF rotation", turned_image(small)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/turned.jpg"
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = QUARTER_TURN
        image.save(path, exif=exif)
        yield "JPEG with EXIF rotation", path
    large = image.resize((2403, 2101), Image.Resampling.BILINEAR)
    yield "JPEG of 2403 x 2101 pixels", encode(large, "JPEG")
    yield from arrays(np.array(small), random)


ARRAY_SHAPES = ((50, 60, 4), (50, 60, 1), (1, 50, 60), (3, 50, 60), (3, 50, 3), (50, 3, 3))
"""Shapes of arrays; three channels come first where both ends could be channels."""


def arrays(array: NDArray[np.uint8], random: np.random.Generator) -> Iterator[tuple[str, Sample]]:
    """Yield arrays and tensors with channels first and last, and in other memory layouts."""
    yield "array [H, W, 3]", array
    yield "tensor [3, H, W]", torch.from_numpy(array).movedim(-1, 0).contiguous()
    yield "tensor [3, H, W] of channels last", torch.from_numpy(array).movedim(-1, 0)
    yield "array [H, W, 3] in Fortran order", np.asfortranarray(array)
    for shape in ARRAY_SHAPES:
        yield f"array {list(shape)}", random.integers(0, 256, shape, dtype=np.uint8)


def samples_of_all_sizes(image: Image.Image) -> Iterator[tuple[str, Image.Image]]:
    """Yield the image, and portrait, thin, tiny and large versions."""
    width, height = image.size
    yield "the image", image
    yield "portrait", image.resize((height // 3 + 1, width))
    yield "2 x 199 pixels", image.resize((2, 199))
    yield "1 x 1 pixel", image.resize((1, 1))
    yield "1111 x 901 pixels", image.resize((1111, 901))
    yield "2403 x 2101 pixels", image.resize((2403, 2101), Image.Resampling.NEAREST)
    yield "448 x 112 pixels", image.resize((448, 112))  # as many as 224 x 224


def samples_with_transparency(
    image: Image.Image, random: np.random.Generator
) -> Iterator[tuple[str, Image.Image]]:
    """Yield the image with a noise alpha channel, and with one transparent palette color."""
    translucent = image.copy()
    shape = (image.height, image.width)
    translucent.putalpha(Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)))
    yield "RGBA", translucent
    yield "LA", translucent.convert("LA")
    half = image.copy()
    half.putalpha(128)
    yield "RGBA at half opacity", half
    for index in (3, 0):
        palette = image.quantize(16)
        palette.info["transparency"] = index
        yield f"P with transparency {index}", palette


def encoded_files(image: Image.Image) -> Iterator[tuple[str, bytes]]:
    """Yield files with every EXIF orientation, and animations whose second frame is inverted."""
    for orientation in ORIENTATIONS:
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        yield f"JPEG with EXIF orientation {orientation}", encode(image, "JPEG", exif=exif)
    inverted = ImageChops.invert(image)
    for file_format in ANIMATED:
        frames: dict[str, Any] = {"save_all": True, "append_images": [inverted], "duration": 100}
        if file_format == "WEBP":
            frames["lossless"] = True
        yield f"animated {file_format}", encode(image, file_format, **frames)


def turned_image(image: Image.Image) -> Image.Image:
    """Return an opened image with an EXIF orientation, which only files are turned by."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = QUARTER_TURN
    return round_trip(image, "JPEG", exif=exif)


def entrance_images() -> list[tuple[str, Sample]]:
    """Return small images of every kind and one large one, for entrances that run a model."""
    small = synthetic_image().resize((23, 17))
    random = np.random.default_rng(2)
    array = random.integers(0, 256, (17, 23, 3), dtype=np.uint8)
    images: list[tuple[str, Sample]] = [*encoded_files(small)]
    images.append(("PIL image with EXIF rotation", turned_image(small)))
    images += [(mode, small.convert(mode)) for mode in ("RGB", "1", "L", "P", "CMYK")]
    images.append(("I;16", Image.fromarray(np.arange(400, dtype=np.uint16).reshape(25, 16) * 150)))
    images += samples_with_transparency(small, random)
    images.append(("array [H, W, 3]", array))
    images.append(("tensor [3, H, W]", torch.from_numpy(array.copy()).movedim(-1, 0).contiguous()))
    images.append(("2503 x 40 pixels", small.resize((2503, 40))))
    images.append(("64 x 16 pixels", small.resize((64, 16))))  # as many as 32 x 32
    return images


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:  # noqa: ANN401 (Pillow's)
    """Encode an image."""
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def round_trip(
    image: Image.Image,
    file_format: str,
    **options: Any,  # noqa: ANN401 (Pillow's)
) -> Image.Image:
    """Encode and decode an image."""
    return Image.open(io.BytesIO(encode(image, file_format, **options)))


def synthetic_image() -> Image.Image:
    """Return a smooth synthetic image with every level and no symmetry."""
    levels = np.random.default_rng(1).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((451, 300), Image.Resampling.BICUBIC)

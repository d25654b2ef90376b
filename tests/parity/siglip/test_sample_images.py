from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps
from torch import Tensor

from siglip_port.parity.siglip.sample_images import (
    encoded_files,
    entrance_images,
    sample_images,
    synthetic_image,
)


def test_sample_images_have_every_mode() -> None:
    samples = dict(sample_images(synthetic_image()))
    assert len(samples) == 47
    modes = {sample.mode for sample in samples.values() if isinstance(sample, Image.Image)}
    assert modes == {"1", "L", "P", "RGB", "CMYK", "YCbCr", "F", "I;16", "RGBA", "LA"}


def test_synthetic_image_has_every_level() -> None:
    bands = synthetic_image().split()
    assert [band.getextrema() for band in bands] == [(0, 255)] * 3


def test_files_have_every_orientation() -> None:
    image = synthetic_image().resize((23, 17))
    files = dict(encoded_files(image))
    upright = [ImageOps.exif_transpose(open_file(file)) for file in list(files.values())[:8]]
    sizes = [file.size for file in upright]
    assert sizes == [(23, 17)] * 4 + [(17, 23)] * 4
    assert len({file.tobytes() for file in upright}) == 8


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP"])
def test_animations_have_two_frames(file_format: str) -> None:
    files = dict(encoded_files(synthetic_image().resize((23, 17))))
    image = open_file(files[f"animated {file_format}"])
    first = image.convert("RGB").tobytes()
    image.seek(1)
    assert image.convert("RGB").tobytes() != first


def test_images_of_entrances_have_every_kind() -> None:
    images = dict(entrance_images())
    kinds = {type(image) for image in images.values()}
    assert {bytes, Image.Image, np.ndarray, Tensor} <= kinds
    assert max(max(i.size) for i in images.values() if isinstance(i, Image.Image)) > 2000


def open_file(content: bytes) -> Image.Image:
    """Decode a file."""
    return Image.open(io.BytesIO(content))

from __future__ import annotations

from PIL import Image

from siglip_port.parity.siglip.sample_images import sample_images, synthetic_image


def test_sample_images_have_every_mode() -> None:
    samples = dict(sample_images(synthetic_image()))
    assert len(samples) == 21
    modes = {sample.mode for sample in samples.values() if isinstance(sample, Image.Image)}
    assert modes == {"1", "L", "P", "RGB", "CMYK", "YCbCr", "F", "I;16", "RGBA", "LA"}


def test_synthetic_image_has_every_level() -> None:
    bands = synthetic_image().split()
    assert [band.getextrema() for band in bands] == [(0, 255)] * 3

"""Images that have no right pixels: the port refuses them, instead of computing something."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from siglip_port.image_processing import ImageProcessor
from siglip_port.parity.results import Finding
from siglip_port.parity.siglip.entrances.subject import Subject
from siglip_port.parity.siglip.pixels import pixel_finding
from siglip_port.parity.siglip.sample_images import encode, synthetic_image


def check_refused_images(subject: Subject) -> Iterator[Finding]:
    """Preprocess arrays that are not images of 8 bits, and damaged files."""
    for backend in subject.expected.pixels:
        processor = ImageProcessor.from_config(subject.port.preprocessor_config, backend)
        for name, image in invalid_images().items():
            try:
                processor(image)
            except ValueError:
                continue
            yield pixel_finding(f"{name}, {backend}: accepted, expected an ImageError", "")


def invalid_images() -> Mapping[str, Any]:
    """Return what is no image, by name."""
    image = synthetic_image()
    levels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    jpeg, png = encode(image, "JPEG"), encode(image, "PNG")
    return {
        "an array of floats from 0 to 1": levels / 255,
        "an array of 16 bits": levels.astype(np.uint16) * 257,
        "a tensor of floats": torch.from_numpy(levels / 255),
        "an array without rows": levels[:0],
        "a JPEG file that is cut off": jpeg[: len(jpeg) // 2],
        "a PNG file that is cut off": png[: len(png) // 2],
        "no bytes": b"",
        "bytes of text": b"no image",
    }

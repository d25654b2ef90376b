"""Inputs that have no right result: the port refuses them, instead of computing something."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from siglip_port.image_processing import ImageProcessor
from siglip_port.parity.results import Finding
from siglip_port.parity.siglip.entrances.subject import Subject
from siglip_port.parity.siglip.pixels import pixel_finding
from siglip_port.parity.siglip.sample_images import encode, synthetic_image


def check_refused_pixels(subject: Subject) -> Iterator[Finding]:
    """Pass pixels that are not finite, not normalized, or of another shape."""
    batch = subject.expected.batches[0]
    for name, pixel_values in invalid_pixels(batch.inputs["pixel_values"]).items():
        for method in (subject.port.forward, subject.port.embed):
            try:
                method(**{**batch.inputs, "pixel_values": pixel_values})
            except ValueError:
                continue
            yield Finding(f"{method.__name__} accepts pixels {name}, expected ValueError")


def invalid_pixels(pixels: Tensor) -> Mapping[str, Tensor]:
    """Return pixels, by what is wrong with them."""
    invalid = {}
    for name, value in (("that are NaN", torch.nan), ("that are Inf", torch.inf)):
        invalid[name] = pixels.clone()
        invalid[name].view(-1)[-1] = value
    invalid["from 0 to 255"] = 127.5 * (pixels + 1)
    invalid["of one dimension"] = pixels.flatten()
    invalid["that are integers"] = pixels.to(torch.uint8)
    return invalid


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

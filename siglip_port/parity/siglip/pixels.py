"""The gate `pixels`: images become the same numbers by the port's processors and the reference's.

Bit for bit. All other gates give both sides the same pixels, so this one alone says whether it is
the pixels that differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from siglip_port.image_processing import Backend, ImageProcessor
from siglip_port.parity.gates import MEANING
from siglip_port.parity.metrics import cosine, tensors_equal
from siglip_port.parity.results import Finding, GateResult
from siglip_port.parity.siglip.sample_images import Sample, sample_images

Embed = Callable[..., Tensor]
"""`SigLipVisionModel.embed`: a batch by name -> vectors, [B, D]."""

Pixels = Mapping[str, Tensor]
"""What a processor makes of an image: `pixel_values`, and for NaFlex models mask and shapes."""

ReferenceProcessors = Mapping[Backend, Callable[[Sample], Pixels]]
"""The reference's processors, by backend."""

CHANGES: dict[str, dict[str, Any]] = {
    "resample=0": {"resample": 0},
    "resample=1": {"resample": 1},
    "resample=2": {"resample": 2},
    "resample=3": {"resample": 3},
    "the other backend": {},
    "no normalization": {"mean": None, "std": None},
    "mean and std of 0.5": {"mean": (0.5,) * 3, "std": (0.5,) * 3},
    "mean and std of ImageNet": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    "a factor of 1/255": {"rescale_factor": 1 / 255},
    "no resizing": {"do_resize": False},
}
"""What the reference's processor can have that the port's has not."""


def check_pixels(
    processors: Mapping[Backend, ImageProcessor],
    reference_processors: ReferenceProcessors,
    image: Image.Image,
    embed: Embed | None = None,
    max_hints: int = 1,
) -> GateResult:
    """Compare what both sides make of `sample_images`.

    Args:
        processors: the port's, by backend.
        reference_processors: the reference's, by the same backends.
        image: any image.
        embed: the port, to say what a difference in pixels does to a vector; None for a model
            without.
        max_hints: how many differences, of each backend, get a hint, and the cosine.
    """
    checked = 0
    findings = []
    for backend, processor in processors.items():
        hints = 0
        for name, sample in sample_images(image):
            checked += 1
            difference = compare_image(processor, reference_processors[backend], sample)
            if difference is None:
                continue
            hint = ""
            message = difference.message
            if difference.pixels is not None and hints < max_hints:
                hints += 1
                message += describe_cost(embed, *difference.pixels)
                hint = find_hint(processor, sample, difference.pixels[1])
            findings.append(pixel_finding(f"{name}, {backend}: {message}", hint))
    return GateResult("pixels", checked, MEANING["pixels"].bound, tuple(findings))


def pixel_finding(message: str, hint: str) -> Finding:
    """A finding of this gate, which has one address."""
    return Finding(message, "pixel_values", "siglip_port.image_processing", hint=hint)


@dataclass(frozen=True)
class Difference:
    """What is not the same of one image.

    Attributes:
        message: in words.
        pixels: those of the port and of the reference; None where one of them has none.
    """

    message: str
    pixels: tuple[Pixels, Pixels] | None = None


def compare_image(
    processor: ImageProcessor, reference_processor: Callable[[Sample], Pixels], image: Sample
) -> Difference | None:
    """Compare what two processors make of one image; None where it is the same."""
    try:
        pixels = process(processor, image)
        expected = dict(reference_processor(image))
    except Exception as error:  # whatever it is, one of the two cannot take the image
        return Difference(f"{type(error).__name__}: {error}")
    message = compare_pixels(pixels, expected, levels_per_unit(processor))
    if not message:
        return None
    return Difference(message, (pixels, expected))


def process(processor: ImageProcessor, image: Sample) -> Pixels:
    """What the port's processor makes of one image."""
    return cast(dict[str, Tensor], processor(image))


def levels_per_unit(processor: ImageProcessor) -> float:
    """How many of an image's 255 levels make a difference of 1 in the pixels, at most."""
    std = max(processor.std or (1.0,))
    return std / (processor.rescale_factor or 1.0)


def compare_pixels(pixels: Pixels, expected: Pixels, levels: float = 1.0) -> str:
    """Say what is not the same in two batches; empty where everything is.

    Args:
        pixels: the port's.
        expected: the reference's.
        levels: see `levels_per_unit`.
    """
    if pixels.keys() != expected.keys():
        return f"gives {', '.join(pixels)}, expected {', '.join(expected)}"
    for name, tensor in pixels.items():
        other = torch.as_tensor(expected[name])
        if tensor.shape != other.shape:
            return f"{name} of shape {list(tensor.shape)}, expected {list(other.shape)}"
        if name == "pixel_values":
            message = compare_values(tensor, other, levels)
            if message:
                return message
        elif not torch.equal(tensor.long(), other.long()):
            return f"{name} is not the same"
    return ""


def compare_values(values: Tensor, expected: Tensor, levels: float) -> str:
    """Say by how much two `pixel_values` of one shape differ; empty where no bit does."""
    if values.dtype != expected.dtype:
        return f"pixel_values are {values.dtype}, expected {expected.dtype}"
    if tensors_equal(values, expected):
        return ""
    differences = (values.double() - expected.double()).abs() * levels
    share = (differences > 0).double().mean()
    return f"differs by up to {differences.max():.3g} of 255 levels, in {share:.0%} of all values"


def describe_cost(embed: Embed | None, pixels: Pixels, expected: Pixels) -> str:
    """Say what a difference in pixels does to the port's vectors."""
    if embed is None or shapes_of(pixels) != shapes_of(expected):
        return ""
    with torch.inference_mode():
        similarity = cosine(embed(**pixels), embed(**expected))
    return f"; the port's vectors of the two have a cosine of {float(similarity.min()):.6f}"


def shapes_of(pixels: Pixels) -> dict[str, torch.Size]:
    """The shape of every tensor."""
    return {name: tensor.shape for name, tensor in pixels.items()}


def find_hint(processor: ImageProcessor, image: Sample, expected: Pixels) -> str:
    """What to change in the port's processor to have it as expected; empty if nothing known."""
    for name, changed in changed_processors(processor):
        try:
            pixels = process(changed, image)
        except (ValueError, RuntimeError):
            continue
        if not compare_pixels(pixels, expected):
            return f"the reference has {name}"
    return ""


def changed_processors(processor: ImageProcessor) -> Iterator[tuple[str, ImageProcessor]]:
    """The processor with each of `CHANGES`."""
    for name, change in CHANGES.items():
        if name == "the other backend":
            backend: Backend = "pil" if processor.backend == "torchvision" else "torchvision"
            yield name, replace(processor, backend=backend)
        elif name != f"resample={processor.resample}":
            yield name, replace(processor, **change)

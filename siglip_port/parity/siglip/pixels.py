"""The gate `pixels`: the image processors of port and reference give the same bits.

All other gates run both sides on the same pixels, so only this one sees differences in
preprocessing.
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
from siglip_port.parity.sides import PORT_ERRORS
from siglip_port.parity.siglip.sample_images import Sample, sample_images

Embed = Callable[..., Tensor]
"""`SigLipVisionModel.embed`: batch by name -> embeddings, [B, D]."""

Pixels = Mapping[str, Tensor]
"""Output of an image processor: `pixel_values`, and for NaFlex models mask and shapes."""

ReferenceProcessors = Mapping[Backend, Callable[[Sample], Pixels]]
"""Image processors of the reference, by backend."""

CHANGES: dict[str, dict[str, Any]] = {
    "resample=0": {"resample": 0},
    "resample=1": {"resample": 1},
    "resample=2": {"resample": 2},
    "resample=3": {"resample": 3},
    "the other backend": {},
    "no normalization": {"mean": None, "std": None},
    "mean=std=0.5": {"mean": (0.5,) * 3, "std": (0.5,) * 3},
    "mean and std of ImageNet": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    "rescale_factor=1/255": {"rescale_factor": 1 / 255},
    "do_resize=False": {"do_resize": False},
}
"""Settings that the reference's processor may have, for hints."""


def check_pixels(
    processors: Mapping[Backend, ImageProcessor],
    reference_processors: ReferenceProcessors,
    image: Image.Image,
    embed: Embed | None = None,
    max_hints: int = 1,
) -> GateResult:
    """Compare the outputs of both sides for `sample_images`.

    Args:
        processors: Image processors of the port, by backend.
        reference_processors: Image processors of the reference, by the same backends.
        image: Image of any size.
        embed: Port's `embed`, for the effect of a difference on embeddings; None without a head.
        max_hints: Number of differences per backend that get a hint and a cosine.
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
    """Return a finding; all of this gate have the same location."""
    return Finding(message, "pixel_values", "siglip_port.image_processing", hint=hint)


@dataclass(frozen=True)
class Difference:
    """A difference in the pixels of one image.

    Attributes:
        message: Description.
        pixels: Pixels of port and reference; None if one of them raised an error.
    """

    message: str
    pixels: tuple[Pixels, Pixels] | None = None


def compare_image(
    processor: ImageProcessor, reference_processor: Callable[[Sample], Pixels], image: Sample
) -> Difference | None:
    """Compare the outputs of two processors for one image; None if they are equal."""
    try:
        pixels = process(processor, image)
        expected = dict(reference_processor(image))
    except PORT_ERRORS as error:  # any error means that one side rejects the image
        return Difference(f"{type(error).__name__}: {error}")
    message = compare_pixels(pixels, expected, levels_per_unit(processor))
    if not message:
        return None
    return Difference(message, (pixels, expected))


def process(processor: ImageProcessor, images: Sample | list[Sample]) -> Pixels:
    """Run the port's processor on one image or several."""
    return cast(dict[str, Tensor], processor(images))


def levels_per_unit(processor: ImageProcessor) -> float:
    """Return the largest number of 8-bit levels per unit of `pixel_values`."""
    std = max(processor.std or (1.0,))
    return std / (processor.rescale_factor or 1.0)


def compare_pixels(pixels: Pixels, expected: Pixels, levels: float = 1.0) -> str:
    """Describe the first difference of two batches; empty if they are equal.

    Args:
        pixels: Batch of the port.
        expected: Batch of the reference.
        levels: Return value of `levels_per_unit`.
    """
    if pixels.keys() != expected.keys():
        return f"keys {', '.join(pixels)}, expected {', '.join(expected)}"
    for name, tensor in pixels.items():
        other = torch.as_tensor(expected[name])
        if tensor.shape != other.shape:
            return f"{name} has shape {list(tensor.shape)}, expected {list(other.shape)}"
        if name == "pixel_values":
            message = compare_values(tensor, other, levels)
            if message:
                return message
        elif not torch.equal(tensor.long(), other.long()):
            return f"{name} differs"
    return ""


def compare_values(values: Tensor, expected: Tensor, levels: float) -> str:
    """Describe the difference of two `pixel_values` of one shape; empty if bits are equal."""
    if values.dtype != expected.dtype:
        return f"pixel_values has dtype {values.dtype}, expected {expected.dtype}"
    if tensors_equal(values, expected):
        return ""
    differences = (values.double() - expected.double()).abs() * levels
    share = (differences > 0).double().mean()
    return f"differs by up to {differences.max():.3g} of 255 levels, in {share:.0%} of the values"


def describe_cost(embed: Embed | None, pixels: Pixels, expected: Pixels) -> str:
    """Describe the effect of a difference in pixels on the port's embeddings."""
    if embed is None or shapes_of(pixels) != shapes_of(expected):
        return ""
    try:
        with torch.inference_mode():
            similarity = cosine(embed(**pixels), embed(**expected))
    except ValueError as error:  # the model refuses pixels that are far out of range
        return f"; {error}"
    return f"; cosine of the two embeddings {float(similarity.min()):.6f}"


def shapes_of(pixels: Pixels) -> dict[str, torch.Size]:
    """Return the shape of every tensor."""
    return {name: tensor.shape for name, tensor in pixels.items()}


def find_hint(processor: ImageProcessor, image: Sample, expected: Pixels) -> str:
    """Find the setting of the reference that explains a difference; empty if unknown."""
    for name, changed in changed_processors(processor):
        try:
            pixels = process(changed, image)
        except (ValueError, RuntimeError):
            continue
        if not compare_pixels(pixels, expected):
            return f"the reference has {name}"
    return ""


def changed_processors(processor: ImageProcessor) -> Iterator[tuple[str, ImageProcessor]]:
    """Yield the processor with each of `CHANGES` applied."""
    for name, change in CHANGES.items():
        if name == "the other backend":
            backend: Backend = "pil" if processor.backend == "torchvision" else "torchvision"
            yield name, replace(processor, backend=backend)
        elif name != f"resample={processor.resample}":
            yield name, replace(processor, **change)

"""Entrances that take images: `ImageProcessor`, `embed_images`, `pack` and `patchify`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from siglip_port import patches
from siglip_port.image_processing import Backend, ImageProcessor
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.results import Finding
from siglip_port.parity.siglip import reference_features
from siglip_port.parity.siglip.entrances.subject import (
    FLOAT32_ROUNDING,
    Subject,
    compare_bits,
    is_rough,
    tolerance,
)
from siglip_port.parity.siglip.pixels import (
    compare_pixels,
    levels_per_unit,
    pixel_finding,
    process,
)
from siglip_port.parity.siglip.sample_images import encode, synthetic_image

SHORT = 5
"""Number of images for small batch sizes."""

FILES = (5, 9)
"""Numbers of the encoded images that are also passed as files."""

MOST_PATCHES = 10
"""Patches of the largest of `images_to_cut`."""


def check_image_processor(subject: Subject) -> Iterator[Finding]:
    """Compare the pixels of several images in one call with the reference's."""
    for backend, expected in subject.expected.pixels.items():
        processor = ImageProcessor.from_config(subject.port.preprocessor_config, backend)
        levels = levels_per_unit(processor)
        batch = join_batches(expected)
        pixels = process(processor, subject.expected.samples)
        message = compare_pixels(pixels, batch, levels)
        if message:
            number = first_difference(pixels["pixel_values"], batch["pixel_values"])
            yield pixel_finding(f"{subject.expected.images[number][0]}, {backend}: {message}", "")
        single = compare_pixels(
            process(processor, subject.expected.samples[0]), expected[0], levels
        )
        if single:
            yield pixel_finding(f"an image that is not in a list, {backend}: {single}", "")
        yield from check_views(processor, backend)
        yield from check_threads(processor, backend)


def check_views(processor: ImageProcessor, backend: Backend) -> Iterator[Finding]:
    """Check arrays whose rows or channels run backwards, as from OpenCV, and read-only ones."""
    random = np.random.default_rng(0)
    for channels in (3, 4):
        array = random.integers(0, 256, (20, 30, channels), dtype=np.uint8)
        read_only = array.copy()
        read_only.flags.writeable = False
        views = {
            "rows that run backwards": np.ascontiguousarray(array[::-1])[::-1],
            "columns that run backwards": np.ascontiguousarray(array[:, ::-1])[:, ::-1],
            "channels that run backwards": np.ascontiguousarray(array[..., ::-1])[..., ::-1],
            "every second row": np.repeat(array, 2, axis=0)[::2],
            "read-only memory": read_only,
        }
        expected = process(processor, array.copy())
        for name, view in views.items():
            message = compare_pixels(process(processor, view), expected)
            if message:
                label = f"an array of {name}, {channels} channels, {backend}"
                yield pixel_finding(f"{label}: {message}", "")
            elif not np.array_equal(view, array):
                yield pixel_finding(f"an array of {name} is written to, {backend}", "")


def check_threads(processor: ImageProcessor, backend: Backend) -> Iterator[Finding]:
    """Preprocess images of one size in several threads at once."""
    random = np.random.default_rng(0)
    arrays = [random.integers(0, 256, (50, 60, 3), dtype=np.uint8) for _ in range(40)]
    expected = [process(processor, array) for array in arrays]
    with ThreadPoolExecutor(4) as pool:
        for pixels, serial in zip(pool.map(processor, arrays), expected, strict=True):
            message = compare_pixels(cast("Mapping[str, Tensor]", pixels), serial)
            if message:
                yield pixel_finding(f"in several threads, {backend}: {message}", "")
                return


def join_batches(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate batches of one image."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def first_difference(values: Tensor, expected: Tensor) -> int:
    """Return the number of the first image that differs; 0 if the shapes do."""
    if values.shape != expected.shape:
        return 0
    differs = (values != expected).flatten(1).any(dim=1)
    return int(differs.int().argmax())


@dataclass(frozen=True)
class Call:
    """A call of `embed_images`, and its expected result.

    Attributes:
        label: Description.
        images: Argument.
        expected: Embeddings, [B, D].
        options: Keyword arguments.
        start: Number of the first image.
    """

    label: str
    images: Any
    expected: Tensor
    options: Mapping[str, Any] = field(default_factory=dict)
    start: int = 0


def check_embed_images(subject: Subject) -> Iterator[Finding]:
    """Compare embeddings of images, in batches of several sizes, with the reference's."""
    bound = bound_of_embeddings(subject)
    for call in calls_of_embed_images(subject):
        embeddings = subject.port.embed_images(call.images, **call.options)
        yield from compare_embeddings(subject, call, embeddings, bound)


def calls_of_embed_images(subject: Subject) -> Iterator[Call]:
    """Yield calls with every option, and with every form of the images."""
    samples = subject.expected.samples
    for backend, embeddings in subject.expected.embeddings.items():
        for batch_size in (4, len(samples) + 1):
            label = f"{len(samples)} images, batch_size={batch_size}, backend={backend}"
            options = {"batch_size": batch_size, "backend": backend}
            yield Call(label, samples, embeddings, options)
    expected = subject.expected.embeddings["pil"]
    few = expected[:SHORT]
    for batch_size in (1, 2, 3):
        label = f"{SHORT} images, batch_size={batch_size}"
        yield Call(label, tuple(samples[:SHORT]), few, {"batch_size": batch_size})
    unit = few / few.norm(dim=-1, keepdim=True)
    yield Call("normalize=True", samples[:SHORT], unit, {"normalize": True})
    yield Call("no images", [], few[:0])
    for row, image in enumerate(samples):
        if isinstance(image, bytes) and row in FILES:
            path = Path(subject.scratch, f"image-{row}")
            path.write_bytes(replaced_image())
            subject.port.embed_images([path])
            path.write_bytes(image)
            one = expected[row : row + 1]
            yield Call("bytes that are not in a list", image, one, start=row)
            yield Call("a path that is not in a list", path, one, start=row)
            yield Call("a path as a string", [str(path)], one, start=row)


def replaced_image() -> bytes:
    """Return a file that is at a path before another one is, for caches of paths."""
    return encode(synthetic_image().resize((16, 16)), "PNG")


def bound_of_embeddings(subject: Subject) -> float:
    """Return the bound on errors of embeddings: wider if the port has steps in float32."""
    inputs = subject.expected.batches[0].inputs

    def embed(inputs: Mapping[str, Any]) -> Tensor:
        return subject.port.embed(**inputs)

    if is_rough(embed, inputs):
        return max(FLOAT32_ROUNDING, tolerance.get())
    return tolerance.get()


def compare_embeddings(
    subject: Subject, call: Call, embeddings: Tensor, bound: float
) -> Iterator[Finding]:
    """Compare embeddings of images; a finding names the first image that differs."""
    expected = call.expected
    if embeddings.dtype != subject.port.dtype or embeddings.is_inference():
        kind = "a tensor of inference mode" if embeddings.is_inference() else str(embeddings.dtype)
        yield Finding(f"{call.label}: {kind}, expected {subject.port.dtype} that can be trained on")
        return
    if embeddings.shape != expected.shape:
        shapes = f"shape {list(embeddings.shape)}, expected {list(expected.shape)}"
        yield Finding(f"{call.label}: {shapes}")
        return
    names = [name for name, _ in subject.expected.images[call.start :]]
    differing = []
    for name, vector, exact in zip(names, embeddings, expected, strict=False):
        error = relative_error(vector, exact)
        if not error <= bound:
            differing.append((name, error))
    if differing:
        name, error = differing[0]
        others = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        yield Finding(f"{call.label}: embedding of {name!r}{others} differs", error=error)


def check_patchify(subject: Subject) -> Iterator[Finding]:
    """Compare the patches of an image, and of a batch, with the reference's."""
    patch = subject.port.config.patch_size
    for image in images_to_cut(patch):
        length = (image.shape[1] // patch) * (image.shape[2] // patch)
        expected = subject.expected.host.compute(
            reference_features.pack_images, [image], patch, length
        )["pixel_values"]
        size = f"{image.shape[1]} x {image.shape[2]} pixels"
        yield from compare_bits(
            f"an image of {size}",
            {"patches": patches.patchify(image, patch)},
            {"patches": expected[0]},
        )
        layouts = {
            "a batch": image[None],
            "a channels-last batch": image[None].contiguous(memory_format=torch.channels_last),
            "a transposed batch": image[None].mT.contiguous().mT,
        }
        for name, images in layouts.items():
            batch = {"patches": patches.patchify(images, patch)}
            yield from compare_bits(f"{name} of {size}", batch, {"patches": expected})


def check_pack(subject: Subject) -> Iterator[Finding]:
    """Compare packed images of several shapes, with the least padding and with more."""
    patch = subject.port.config.patch_size
    images = images_to_cut(patch)
    for num_patches, length in ((None, MOST_PATCHES), (MOST_PATCHES + 3, MOST_PATCHES + 3)):
        expected = subject.expected.host.compute(
            reference_features.pack_images, images, patch, length
        )
        packed = cast("Mapping[str, Tensor]", patches.pack(images, patch, num_patches))
        message = compare_pixels(packed, expected)
        if message:
            yield Finding(f"num_patches={num_patches}: {message}")


def images_to_cut(patch: int) -> list[Tensor]:
    """Return images of several shapes, [C, H, W], that are no multiples of the patch."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for rows, columns in ((2, 5), (5, 2), (3, 3)):
        shape = (3, rows * patch + 1, columns * patch + patch - 1)
        images.append(torch.rand(shape, generator=generator))
    return images

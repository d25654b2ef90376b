"""Entrances that take images: `ImageProcessor`, `embed_images`, `pack` and `patchify`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from siglip_port import patches
from siglip_port.image_processing import ImageProcessor
from siglip_port.parity import bounds
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.results import Finding
from siglip_port.parity.siglip import reference_features
from siglip_port.parity.siglip.entrances.subject import Subject, compare_bits
from siglip_port.parity.siglip.pixels import (
    compare_pixels,
    levels_per_unit,
    pixel_finding,
    process,
)

SHORT = 5
"""Number of images for small batch sizes."""

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


def join_batches(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate batches of one image."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def first_difference(values: Tensor, expected: Tensor) -> int:
    """Return the number of the first image that differs; 0 if the shapes do."""
    if values.shape != expected.shape:
        return 0
    differs = (values != expected).flatten(1).any(dim=1)
    return int(differs.int().argmax())


def check_embed_images(subject: Subject) -> Iterator[Finding]:
    """Compare embeddings of images, in batches of several sizes, with the reference's."""
    port = subject.port
    samples = subject.expected.samples
    names = [name for name, _ in subject.expected.images]
    for backend, expected in subject.expected.embeddings.items():
        for batch_size in (4, 32):
            embeddings = port.embed_images(
                subject.expected.samples, batch_size=batch_size, backend=backend
            )
            what = f"{len(names)} images, batch_size={batch_size}, backend={backend}"
            yield from compare_rows(what, embeddings, expected, names)
    expected = subject.expected.embeddings["pil"]
    for batch_size in (1, 2, 3):
        few = port.embed_images(tuple(samples[:SHORT]), batch_size=batch_size)
        what = f"{SHORT} images, batch_size={batch_size}"
        yield from compare_rows(what, few, expected[:SHORT], names)
    unit = expected / expected.norm(dim=-1, keepdim=True)
    normalized = port.embed_images(samples[:SHORT], normalize=True)
    yield from compare_rows("normalize=True", normalized, unit[:SHORT], names)
    for name, image, row in single_images(subject):
        yield from compare_rows(
            name, port.embed_images(image), expected[row : row + 1], names[row:]
        )
    empty = port.embed_images([])
    if empty.shape != (0, port.config.embed_dim):
        yield Finding(f"no images: shape {list(empty.shape)}, expected [0, {expected.shape[1]}]")


def single_images(subject: Subject) -> Iterator[tuple[str, Any, int]]:
    """Yield (name, argument, row of its embedding) for images that are not in a list."""
    for row, (name, image) in enumerate(subject.expected.images):
        if isinstance(image, bytes):
            path = Path(subject.scratch, f"image-{row}")
            path.write_bytes(image)
            yield f"{name} as a path", path, row
            yield f"{name} as a path in a string", [str(path)], row
            return


def compare_rows(
    what: str, embeddings: Tensor, expected: Tensor, names: Sequence[str]
) -> Iterator[Finding]:
    """Compare embeddings of images; a finding names the first image that differs."""
    if embeddings.shape != expected.shape:
        yield Finding(f"{what}: shape {list(embeddings.shape)}, expected {list(expected.shape)}")
        return
    differing = []
    for name, vector, exact in zip(names, embeddings, expected, strict=False):
        error = relative_error(vector, exact)
        if not bounds.within_float64_bound(error):
            differing.append((name, error))
    if differing:
        name, error = differing[0]
        count = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        yield Finding(f"{what}: embedding of {name!r}{count} differs in float64", error=error)


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
        batch = patches.patchify(image[None], patch)
        yield from compare_bits(f"a batch of {size}", {"patches": batch}, {"patches": expected})


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

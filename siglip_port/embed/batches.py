"""Batches of images, and the model run on one: what a run is made of, wherever it runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from siglip_port.embed.decode import DecodedImage
from siglip_port.embed.encoder import BatchEncoder
from siglip_port.embed.inputs import Item


@dataclass(frozen=True)
class Batch:
    """Images that go through the model together.

    Attributes:
        number: among the batches that are missing.
        shard: the file that it is a part of.
        items: the images.
    """

    number: int
    shard: int
    items: tuple[Item, ...]


@dataclass(frozen=True)
class BatchResult:
    """What became of a batch.

    Attributes:
        number: of the batch.
        sizes: (height, width) of each image, if it could be read.
        errors: why not, or empty.
        vectors: [B, embedding_dim], NaN where there is an error.
        decode_seconds: of all images.
        preprocess_seconds: of all images.
        model_seconds: of the batch.
    """

    number: int
    sizes: tuple[tuple[int, int] | None, ...]
    errors: tuple[str, ...]
    vectors: NDArray[Any]
    decode_seconds: float
    preprocess_seconds: float
    model_seconds: float


def run_batch(encoder: BatchEncoder, number: int, decoded: Sequence[DecodedImage]) -> BatchResult:
    """Run the model on the decoded images of the batch of this number."""
    started = time.perf_counter()
    vectors, errors = encoder.vectors(decoded)
    model_seconds = time.perf_counter() - started
    return BatchResult(
        number=number,
        sizes=tuple(image.size for image in decoded),
        errors=tuple(errors),
        vectors=vectors,
        decode_seconds=sum(image.decode_seconds for image in decoded),
        preprocess_seconds=sum(image.preprocess_seconds for image in decoded),
        model_seconds=model_seconds,
    )

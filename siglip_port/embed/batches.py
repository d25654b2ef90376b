"""Batches of images and the forward pass over one, independent of the executor."""

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
    """Images of one forward pass.

    Attributes:
        number: Index among the missing batches.
        shard: Index of the output file.
        items: Images of the batch.
    """

    number: int
    shard: int
    items: tuple[Item, ...]


@dataclass(frozen=True)
class BatchResult:
    """Result of a batch.

    Attributes:
        number: Number of the batch.
        sizes: (height, width) of each image in pixels; None on error.
        errors: Error message of each image; empty on success.
        vectors: Embeddings, [B, embedding_dim]; NaN on error.
        decode_seconds: Decoding time, summed over the images.
        preprocess_seconds: Preprocessing time, summed over the images.
        model_seconds: Time of the forward pass.
    """

    number: int
    sizes: tuple[tuple[int, int] | None, ...]
    errors: tuple[str, ...]
    vectors: NDArray[Any]
    decode_seconds: float
    preprocess_seconds: float
    model_seconds: float


def run_batch(encoder: BatchEncoder, number: int, decoded: Sequence[DecodedImage]) -> BatchResult:
    """Run the model on the decoded images of batch `number`."""
    start = time.perf_counter()
    vectors, errors = encoder.encode(decoded)
    model_seconds = time.perf_counter() - start
    return BatchResult(
        number=number,
        sizes=tuple(image.size for image in decoded),
        errors=tuple(errors),
        vectors=vectors,
        decode_seconds=sum(image.decode_seconds for image in decoded),
        preprocess_seconds=sum(image.preprocess_seconds for image in decoded),
        model_seconds=model_seconds,
    )

"""The options of a run over many images, validated once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from siglip_port.config import SigLipVisionConfig
from siglip_port.image_processing import Backend
from siglip_port.optimize import ENGINES
from siglip_port.validation import validate_positive_int

Output = Literal["pooled", "tokens"]
OutputDtype = Literal["float32", "float16"]
FileFormat = Literal["parquet", "npy"]
Executor = Literal["local", "ray"]

FASTEST = "fastest"
"""In place of an engine: the one that `siglip_port.optimize` chooses."""


@dataclass(frozen=True)
class EmbedOptions:
    """How images become vectors, and where that is done.

    The public functions call some of these by older names: `form` is `engine`, `store` is
    `output_dtype`, `engine` is `executor`.

    Attributes:
        dtype: to compute in; None for the model's own.
        engine: a name of `siglip_port.optimize.ENGINES`, or `FASTEST`; None for the one of an
            earlier run, or else the model as it is.
        threads: CPU threads for the model; None for those of an earlier run, or torch's.
        batch_size: images that go through the model at a time.
        output: `pooled`, one vector an image; or `tokens`, all of them, row by row.
        normalize: whether to scale vectors to unit length.
        output_dtype: dtype of the stored numbers.
        backend: of `siglip_port.image_processing.ImageProcessor`.
        shard_size: rows a file, rounded up to whole batches.
        workers: processes that decode, 0 for none besides this one, None for one a processor; on a
            cluster, processes that hold the model, None for as many as fit.
        format: `parquet`; or `npy`, vectors in an array beside each parquet file.
        executor: this machine, or a Ray cluster.
        address: of the cluster; None for the one that Ray finds, or a new one on this machine.

    Raises:
        ValueError: an option is not supported.
    """

    dtype: torch.dtype | None = None
    engine: str | None = None
    threads: int | None = None
    batch_size: int = 16
    output: Output = "pooled"
    normalize: bool = False
    output_dtype: OutputDtype = "float32"
    backend: Backend = "pil"
    shard_size: int = 2048
    workers: int | None = None
    format: FileFormat = "parquet"
    executor: Executor = "local"
    address: str | None = None

    def __post_init__(self) -> None:
        validate_positive_int("shard_size", self.shard_size)
        if self.workers is not None:
            validate_workers(self.workers)
        if self.format not in ("parquet", "npy") or self.executor not in ("local", "ray"):
            raise ValueError(
                f"format must be parquet or npy, engine local or ray, got {self.format!r} and "
                f"{self.executor!r}"
            )
        if self.address is not None and self.executor != "ray":
            raise ValueError("an address is that of a Ray cluster: pass engine ray with it")
        validate_positive_int("batch_size", self.batch_size)
        if self.threads is not None:
            validate_positive_int("threads", self.threads)
        if self.engine not in (None, FASTEST):
            validate_engine(self.engine)
        known_output = self.output in ("pooled", "tokens")
        if not known_output or self.output_dtype not in ("float32", "float16"):
            raise ValueError(
                f"output must be pooled or tokens, store float32 or float16, got {self.output!r} "
                f"and {self.output_dtype!r}"
            )

    @property
    def batches_per_shard(self) -> int:
        """Batches a file."""
        return -(-self.shard_size // self.batch_size)


def validate_workers(workers: object) -> None:
    """Raise ValueError unless `workers` is a whole number from 0 on."""
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 0:
        raise ValueError(f"workers must be a whole number from 0 on, got {workers!r}")


def validate_engine(engine: str | None) -> str:
    """Return `engine`; raise ValueError unless it is a name of `siglip_port.optimize.ENGINES`."""
    if engine is None or engine not in ENGINES:
        raise ValueError(f"form must be one of {', '.join(ENGINES)}, got {engine!r}")
    return engine


def validate_output(options: EmbedOptions, config: SigLipVisionConfig) -> None:
    """Raise ValueError unless a model of this configuration makes the output of these options."""
    if options.output == "tokens" and (config.naflex or options.normalize):
        raise ValueError(
            "tokens are written of encoders with images of one size, and are not normalized"
        )
    if options.output == "pooled" and not config.has_pooled_output:
        raise ValueError(
            "the model has no pooling head, so it makes no vectors; take output='tokens'"
        )

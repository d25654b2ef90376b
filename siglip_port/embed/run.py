"""A run over many images: their vectors on disk, however often it is interrupted.

Every batch holds the same images, at the same places, in every run: batch b of shard s is items
`s * shard_size + b * batch_size` and those after it, with blank images for what cannot be read. So
the vectors do not depend on where a run was interrupted.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from siglip_port.embed.batches import Batch, BatchResult, run_batch
from siglip_port.embed.decode import decode_batches, processor_count
from siglip_port.embed.encoder import BatchEncoder, ModelSource
from siglip_port.embed.errors import EmbedError
from siglip_port.embed.inputs import Item, find_items, ids_digest
from siglip_port.embed.options import (
    FASTEST,
    EmbedOptions,
    Executor,
    FileFormat,
    Output,
    OutputDtype,
)
from siglip_port.embed.shards import (
    Settings,
    claim_folder,
    count_rows,
    exclusive_lock,
    read_settings_of_rows,
    shard_files,
    write_shard,
)
from siglip_port.extras import require
from siglip_port.image_processing import Backend
from siglip_port.model import SigLipVisionModel
from siglip_port.optimize import EngineError, optimize
from siglip_port.optimize.cache import weights_hash
from siglip_port.threads import torch_threads


@dataclass
class Progress:
    """How far a run is, and where its time has gone. Also its summary.

    Attributes:
        total: images.
        done: rows that are written or in memory, those of earlier runs included.
        failed: rows with an error among them.
        fresh: rows of this run.
        seconds: of this run, altogether; and of it `waiting` for images, `model`, `writing`. On a
            cluster, `waiting` is for results, and `model` is of all models together.
        decoding: seconds in all workers together, while all else went on; reading is part of it.
        preprocessing: likewise.
    """

    total: int
    done: int = 0
    failed: int = 0
    fresh: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    model: float = 0.0
    writing: float = 0.0
    decoding: float = 0.0
    preprocessing: float = 0.0
    started: float = field(default_factory=time.perf_counter, repr=False)

    @property
    def rate(self) -> float:
        """Images a second, of this run."""
        return self.fresh / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, float]:
        """Return all numbers."""
        numbers = asdict(self)
        del numbers["started"]
        return {**numbers, "rate": self.rate}

    def add(self, result: BatchResult, seconds: float) -> None:
        """Count a result that took `seconds` to come, the model's included."""
        self.waiting += max(0.0, seconds - result.model_seconds)
        self.model += result.model_seconds
        self.decoding += result.decode_seconds
        self.preprocessing += result.preprocess_seconds
        self.fresh += len(result.errors)
        self.done += len(result.errors)
        self.failed += sum(bool(error) for error in result.errors)


def embed(
    inputs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    model: SigLipVisionModel,
    *,
    dtype: torch.dtype | None = None,
    form: str | None = None,
    threads: int | None = None,
    batch_size: int = 16,
    shard_size: int = 2048,
    workers: int | None = None,
    output: Output = "pooled",
    normalize: bool = False,
    store: OutputDtype = "float32",
    format: FileFormat = "parquet",
    backend: Backend = "pil",
    engine: Executor = "local",
    address: str | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Write the vectors of many images as parquet files, `part-000000.parquet` and so on.

    Columns: `id`, `path`, `width`, `height`, `embedding` (a list of fixed size, NaN where there is
    an error), `error` (null where there is none). The metadata of each file tells how it came
    about. A run that was ended by whatever is continued by the same call; what is complete is not
    done again.

    Args:
        inputs: see `siglip_port.embed.inputs.find_items`.
        out: a folder; made if it does not exist.
        model: on the device where it is to run.
        dtype: to compute in; None for the model's own.
        form: the engine, a name of `siglip_port.optimize.ENGINES`; `fastest` for the one that
            `optimize` chooses, which takes minutes the first time; None for the one that an earlier
            run of this folder took, or else the model as it is.
        threads: of the CPU, for the model; None for as many as an earlier run of this folder took,
            or torch does.
        batch_size: images at a time.
        shard_size: rows a file, rounded up to whole batches.
        workers: processes that decode, 0 for none besides this one, None for as many as there are
            processors; on a cluster, processes that hold the model, None for as many as fit.
        output: vectors, or tokens.
        normalize: whether to scale vectors to unit length.
        store: dtype of the written numbers.
        format: where to: a column `embedding`; or, of each part, an array beside it, [rows, D], NaN
            where there is an error.
        backend: of `siglip_port.image_processing.ImageProcessor`.
        engine: this machine, or a Ray cluster: see `siglip_port.embed.ray`.
        address: of the cluster; None for the one that Ray finds, or a new one on this machine.
        report: called after every batch.

    Returns:
        What was done.

    Raises:
        ValueError: an argument is not supported.
        EmbedError: the folder holds rows of other settings, is in use, or cannot be written to.
        siglip_port.extras.MissingExtraError: pyarrow is not installed.
    """
    options = EmbedOptions(
        dtype=dtype,
        engine=form,
        threads=threads,
        batch_size=batch_size,
        output=output,
        normalize=normalize,
        output_dtype=store,
        backend=backend,
        shard_size=shard_size,
        workers=workers,
        format=format,
        executor=engine,
        address=address,
    )
    if isinstance(inputs, (str, os.PathLike)):
        inputs = [inputs]
    return embed_with_options(inputs, Path(out), model, options, on_progress=report)


def embed_with_options(
    inputs: Sequence[str | os.PathLike[str]],
    folder: Path,
    model: SigLipVisionModel,
    options: EmbedOptions,
    on_progress: Callable[[Progress], None],
) -> Progress:
    """Do what `embed` does."""
    require("pyarrow")
    if not isinstance(model, SigLipVisionModel):
        raise ValueError(f"model must be a SigLipVisionModel, got a {type(model).__name__}")
    items = find_items(inputs)
    options = complete_options(options, read_settings_of_rows(folder) or {})
    encoder = make_encoder(model, options)
    settings = make_settings(encoder, items)
    try:
        with exclusive_lock(folder):
            claim_folder(folder, settings)
            run = EmbedRun(folder, items, settings, on_progress)
            batches = run.missing_batches()
            with contextlib.closing(run_batches(encoder, batches)) as results:
                run.write(batches, results)
            return run.progress
    except OSError as error:
        raise EmbedError(
            f"{folder} cannot be written to: {error.strerror or error}; what is complete stays, "
            "and the same command goes on from there"
        ) from error


def complete_options(options: EmbedOptions, previous: Mapping[str, Any]) -> EmbedOptions:
    """Take what was left open from the settings of an earlier run of the same folder.

    Args:
        options: of this run.
        previous: the settings of the rows of the folder; empty where there are none.
    """
    threads, engine = options.threads, options.engine
    if threads is None:
        threads = previous.get("threads", torch.get_num_threads())
    if engine is None:
        engine = previous.get("form", "eager")
    elif engine == FASTEST:
        engine = previous.get("form", FASTEST)
    return replace(options, threads=threads, engine=engine)


def make_encoder(model: SigLipVisionModel, options: EmbedOptions) -> BatchEncoder:
    """Choose the engine, and try it, before the folder is touched.

    Raises:
        EmbedError: the engine cannot be used here.
    """
    source = ModelSource.from_model(model)
    if options.engine == FASTEST:
        eager = BatchEncoder(source, replace(options, engine="eager"))  # checks what is cheap first
        with torch_threads(eager.threads):
            fast = optimize(model, dtype=options.dtype, batch_size=options.batch_size)
        options = replace(options, engine=fast.choice.engine)
    encoder = BatchEncoder(source, options)
    if options.executor == "local":  # on a cluster, its nodes find out
        try:
            encoder.load()
        except EngineError as error:
            raise EmbedError(
                f"form {encoder.engine} cannot be used here: {error}; take another, or eager"
            ) from error
    return encoder


def make_settings(encoder: BatchEncoder, items: Sequence[Item]) -> Settings:
    """Write down all that decides which rows and numbers a run ends with."""
    options = encoder.options
    model = encoder.base_model
    return Settings(
        source=encoder.name,
        commit=encoder.commit,
        weights=weights_hash(model)[:16],
        dtype=str(encoder.dtype or model.dtype).removeprefix("torch."),
        form=encoder.engine,
        device=str(model.device),
        threads=encoder.threads,
        batch_size=options.batch_size,
        shard_size=options.batches_per_shard * options.batch_size,
        output=options.output,
        normalize=options.normalize,
        store=options.output_dtype,
        format=options.format,
        preprocess=encoder.processor.fingerprint,
        processor=asdict(encoder.processor),
        pictures=len(items),
        ids=ids_digest(items),
    )


def run_batches(encoder: BatchEncoder, batches: Sequence[Batch]) -> Generator[BatchResult]:
    """Do batches, on this machine or on a cluster; results come in any order."""
    options = encoder.options
    if options.executor == "ray":
        from siglip_port.embed.ray import run_on_ray

        return run_on_ray(encoder, batches, options.workers, options.address)
    return run_local(encoder, batches, options.workers)


def run_local(
    encoder: BatchEncoder, batches: Sequence[Batch], workers: int | None
) -> Generator[BatchResult]:
    """Decode in worker processes, and run the model in this one.

    Args:
        encoder: the model.
        batches: to be done.
        workers: processes that decode; None for one a processor.
    """
    if workers is None:
        workers = processor_count()
    decoded = decode_batches([batch.items for batch in batches], encoder.processor, workers)
    for batch, images in zip(batches, decoded, strict=True):
        yield run_batch(encoder, batch.number, images)


class EmbedRun:
    """What is missing in a folder, and how it is written.

    Attributes:
        folder: of the run.
        items: all images.
        settings: of the run.
        on_progress: called after every batch.
        progress: how far it is.
    """

    def __init__(
        self,
        folder: Path,
        items: Sequence[Item],
        settings: Settings,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self.folder = folder
        self.items = items
        self.settings = settings
        self.on_progress = on_progress
        self.progress = Progress(len(items))

    def missing_batches(self) -> list[Batch]:
        """Return the batches of all shards that are not there; count the rows of those that are."""
        batches: list[Batch] = []
        batch_size = self.settings.batch_size
        for shard, items in enumerate(self.shards()):
            files = shard_files(self.folder, shard, self.settings.format)
            if all(path.exists() for path in files):
                self.count_shard(files[-1], len(items))
                continue
            for first in range(0, len(items), batch_size):
                batch_items = tuple(items[first : first + batch_size])
                batches.append(Batch(len(batches), shard, batch_items))
        return batches

    def shards(self) -> list[Sequence[Item]]:
        """Return the images of each shard."""
        size = self.settings.shard_size
        return [self.items[first : first + size] for first in range(0, len(self.items), size)]

    def count_shard(self, path: Path, expected: int) -> None:
        """Count the rows of a shard that is there."""
        rows, failed = count_rows(path)
        if rows != expected:
            raise EmbedError(
                f"{path} holds {rows} rows, expected {expected}; delete it, and run again"
            )
        self.progress.done += rows
        self.progress.failed += failed

    def write(self, batches: Sequence[Batch], results: Iterable[BatchResult]) -> None:
        """Take results in any order; write a shard when all of it is there.

        Args:
            batches: all that are missing.
            results: one of each.
        """
        shard_batches: dict[int, list[Batch]] = {}
        for batch in batches:
            shard_batches.setdefault(batch.shard, []).append(batch)
        waiting: dict[int, BatchResult] = {}
        requested = time.perf_counter()
        for result in results:
            self.progress.add(result, time.perf_counter() - requested)
            waiting[result.number] = result
            shard = batches[result.number].shard
            if all(batch.number in waiting for batch in shard_batches[shard]):
                started = time.perf_counter()
                self.write_shard(shard, shard_batches[shard], waiting)
                self.progress.writing += time.perf_counter() - started
            requested = time.perf_counter()
            self.progress.seconds = requested - self.progress.started
            self.on_progress(self.progress)

    def write_shard(
        self, shard: int, batches: Sequence[Batch], waiting: dict[int, BatchResult]
    ) -> None:
        """Write a shard, whose results wait no longer."""
        items = [item for batch in batches for item in batch.items]
        results = [waiting.pop(batch.number) for batch in batches]
        write_shard(self.folder, shard, items, results, self.settings)

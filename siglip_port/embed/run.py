"""Embedding runs: images in, Parquet files out, resumable at any point.

Batches are the same in every run: batch b of shard s contains the items from
`s * shard_size + b * batch_size` on, with blank images for those that cannot be read, so the
embeddings do not depend on where a run was interrupted.
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
from siglip_port.embed.decode import decode_batches, worker_count
from siglip_port.embed.encoder import BatchEncoder, ModelSource
from siglip_port.embed.errors import EmbedError
from siglip_port.embed.inputs import Item, find_items, ids_digest
from siglip_port.embed.options import FASTEST, EmbedOptions, Executor, FileFormat, OutputDtype
from siglip_port.embed.shards import (
    Settings,
    claim_folder,
    count_rows,
    exclusive_lock,
    read_settings_of_rows,
    shard_files,
    write_shard,
)
from siglip_port.embed.stored_model import describe_model
from siglip_port.extras import require
from siglip_port.image_processing import Backend
from siglip_port.model import SigLipVisionModel
from siglip_port.optimize import EngineError, optimize
from siglip_port.optimize.cache import weights_hash
from siglip_port.optimize.comparison import TOLERANCES
from siglip_port.threads import torch_threads
from siglip_port.validation import parse_dtype


@dataclass
class Progress:
    """Progress of a run and, at the end, its summary.

    Attributes:
        total: Number of images.
        done: Rows that are written or in memory, including those of earlier runs.
        failed: Rows with an error, including those of earlier runs.
        processed: Rows of this run.
        seconds: Duration of this run.
        wait_seconds: Time spent waiting for images; on a cluster, for results.
        model_seconds: Time of the model; on a cluster, summed over all models.
        write_seconds: Time spent writing files.
        decode_seconds: Time to read and decode, summed over all workers.
        preprocess_seconds: Time to resize and normalize, summed over all workers.
    """

    total: int
    done: int = 0
    failed: int = 0
    processed: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    model_seconds: float = 0.0
    write_seconds: float = 0.0
    decode_seconds: float = 0.0
    preprocess_seconds: float = 0.0
    start: float = field(default_factory=time.perf_counter, repr=False)

    @property
    def images_per_second(self) -> float:
        """Throughput of this run."""
        return self.processed / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, float]:
        """Return the counts, times and throughput."""
        content = asdict(self)
        del content["start"]
        return {**content, "images_per_second": self.images_per_second}

    def add(self, result: BatchResult, seconds: float) -> None:
        """Add a result that arrived after `seconds`, including the time of the model."""
        self.wait_seconds += max(0.0, seconds - result.model_seconds)
        self.model_seconds += result.model_seconds
        self.decode_seconds += result.decode_seconds
        self.preprocess_seconds += result.preprocess_seconds
        self.processed += len(result.errors)
        self.done += len(result.errors)
        self.failed += sum(bool(error) for error in result.errors)


def embed(
    inputs: Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    model: SigLipVisionModel,
    *,
    dtype: torch.dtype | str | None = None,
    engine: str | None = None,
    threads: int | None = None,
    batch_size: int = 16,
    shard_size: int = 2048,
    num_workers: int | None = None,
    tokens: bool = False,
    normalize: bool = False,
    output_dtype: OutputDtype = "float32",
    format: FileFormat = "parquet",
    backend: Backend = "pil",
    executor: Executor = "local",
    address: str | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Write embeddings of images to Parquet files, `part-000000.parquet` and so on.

    Columns: `id`, `path`, `width`, `height`, `embedding` (a fixed-size list, NaN on error) and
    `error` (null on success). The metadata of each file contains the settings of the run. The same
    call resumes an interrupted run: complete files are kept.

    Args:
        inputs: Folders, files and patterns, see `siglip_port.embed.inputs.find_items`.
        output_dir: Output folder; created if it does not exist.
        model: SigLIP vision encoder, on the device to use.
        dtype: Compute dtype or its name; None for the model's own.
        engine: Name in `siglip_port.optimize.ENGINES`; `fastest` for the one chosen by
            `optimize`, which takes minutes the first time; None for the engine of the run being
            resumed, or else `eager`.
        threads: CPU threads for the model; None for those of the run being resumed, or else
            torch's setting.
        batch_size: Images per forward pass.
        shard_size: Rows per file, rounded up to whole batches.
        num_workers: Decoding processes; 0 decodes in this process, as does None in a daemonic
            process; elsewhere None starts one per CPU core.
            On a Ray cluster: processes that hold the model; None fills the cluster.
        tokens: Whether to store all tokens of an image, row by row, instead of the pooled
            embedding.
        normalize: Whether to scale embeddings to unit length.
        output_dtype: Dtype of the stored embeddings.
        format: `parquet` for a column `embedding`; `npy` for an array [rows, D] beside each
            Parquet file, NaN on error.
        backend: Image backend, see `siglip_port.image_processing.ImageProcessor`.
        executor: `local` for this machine, `ray` for a Ray cluster, see `siglip_port.embed.ray`.
        address: Address of the Ray cluster; None for a detected one, or else a new one on this
            machine.
        on_progress: Function that is called after every batch.

    Returns:
        Summary of the run.

    Raises:
        ValueError: An argument is not supported.
        EmbedError: The output folder contains rows with other settings, is in use, or cannot be
            written to.
        siglip_port.extras.MissingExtraError: pyarrow is not installed.
    """
    options = EmbedOptions(
        dtype=parse_dtype(dtype, TOLERANCES),
        engine=engine,
        threads=threads,
        batch_size=batch_size,
        tokens=tokens,
        normalize=normalize,
        output_dtype=output_dtype,
        backend=backend,
        shard_size=shard_size,
        num_workers=num_workers,
        format=format,
        executor=executor,
        address=address,
    )
    if isinstance(inputs, (str, os.PathLike)):
        inputs = [inputs]
    return embed_with_options(inputs, Path(output_dir), model, options, on_progress)


def embed_with_options(
    inputs: Sequence[str | os.PathLike[str]],
    folder: Path,
    model: SigLipVisionModel,
    options: EmbedOptions,
    on_progress: Callable[[Progress], None],
) -> Progress:
    """Write embeddings as `embed` does, with validated options."""
    require("pyarrow")
    if not isinstance(model, SigLipVisionModel):
        raise ValueError(f"model must be a SigLipVisionModel, got {type(model).__name__}")
    check_output(folder, inputs, model)
    items = find_items(inputs)
    options = complete_options(options, read_settings_of_rows(folder) or {})
    encoder = make_encoder(model, options)
    settings = make_settings(encoder, items)
    try:
        with exclusive_lock(folder):
            claim_folder(folder, settings, describe_model(model))
            run = EmbedRun(folder, items, settings, on_progress)
            batches = run.missing_batches()
            with contextlib.closing(run_batches(encoder, batches)) as results:
                run.write(batches, results)
            return run.progress
    except OSError as error:
        raise EmbedError(
            f"{folder}: cannot be written to ({error.strerror or error}); complete files are kept, "
            "run the same command again to resume"
        ) from error


def check_output(
    folder: Path, inputs: Sequence[str | os.PathLike[str]], model: SigLipVisionModel
) -> None:
    """Raise EmbedError if the output folder is an input folder, or in the checkpoint's folder.

    It may be in an input folder, since nothing that is written is listed as an image.
    """
    output = folder.expanduser().resolve()
    for entry in inputs:
        if output == Path(entry).resolve():
            raise EmbedError(f"{folder}: is an input; choose another output folder")
    if model.provenance is None:
        return
    source = model.provenance.source
    for file in model.provenance.files:
        checkpoint = file.parent.resolve()
        is_inside = checkpoint in output.parents and Path(source).expanduser().is_dir()
        if output == checkpoint or is_inside:
            raise EmbedError(
                f"{folder}: is in the folder of the checkpoint {source}; choose an output folder "
                "outside of it"
            )


def complete_options(options: EmbedOptions, previous: Mapping[str, Any]) -> EmbedOptions:
    """Fill in engine and threads from the run being resumed, and the number of processes.

    Args:
        options: Options of this run.
        previous: Settings of the rows in the output folder; empty if there are none.

    Raises:
        EmbedError: Decoding processes are requested where none can be started.
    """
    threads, engine = options.threads, options.engine
    if threads is None:
        threads = previous.get("threads", torch.get_num_threads())
    if engine is None:
        engine = previous.get("engine", "eager")
    elif engine == FASTEST:
        engine = previous.get("engine", FASTEST)
    num_workers = options.num_workers
    if options.executor == "local":
        num_workers = worker_count(num_workers)
    return replace(options, threads=threads, engine=engine, num_workers=num_workers)


def make_encoder(model: SigLipVisionModel, options: EmbedOptions) -> BatchEncoder:
    """Select the engine and build it, before the output folder is touched.

    Raises:
        EmbedError: The engine is not available on this machine.
    """
    source = ModelSource.from_model(model)
    if options.engine == FASTEST:
        eager = BatchEncoder(source, replace(options, engine="eager"))  # validates before measuring
        with torch_threads(eager.threads):
            optimized = optimize(model, dtype=options.dtype, batch_size=options.batch_size)
        options = replace(options, engine=optimized.choice.engine)
    encoder = BatchEncoder(source, options)
    if options.executor == "local":  # on a cluster, its nodes build the engine
        try:
            encoder.load()
        except EngineError as error:
            raise EmbedError(
                f"engine {encoder.engine} is not available: {error}; choose another, or eager"
            ) from error
    return encoder


def make_settings(encoder: BatchEncoder, items: Sequence[Item]) -> Settings:
    """Return the settings that determine the output of a run."""
    options = encoder.options
    model = encoder.base_model
    return Settings(
        source=encoder.name,
        commit=encoder.commit,
        weights=weights_hash(model)[:16],
        dtype=str(encoder.dtype or model.dtype).removeprefix("torch."),
        engine=encoder.engine,
        device=str(model.device),
        threads=encoder.threads,
        batch_size=options.batch_size,
        shard_size=options.batches_per_shard * options.batch_size,
        tokens=options.tokens,
        normalize=options.normalize,
        output_dtype=options.output_dtype,
        format=options.format,
        preprocessing=encoder.processor.fingerprint,
        processor=asdict(encoder.processor),
        num_images=len(items),
        ids=ids_digest(items),
    )


def run_batches(encoder: BatchEncoder, batches: Sequence[Batch]) -> Generator[BatchResult]:
    """Run batches on this machine or on a cluster; yield results in any order."""
    options = encoder.options
    if options.executor == "ray":
        from siglip_port.embed.ray import run_on_ray

        return run_on_ray(encoder, batches, options.num_workers, options.address)
    return run_local(encoder, batches, options.num_workers or 0)


def run_local(
    encoder: BatchEncoder, batches: Sequence[Batch], num_workers: int
) -> Generator[BatchResult]:
    """Decode in worker processes and run the model in this one.

    Args:
        encoder: Encoder of the decoded images.
        batches: Batches to run.
        num_workers: Decoding processes; 0 decodes in this process.
    """
    decoded = decode_batches([batch.items for batch in batches], encoder.processor, num_workers)
    for batch, images in zip(batches, decoded, strict=True):
        yield run_batch(encoder, batch.number, images)


class EmbedRun:
    """The shards of an output folder: which are missing, and how they are written.

    Attributes:
        folder: Output folder.
        items: Images of all shards.
        settings: Settings of the run.
        on_progress: Function that is called after every batch.
        progress: Progress of the run.
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
        """Return the batches of missing shards; count the rows of existing ones."""
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
        """Count the rows of an existing shard."""
        rows, failed = count_rows(path)
        if rows != expected:
            raise EmbedError(
                f"{path}: has {rows} rows, expected {expected}; delete it and run again"
            )
        self.progress.done += rows
        self.progress.failed += failed

    def write(self, batches: Sequence[Batch], results: Iterable[BatchResult]) -> None:
        """Collect results in any order; write a shard once all its batches are complete.

        Args:
            batches: Missing batches.
            results: Result of each batch.
        """
        shard_batches: dict[int, list[Batch]] = {}
        for batch in batches:
            shard_batches.setdefault(batch.shard, []).append(batch)
        pending: dict[int, BatchResult] = {}
        wait_start = time.perf_counter()
        for result in results:
            self.progress.add(result, time.perf_counter() - wait_start)
            pending[result.number] = result
            shard = batches[result.number].shard
            if all(batch.number in pending for batch in shard_batches[shard]):
                write_start = time.perf_counter()
                self.write_shard(shard, shard_batches[shard], pending)
                self.progress.write_seconds += time.perf_counter() - write_start
            wait_start = time.perf_counter()
            self.progress.seconds = wait_start - self.progress.start
            self.on_progress(self.progress)

    def write_shard(
        self, shard: int, batches: Sequence[Batch], pending: dict[int, BatchResult]
    ) -> None:
        """Write a shard, and remove its results from `pending`."""
        items = [item for batch in batches for item in batch.items]
        results = [pending.pop(batch.number) for batch in batches]
        write_shard(self.folder, shard, items, results, self.settings)

"""Many pictures become vectors on disk.

Parquet files that are complete or absent, a run that can be continued.

Every batch holds the same pictures, at the same places, however often the run was interrupted:
batch b of shard s is items `s * shard_size + b * batch_size` and those after it, with blank
pictures for what cannot be read. So the vectors do not depend on where it was interrupted.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import platform
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from siglip_port import atomic
from siglip_port.embed.embedder import Decoded, Embedder, Output, Store, decode
from siglip_port.embed.inputs import Item, digest, find_items
from siglip_port.image_processing import Backend, ImageProcessor
from siglip_port.model import SigLipVisionModel
from siglip_port.optimize import selection as inference

SETTINGS, KEY = "_run.json", b"siglip_port"
"""The file that tells of a folder how it came about, and the key of the same in a parquet file's metadata."""

PATIENCE = 15.0
"""Seconds to wait for another run to end.

The workers of one that was killed hold its lock until they notice it.
"""

DIED = "the process that decoded it died, twice: out of memory, or a fault of the decoder"
"""The error of a picture that kills whoever decodes it."""

FASTEST = "fastest"

Format = Literal["parquet", "npy"]


class EmbedError(Exception):
    """A run cannot begin, or not go on; the message says why. What is complete stays."""


@dataclass(frozen=True)
class Settings:
    """All that decides which rows and numbers a run ends with. A folder holds rows of one alone.

    Attributes:
        source: the model's name: a Hub id or a path.
        commit: of the Hub repository, if it is one.
        weights: a hash of all parameters.
        dtype: in which they are computed with.
        form: a name of `siglip_port.optimize.selection.ENGINES`.
        device: `cpu`, `cuda`, ...
        threads: of the CPU, for the model.
        batch_size: pictures at a time.
        shard_size: rows a file.
        output: `pooled`, a vector a picture; or `tokens`, [N, D] row by row.
        normalize: whether vectors are of unit length.
        store: `float32` or `float16`.
        format: `parquet`; or `npy`, vectors beside the parquet files.
        preprocess: a hash of every choice that changes a pixel.
        processor: those choices.
        pictures: how many.
        ids: a hash of their ids.
    """

    source: str
    commit: str | None
    weights: str
    dtype: str
    form: str
    device: str
    threads: int
    batch_size: int
    shard_size: int
    output: Output
    normalize: bool
    store: Store
    format: Format
    preprocess: str
    processor: dict[str, Any]
    pictures: int
    ids: str


@dataclass
class Progress:
    """How far a run is, and where its time has gone. Also its summary.

    Attributes:
        total: pictures.
        done: rows that are written or in memory, those of earlier runs included.
        failed: rows with an error among them.
        fresh: rows of this run.
        seconds: of this run, altogether; and of it `waiting` for pictures, `model`, `writing`. On a
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
        """Pictures a second, of this run."""
        return self.fresh / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, float]:
        """All figures."""
        return {**{k: v for k, v in asdict(self).items() if k != "started"}, "rate": self.rate}


@dataclass(frozen=True)
class Batch:
    """Pictures that go through the model together.

    Attributes:
        number: of the batches that are to be done in a run.
        shard: of which it is a part.
        items: the pictures.
    """

    number: int
    shard: int
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Result:
    """What became of a batch.

    Attributes:
        number: of the batch.
        sizes: (height, width) of each picture, if it could be read.
        errors: why not, or empty.
        vectors: [B, embedding_dim], NaN where there is an error.
        decoding: seconds that it took, of all pictures.
        preprocessing: likewise.
        model: seconds that it took.
    """

    number: int
    sizes: tuple[tuple[int, int] | None, ...]
    errors: tuple[str, ...]
    vectors: NDArray[Any]
    decoding: float
    preprocessing: float
    model: float


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
    store: Store = "float32",
    format: Format = "parquet",
    backend: Backend = "pil",
    engine: Literal["local", "ray"] = "local",
    address: str | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Writes the vectors of many pictures as parquet files, `part-000000.parquet` and so on.

    Columns: `id`, `path`, `width`, `height`, `embedding` (a list of fixed size, NaN where there is
        an error), `error`
    (null where there is none). The metadata of each file tells how it came about. A run that was
    ended by whatever is continued by the same call; what is complete is not done again.

    Args:
        inputs: see `siglip_port.embed.inputs.find_items`.
        out: a folder; made if it does not exist.
        model: the tower, where it is to run.
        dtype: to compute in; None for the model's own.
        form: a name of `siglip_port.optimize.selection.ENGINES`; `fastest` for the one that
            `optimize` chooses, which takes minutes the first time; None for the one that an earlier
            run of this folder took, or else the tower itself.
        threads: of the CPU, for the model; None for as many as an earlier run of this folder took,
            or torch does.
        batch_size: pictures at a time.
        shard_size: rows a file, rounded up to whole batches.
        workers: processes that decode, 0 for none besides this one, None for as many as there are
            processors; on a cluster, processes that hold the model, None for as many as fit.
        output: vectors, or tokens.
        normalize: whether to scale vectors to unit length.
        store: as what numbers to write them.
        format: where to: a column `embedding`; or, of each part, an array beside it, [rows, D], NaN
            where there is an error.
        backend: of `siglip_port.image_processing.ImageProcessor`.
        engine: this machine, or a Ray cluster: see `siglip_port.embed.ray`.
        address: of the cluster; None for the one that Ray finds, or a new one on this machine.
        report: called after every batch.

    Returns:
        What was done.

    Raises:
        ValueError: an argument is none that there is.
        EmbedError: the folder holds rows of other settings, is in use, or cannot be written to.
    """
    _check(model, shard_size, workers, format, engine, address)
    folder, items = (
        Path(out),
        find_items([inputs] if isinstance(inputs, (str, os.PathLike)) else inputs),
    )
    earlier = _earlier(folder) or {}
    if threads is None:
        threads = earlier.get("threads", torch.get_num_threads())
    if form in (None, FASTEST) and "form" in earlier:
        form = earlier["form"]
    embedder = Embedder(
        model, dtype=dtype, form="eager" if form in (None, FASTEST) else form, threads=threads, batch_size=batch_size,
        output=output, normalize=normalize, store=store, backend=backend,
    )  # fmt: skip
    if form == FASTEST:
        with inference.threads(threads):
            embedder.form = inference.optimize(
                model, dtype=dtype, batch_size=batch_size
            ).choice.engine
    if (
        engine == "local"
    ):  # before the folder is touched; on a cluster, it is for the nodes to find out
        try:
            embedder.model  # noqa: B018
        except inference.EngineError as error:
            raise EmbedError(
                f"form {embedder.form} cannot be used here: {error}; take another, or eager"
            ) from error
    settings = _settings(embedder, items, shard_size, format)
    try:
        with _alone(folder):
            _keep_settings(folder, settings)
            run = _Run(folder, items, settings, report)
            batches = list(run.missing())
            if engine == "ray":
                from siglip_port.embed.ray import on_ray

                results = on_ray(embedder, batches, workers, address)
            else:
                results = here(embedder, batches, workers)
            with contextlib.closing(results):
                run.take(batches, results)
            return run.progress
    except OSError as error:
        raise EmbedError(
            f"{folder} cannot be written to: {error.strerror or error}; what is complete stays, "
            "and the same command "
            "goes on from there"
        ) from error


def _check(
    model: SigLipVisionModel,
    shard_size: int,
    workers: int | None,
    file_format: str,
    engine: str,
    address: str | None,
) -> None:
    if not isinstance(model, SigLipVisionModel):
        raise ValueError(f"model must be a SigLipVisionModel, got a {type(model).__name__}")
    for name, value, least in (
        ("shard_size", shard_size, 1),
        ("workers", 0 if workers is None else workers, 0),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number from {least} on, got {value!r}")
    if file_format not in ("parquet", "npy") or engine not in ("local", "ray"):
        raise ValueError(
            f"format must be parquet or npy, engine local or ray, got {file_format!r} and "
            f"{engine!r}"
        )
    if address is not None and engine != "ray":
        raise ValueError("an address is that of a Ray cluster: pass engine ray with it")


def _settings(
    embedder: Embedder, items: Sequence[Item], shard_size: int, file_format: Format
) -> Settings:
    home = embedder.plain.transformer.post_layernorm.weight
    return Settings(
        source=embedder.name,
        commit=embedder.commit,
        weights=inference.weights_hash(embedder.plain)[:16],
        dtype=str(embedder.dtype or home.dtype).removeprefix("torch."),
        form=embedder.form,
        device=str(home.device),
        threads=embedder.threads,
        batch_size=embedder.batch_size,
        shard_size=-(-shard_size // embedder.batch_size) * embedder.batch_size,
        output=embedder.output,
        normalize=embedder.normalize,
        store=embedder.store,
        format=file_format,
        preprocess=embedder.processor.fingerprint,
        processor=asdict(embedder.processor),
        pictures=len(items),
        ids=digest(items),
    )


# --- the work -------------------------------------------------------------------------------------


def here(embedder: Embedder, batches: Sequence[Batch], workers: int | None) -> Generator[Result]:
    """Decodes in worker processes, and runs the model in this one.

    Args:
        embedder: the model.
        batches: what is to be done.
        workers: see `embed`.
    """
    decoded = _decoded(batches, embedder.processor, _processors() if workers is None else workers)
    for batch, pictures in zip(batches, decoded, strict=True):
        yield result(embedder, batch.number, pictures)


def _decoded(
    batches: Sequence[Batch], processor: ImageProcessor, workers: int
) -> Iterator[list[Decoded]]:
    """Decodes batches in their order, some of them ahead.

    When a process dies, the batch that was waited for is decoded once more, a picture at a time: so
    a picture that kills it becomes a row with an error, and one that had only bad luck does not.
    """
    workers = min(workers, len(batches))
    if not workers:
        yield from (_decode(batch.items, processor) for batch in batches)
        return
    left, ahead, pool = deque(batches), deque[Future[list[Decoded]]](), _processes(workers)
    try:
        while left:
            try:
                while len(ahead) < min(2 * workers, len(left)):
                    ahead.append(pool.submit(_decode, left[len(ahead)].items, processor))
                found = ahead[0].result()
                ahead.popleft()
            except BrokenProcessPool:  # all its processes end, and what they were to do is lost
                pool.shutdown()
                ahead.clear()
                found, pool = _one_by_one(left[0].items, processor), _processes(workers)
            left.popleft()
            yield found
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(items: Sequence[Item], processor: ImageProcessor) -> list[Decoded]:
    return [decode(item, processor) for item in items]


def _one_by_one(items: Sequence[Item], processor: ImageProcessor) -> list[Decoded]:
    found, pool = list[Decoded](), _processes(1)
    for item in items:
        decoded = [Decoded(None, None, DIED, 0.0)]
        for _ in range(2):
            try:
                decoded = pool.submit(_decode, [item], processor).result()
                break
            except BrokenProcessPool:
                pool.shutdown()
                pool = _processes(1)
        found += decoded
    pool.shutdown()
    return found


def _processes(count: int) -> ProcessPoolExecutor:
    """Processes that have begun: else every picture would be found to kill them."""
    pool = ProcessPoolExecutor(count, initializer=_begin_worker)
    try:
        pool.submit(os.getpid).result()
    except (BrokenProcessPool, OSError) as error:
        pool.shutdown()
        raise EmbedError(
            f"processes to decode cannot be begun: {error}; take fewer workers, or 0. A script of "
            "yours must call "
            "embed under `if __name__ == '__main__':` where Python begins processes by importing it"
        ) from error
    return pool


def result(embedder: Embedder, number: int, decoded: Sequence[Decoded]) -> Result:
    """Runs the model on what was decoded of the batch of this number."""
    started = time.perf_counter()
    vectors, errors = embedder.vectors(decoded)
    seconds = time.perf_counter() - started
    return Result(
        number,
        tuple(each.size for each in decoded),
        tuple(errors),
        vectors,
        sum(each.decoding for each in decoded),
        sum(each.preprocessing for each in decoded),
        seconds,
    )


def _processors() -> int:
    """That this process may use; not every system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin_worker() -> None:
    """Ctrl-C goes to all processes of a terminal.

    The main one stops its workers itself, or is killed, and they end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Else a worker that has pictures left for a process that was killed waits for ever, and keeps its locks."""
    parent = multiprocessing.parent_process()
    while parent is not None and os.getppid() == parent.pid:
        time.sleep(0.5)
    os._exit(1)


class _Run:
    """What is missing, and how it is written."""

    def __init__(
        self,
        folder: Path,
        items: Sequence[Item],
        settings: Settings,
        report: Callable[[Progress], None],
    ) -> None:
        self.folder, self.items, self.settings, self.report = folder, items, settings, report
        self.progress = Progress(len(items))

    def missing(self) -> Iterator[Batch]:
        """The batches of all shards that are not there. Counts those that are."""
        size, step, number = self.settings.shard_size, self.settings.batch_size, itertools.count()
        for shard, first in enumerate(range(0, len(self.items), size)):
            items = self.items[first : first + size]
            if all(path.exists() for path in self._files(shard)):
                rows, failed = _count(path := self._files(shard)[-1])
                if rows != len(items):
                    raise EmbedError(
                        f"{path} holds {rows} rows, expected {len(items)}; delete it, and run again"
                    )
                self.progress.done += rows
                self.progress.failed += failed
            else:
                for at in range(0, len(items), step):
                    yield Batch(next(number), shard, tuple(items[at : at + step]))

    def take(self, batches: Sequence[Batch], results: Iterator[Result]) -> None:
        """Takes results in any order; writes a shard when all of it is there."""
        left: dict[int, set[int]] = {}
        for batch in batches:
            left.setdefault(batch.shard, set()).add(batch.number)
        waiting, progress = dict[int, Result](), self.progress
        asked = time.perf_counter()
        for found in results:
            progress.waiting += max(0.0, time.perf_counter() - asked - found.model)
            progress.model += found.model
            progress.decoding += found.decoding
            progress.preprocessing += found.preprocessing
            progress.fresh += len(found.errors)
            progress.done += len(found.errors)
            progress.failed += sum(map(bool, found.errors))
            waiting[found.number] = found
            numbers = left[shard := batches[found.number].shard]
            if numbers <= waiting.keys():
                started = time.perf_counter()
                self._write(shard, [(batches[n].items, waiting.pop(n)) for n in sorted(numbers)])
                progress.writing += time.perf_counter() - started
            asked = time.perf_counter()
            progress.seconds = asked - progress.started
            self.report(progress)

    def _files(self, shard: int, folder: Path | None = None) -> list[Path]:
        """What a shard consists of; the last one is put in its place last."""
        path = (folder or self.folder) / f"part-{shard:06}.parquet"
        return [path.with_suffix(".npy"), path] if self.settings.format == "npy" else [path]

    def _write(self, shard: int, parts: Sequence[tuple[Sequence[Item], Result]]) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        items = [item for some, _ in parts for item in some]
        errors = [error or None for _, found in parts for error in found.errors]
        sizes = [size or (None, None) for _, found in parts for size in found.sizes]
        vectors = np.concatenate([found.vectors for _, found in parts])
        columns = {
            "id": pa.array([_text(item.id) for item in items], pa.string()),
            "path": pa.array([_text(item.path) for item in items], pa.string()),
            "width": pa.array([width for _, width in sizes], pa.int32()),
            "height": pa.array([height for height, _ in sizes], pa.int32()),
            # No nulls: releases of pyarrow before 26 write lists of fixed size that are null, and
            # cannot read them.
            "embedding": pa.FixedSizeListArray.from_arrays(
                pa.array(vectors.reshape(-1)), vectors.shape[1]
            ),
            "error": pa.array(errors, pa.string()),
        }
        if self.settings.format == "npy":
            del columns["embedding"]
        about = {
            **asdict(self.settings),
            "failed": sum(e is not None for e in errors),
            "versions": _versions(),
        }
        table = pa.table(columns).replace_schema_metadata({KEY: json.dumps(about)})
        with atomic.staging_dir(self.folder) as place:
            files = self._files(shard, place)
            parquet.write_table(table, files[-1])
            if self.settings.format == "npy":
                np.save(files[0], vectors)
            atomic.commit_files(files, self.folder)


def _text(name: str) -> str:
    """A name of a file, which may be no Unicode."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _versions() -> dict[str, str]:
    names = ("siglip-port", "torch", "pillow", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


# --- what is there already ------------------------------------------------------------------------


def _count(path: Path) -> tuple[int, int]:
    """How many rows a file has, and how many of them failed."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        metadata = parquet.read_metadata(path)
        return metadata.num_rows, json.loads(metadata.metadata[KEY])["failed"]
    except (OSError, pa.ArrowException, TypeError, KeyError, ValueError) as error:
        raise EmbedError(
            f"{path} is no file of this program, or damaged: {error}; delete it, and run again"
        ) from error


def read_settings(folder: Path) -> dict[str, Any] | None:
    """How a folder came about: `Settings` as a dictionary; None where nothing says so.

    Raises:
        EmbedError: what says so is damaged.
    """
    try:
        content = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise EmbedError(
            f"{folder / SETTINGS} cannot be read: {error}; take another folder"
        ) from error
    if (
        not isinstance(content, dict)
        or not {each.name for each in fields(Settings)} <= content.keys()
    ):
        raise EmbedError(f"{folder / SETTINGS} is not of this program; take another folder")
    return content


def _earlier(folder: Path) -> dict[str, Any] | None:
    """How the rows of a folder came about; None where there are none, whatever was tried before.

    Raises:
        EmbedError: there are rows, and nothing says how they came about.
    """
    if folder.exists() and not folder.is_dir():
        raise EmbedError(f"{folder} is a file; name a folder")
    if not any(folder.glob("part-*.parquet")):
        return None
    earlier = read_settings(folder)
    if earlier is None:
        raise EmbedError(f"{folder} holds parquet files, but no {SETTINGS}; take another folder")
    return earlier


def _keep_settings(folder: Path, settings: Settings) -> None:
    """Writes down what this folder holds; or makes sure that it is the same."""
    wanted = json.loads(json.dumps(asdict(settings)))
    earlier = _earlier(folder)
    if earlier is None:
        with atomic.staging_dir(folder) as place:
            (place / SETTINGS).write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
            atomic.commit_files([place / SETTINGS], folder)
        return
    differs = [name for name in wanted if earlier.get(name) != wanted[name] and name != "processor"]
    if differs:
        told = "; ".join(
            f"{name} was {earlier.get(name)!r} and would be {wanted[name]!r}" for name in differs
        )
        raise EmbedError(
            f"{folder} holds rows of another run: {told}; take another folder, or the same settings"
        )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Makes the folder, and keeps other runs out of it.

    The lock ends with the process, however that ends.
    """
    from huggingface_hub.utils import WeakFileLock

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with WeakFileLock(folder / ".lock", timeout=PATIENCE):
            yield
    except TimeoutError as error:
        raise EmbedError(
            f"another run is writing to {folder}; wait for it, or take another folder"
        ) from error

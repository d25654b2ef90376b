"""The files of a run: shards of rows, and the settings that they were made with.

Files are complete or absent, whatever ends the run.
"""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from siglip_port import __version__, atomic
from siglip_port.embed.batches import BatchResult
from siglip_port.embed.errors import EmbedError
from siglip_port.embed.inputs import Item
from siglip_port.embed.options import FileFormat, Output, OutputDtype

if TYPE_CHECKING:
    import pyarrow as pa

SETTINGS_FILE = "_run.json"
METADATA_KEY = b"siglip_port"
"""The key of the settings in the metadata of a parquet file."""

LOCK_SECONDS = 15.0
"""How long to wait for another run to end.

The workers of one that was killed hold its lock until they notice it.
"""


@dataclass(frozen=True)
class Settings:
    """All that decides which rows and numbers a run ends with. A folder holds rows of one alone.

    The attributes are also the keys of `_run.json` and of the metadata of every parquet file: those
    of older runs are read, so they stay as they are.

    Attributes:
        source: the model's name: a Hub id or a path.
        commit: of the Hub repository, if it is one.
        weights: a hash of all parameters.
        dtype: that is computed in.
        form: the engine, a name of `siglip_port.optimize.ENGINES`.
        device: `cpu`, `cuda`, ...
        threads: CPU threads for the model.
        batch_size: images at a time.
        shard_size: rows a file.
        output: `pooled`, one vector an image; or `tokens`, [N, D] row by row.
        normalize: whether vectors are of unit length.
        store: `float32` or `float16`.
        format: `parquet`; or `npy`, vectors beside the parquet files.
        preprocess: a hash of every choice that changes a pixel.
        processor: those choices.
        images: how many images.
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
    store: OutputDtype
    format: FileFormat
    preprocess: str
    processor: dict[str, Any]
    pictures: int
    ids: str


# --- settings -------------------------------------------------------------------------------------


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Read the `Settings` of a folder, as a dictionary; None where there are none.

    Raises:
        EmbedError: they are damaged.
    """
    path = folder / SETTINGS_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise EmbedError(f"{path} cannot be read: {error}; take another folder") from error
    names = {field.name for field in fields(Settings)}
    if not isinstance(content, dict) or not names <= content.keys():
        raise EmbedError(f"{path} is not of this program; take another folder")
    return content


def read_settings_of_rows(folder: Path) -> dict[str, Any] | None:
    """Read the settings of the rows of a folder; None where there are no rows.

    Settings without rows are of a run that could not begin, and bind nobody.

    Raises:
        EmbedError: there are rows, and no settings; or the settings are damaged.
    """
    if folder.exists() and not folder.is_dir():
        raise EmbedError(f"{folder} is a file; name a folder")
    if not any(folder.glob("part-*.parquet")):
        return None
    settings = read_settings(folder)
    if settings is None:
        raise EmbedError(
            f"{folder} holds parquet files, but no {SETTINGS_FILE}; take another folder"
        )
    return settings


def claim_folder(folder: Path, settings: Settings) -> None:
    """Write down the settings of a folder; or make sure that its rows have the same.

    Raises:
        EmbedError: the folder holds rows of other settings.
    """
    new = json.loads(json.dumps(asdict(settings)))
    old = read_settings_of_rows(folder)
    if old is None:
        with atomic.staging_dir(folder) as staging:
            file = staging / SETTINGS_FILE
            file.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8")
            atomic.commit_files([file], folder)
        return
    differences = []
    for name, value in new.items():
        if old.get(name) != value and name != "processor":  # `preprocess` is its hash
            differences.append(f"{name} was {old.get(name)!r} and would be {value!r}")
    if differences:
        raise EmbedError(
            f"{folder} holds rows of another run: {'; '.join(differences)}; take another folder, "
            "or the same settings"
        )


@contextlib.contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Make a folder, and keep other runs out of it.

    The lock ends with the process, however that ends.

    Raises:
        EmbedError: another run has the lock.
    """
    from huggingface_hub.utils import WeakFileLock

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with WeakFileLock(folder / ".lock", timeout=LOCK_SECONDS):
            yield
    except TimeoutError as error:
        raise EmbedError(
            f"another run is writing to {folder}; wait for it, or take another folder"
        ) from error


# --- shards ---------------------------------------------------------------------------------------


def shard_files(folder: Path, shard: int, file_format: FileFormat) -> list[Path]:
    """Return the files of a shard; the last one is put in its place last."""
    path = folder / f"part-{shard:06}.parquet"
    if file_format == "npy":
        return [path.with_suffix(".npy"), path]
    return [path]


def write_shard(
    folder: Path,
    shard: int,
    items: Sequence[Item],
    results: Sequence[BatchResult],
    settings: Settings,
) -> None:
    """Write the rows of a shard.

    Args:
        folder: of the run.
        shard: its number.
        items: all of the shard.
        results: of all its batches, in their order.
        settings: of the run.
    """
    from pyarrow import parquet

    vectors = np.concatenate([result.vectors for result in results])
    table = shard_table(items, results, vectors)
    if settings.format == "npy":
        table = table.drop_columns(["embedding"])
    about = {
        **asdict(settings),
        "failed": len(items) - table.column("error").null_count,
        "versions": package_versions(),
    }
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(about)})
    with atomic.staging_dir(folder) as staging:
        files = shard_files(staging, shard, settings.format)
        parquet.write_table(table, files[-1])
        if settings.format == "npy":
            np.save(files[0], vectors)
        atomic.commit_files(files, folder)


def shard_table(
    items: Sequence[Item], results: Sequence[BatchResult], vectors: NDArray[Any]
) -> pa.Table:
    """Put the columns of a shard together."""
    import pyarrow as pa

    errors: list[str | None] = []
    widths: list[int | None] = []
    heights: list[int | None] = []
    for result in results:
        for error, size in zip(result.errors, result.sizes, strict=True):
            errors.append(error or None)
            height, width = size or (None, None)
            heights.append(height)
            widths.append(width)
    # No nulls in `embedding`: releases of pyarrow before 26 write lists of fixed size that are
    # null, and cannot read them.
    numbers = pa.array(vectors.reshape(-1))
    return pa.table(
        {
            "id": pa.array([printable(item.id) for item in items], pa.string()),
            "path": pa.array([printable(item.path) for item in items], pa.string()),
            "width": pa.array(widths, pa.int32()),
            "height": pa.array(heights, pa.int32()),
            "embedding": pa.FixedSizeListArray.from_arrays(numbers, vectors.shape[1]),
            "error": pa.array(errors, pa.string()),
        }
    )


def printable(name: str) -> str:
    """Return the name of a file as text, which some names are not."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def package_versions() -> dict[str, str]:
    """Return the versions that stand in the metadata."""
    versions = {"python": platform.python_version(), "siglip-port": __version__}
    for name in ("torch", "pillow", "numpy"):
        versions[name] = version(name)
    return versions


def count_rows(path: Path) -> tuple[int, int]:
    """Return how many rows a shard has, and how many of them have an error.

    Raises:
        EmbedError: the file is damaged.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        metadata = parquet.read_metadata(path)
        about = json.loads(metadata.metadata[METADATA_KEY])
        return metadata.num_rows, about["failed"]
    except (OSError, pa.ArrowException, TypeError, KeyError, ValueError) as error:
        raise EmbedError(
            f"{path} is no file of this program, or damaged: {error}; delete it, and run again"
        ) from error


def read_vectors(path: Path) -> tuple[list[str], list[str], NDArray[np.float32]]:
    """Read the rows of a shard that have no error: ids, paths, and vectors [rows, D]."""
    from pyarrow import parquet

    table = parquet.read_table(path)
    readable = table.column("error").is_null().to_numpy()
    ids = table.column("id").filter(readable).to_pylist()
    paths = table.column("path").filter(readable).to_pylist()
    array_file = path.with_suffix(".npy")
    if array_file.exists():
        vectors = np.load(array_file, mmap_mode="r")[readable]
    else:
        column = table.column("embedding").combine_chunks()
        numbers = column.filter(readable).flatten().to_numpy(zero_copy_only=False)
        vectors = numbers.reshape(len(ids), column.type.list_size)
    return ids, paths, vectors.astype(np.float32)

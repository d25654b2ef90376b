"""Files of a run: shards of rows, and the settings that produced them.

A file is either complete or absent, even after a crash.
"""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
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
from siglip_port.embed.options import FileFormat, OutputDtype

if TYPE_CHECKING:
    import pyarrow as pa

SETTINGS_FILE = "_run.json"
METADATA_KEY = b"siglip_port"
"""Key of the settings in the metadata of a Parquet file."""

FORMAT_VERSION = 2
"""Version of the settings; folders of other versions are refused."""

LOCK_SECONDS = 15.0
"""Seconds to wait for another run to end.

The workers of a killed run hold its lock until they detect that their parent has died.
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that determine the output; one set per output folder.

    The attributes are the keys of `_run.json` and of the metadata of every Parquet file. Any change
    of them needs a new `FORMAT_VERSION`. `_run.json` may also have the key `model`.

    Attributes:
        version: Format version.
        source: Hub id or path of the model.
        commit: Commit of the Hub repository; None for local files.
        weights: Hash of all parameters.
        dtype: Compute dtype.
        engine: Name in `siglip_port.optimize.ENGINES`.
        device: `cpu`, `cuda`, ...
        threads: CPU threads for the model.
        batch_size: Images per forward pass.
        shard_size: Rows per file.
        tokens: Whether rows contain all tokens, [N, D] row by row, instead of the pooled embedding.
        normalize: Whether embeddings have unit length.
        output_dtype: Dtype of the stored embeddings.
        format: `parquet`; or `npy`, with embeddings in arrays beside the Parquet files.
        preprocessing: Hash of `processor`.
        processor: Image processor settings.
        num_images: Number of images.
        ids: Hash of all image ids in order.
    """

    version: int = FORMAT_VERSION
    source: str
    commit: str | None
    weights: str
    dtype: str
    engine: str
    device: str
    threads: int
    batch_size: int
    shard_size: int
    tokens: bool
    normalize: bool
    output_dtype: OutputDtype
    format: FileFormat
    preprocessing: str
    processor: dict[str, Any]
    num_images: int
    ids: str


# --- settings -------------------------------------------------------------------------------------


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Read the `Settings` of an output folder as a dictionary; None if it has none.

    Raises:
        EmbedError: The file is damaged, or of another format version.
    """
    path = folder / SETTINGS_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise EmbedError(
            f"{path}: cannot be read ({error}); choose another output folder"
        ) from error
    validate_settings(path, content)
    return content  # type: ignore[no-any-return]


def validate_settings(path: Path, content: object) -> None:
    """Raise EmbedError unless `content`, read from `path`, has the fields of `Settings`."""
    if isinstance(content, dict) and "version" not in content and "store" in content:
        raise EmbedError(
            f"{path.parent}: embeddings were written by an earlier version of siglip-port; use "
            "that version, or write to another folder"
        )
    # Before the fields, which other versions may have changed.
    if isinstance(content, dict) and content.get("version", FORMAT_VERSION) != FORMAT_VERSION:
        raise EmbedError(
            f"{path.parent}: embeddings have format version {content['version']!r}, this "
            f"siglip-port reads {FORMAT_VERSION}; use the version that wrote them, or write to "
            "another folder"
        )
    names = {field.name for field in fields(Settings)}
    if not isinstance(content, dict) or not names <= content.keys():
        raise EmbedError(
            f"{path}: not a settings file of siglip-port; choose another output folder"
        )


def read_settings_of_rows(folder: Path) -> dict[str, Any] | None:
    """Read the settings of the rows in an output folder; None if it has no rows.

    Settings without rows are of a run that wrote nothing, and are ignored.

    Raises:
        EmbedError: There are rows without settings, or `read_settings` fails.
    """
    if folder.exists() and not folder.is_dir():
        raise EmbedError(f"{folder}: not a folder; choose another output folder")
    if not any(folder.glob("part-*.parquet")):
        return None
    settings = read_settings(folder)
    if settings is None:
        raise EmbedError(
            f"{folder}: contains Parquet files but no {SETTINGS_FILE}; choose another output folder"
        )
    return settings


def claim_folder(folder: Path, settings: Settings, model: Mapping[str, Any]) -> None:
    """Write the settings of an output folder, or check that its rows have the same settings.

    Args:
        folder: Output folder.
        settings: Settings of the run.
        model: What loads the model again, see `siglip_port.embed.stored_model`; stored with the
            settings, if it is not empty, and not compared.

    Raises:
        EmbedError: The folder contains rows with other settings.
    """
    new = json.loads(json.dumps(asdict(settings)))
    old = read_settings_of_rows(folder)
    if old is None:
        with atomic.staging_dir(folder) as staging:
            file = staging / SETTINGS_FILE
            content = {**new, "model": model} if model else new
            file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            atomic.commit_files([file], folder)
        return
    differences = []
    for name, value in new.items():
        if old.get(name) != value and name != "processor":  # `preprocessing` is its hash
            differences.append(f"{name} is {old.get(name)!r}, requested {value!r}")
    if differences:
        raise EmbedError(
            f"{folder}: existing embeddings have other settings: {'; '.join(differences)}; use "
            "the same settings or another output folder"
        )


@contextlib.contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Create an output folder and lock it against other runs.

    The lock is released when the process ends, even after a crash.

    Raises:
        EmbedError: Another run holds the lock.
    """
    from huggingface_hub.utils import WeakFileLock

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with WeakFileLock(folder / ".lock", timeout=LOCK_SECONDS):
            yield
    except TimeoutError as error:
        raise EmbedError(
            f"{folder}: another run is writing to it; wait for it or choose another folder"
        ) from error


# --- shards ---------------------------------------------------------------------------------------


def shard_files(folder: Path, shard: int, file_format: FileFormat) -> list[Path]:
    """Return the files of a shard, in the order in which they are committed."""
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
        folder: Output folder.
        shard: Index of the shard.
        items: Images of the shard.
        results: Results of its batches, in order.
        settings: Settings of the run.
    """
    from pyarrow import parquet

    vectors = np.concatenate([result.vectors for result in results])
    table = shard_table(items, results, vectors)
    if settings.format == "npy":
        table = table.drop_columns(["embedding"])
    metadata = {
        **asdict(settings),
        "failed": len(items) - table.column("error").null_count,
        "versions": package_versions(),
    }
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata)})
    with atomic.staging_dir(folder) as staging:
        files = shard_files(staging, shard, settings.format)
        parquet.write_table(table, files[-1])
        if settings.format == "npy":
            np.save(files[0], vectors)
        atomic.commit_files(files, folder)


def shard_table(
    items: Sequence[Item], results: Sequence[BatchResult], vectors: NDArray[Any]
) -> pa.Table:
    """Assemble the columns of a shard."""
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
    # No nulls in `embedding`: pyarrow before 26 writes fixed-size lists that are null, but cannot
    # read them.
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
    """Return a file name as valid Unicode, with undecodable bytes as backslash escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def package_versions() -> dict[str, str]:
    """Return the package versions stored in the metadata."""
    versions = {"python": platform.python_version(), "siglip-port": __version__}
    for name in ("torch", "pillow", "numpy"):
        versions[name] = version(name)
    return versions


def count_rows(path: Path) -> tuple[int, int]:
    """Return the number of rows of a shard, and the number of those with an error.

    Raises:
        EmbedError: The file is damaged.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.read_metadata(path)
        metadata = json.loads(file.metadata[METADATA_KEY])
        return file.num_rows, metadata["failed"]
    except (OSError, pa.ArrowException, TypeError, KeyError, ValueError) as error:
        raise EmbedError(
            f"{path}: damaged, or not written by siglip-port ({error}); delete it and run again"
        ) from error


def read_vectors(path: Path) -> tuple[list[str], list[str], NDArray[np.float32]]:
    """Read the rows of a shard without an error: ids, paths, and embeddings [rows, D]."""
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


def first_errors(folder: Path, limit: int) -> list[str]:
    """Return the errors of the first rows that have one, with their ids.

    Args:
        folder: Output folder.
        limit: Maximum number of errors.
    """
    from pyarrow import parquet

    errors: list[str] = []
    for path in sorted(folder.glob("part-*.parquet")):
        table = parquet.read_table(path, columns=["id", "error"])
        for row in table.filter(table.column("error").is_valid()).to_pylist():
            errors.append(f"{row['id']}: {row['error']}")
            if len(errors) == limit:
                return errors
    return errors

"""Inputs of a run: folders, patterns, lists, tar and Parquet files.

Images are listed as items, which any process can read.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from siglip_port.image_reading import ImageError, ImageInput, check_file_size, is_url, read_file

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_SUFFIXES = (
    ".avif",
    ".bmp",
    ".gif",
    ".heic",
    ".heif",
    ".jfif",
    ".jp2",
    ".jpe",
    ".jpeg",
    ".jpg",
    ".jxl",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)
"""File suffixes of images; other files in folders and tar files are skipped.

Pillow needs plugins for some of these formats.
"""

ARCHIVE_SUFFIXES = (".bz2", ".gz", ".tgz", ".xz", ".zip", ".zst")

IMAGE_COLUMNS = ("bytes", "image", "path")
"""Image columns of a Parquet file, in order of preference.

`bytes`: file contents. `image`: structs of `bytes` and `path`, as in Hugging Face `datasets`.
`path`: paths.
"""


@dataclass(frozen=True)
class Item:
    """One image.

    Attributes:
        id: Id of the output row.
        path: Path of the image file, or of the tar or Parquet file that contains the image.
        location: (byte offset, size in bytes) in a tar file, (row group, row) in a Parquet file;
            empty for an image file.
    """

    id: str
    path: str
    location: tuple[int, ...] = ()


def find_items(inputs: Sequence[str | os.PathLike[str]]) -> list[Item]:
    """List the images of all inputs in a deterministic order.

    Args:
        inputs: Folders, searched recursively; images; `.txt` files with a path per line, relative
            to the file; `.tar` files; `.parquet` files with a column of `IMAGE_COLUMNS` and
            optionally `id`; or patterns of images, tar and Parquet files, such as `photos/*.jpg`.

    Raises:
        ValueError: An input does not exist, is a URL, is not supported, or contains no images.
    """
    items: list[Item] = []
    for entry in inputs:
        name = os.fspath(entry)
        if is_url(name):
            raise ValueError(f"{name} is a URL; download the images first and pass their folder")
        listed = list(items_of_input(name))
        if not listed:
            raise ValueError(
                f"{name}: no images found ({', '.join(IMAGE_SUFFIXES)}); pass tar and Parquet "
                "files by name or as a pattern such as 'folder/*.tar'"
            )
        if len(inputs) > 1:  # two folders may contain images of the same name
            listed = [replace(item, id=f"{name}/{item.id}") for item in listed]
        items += listed
    if not items:
        raise ValueError("no inputs; pass folders, files or patterns")
    return items


def items_of_input(name: str) -> Iterator[Item]:
    """List the images of one input."""
    path = Path(name)
    if path.is_dir():
        yield from items_of_folder(path)
    elif path.is_file() and path.suffix.lower() == ".txt":
        yield from items_of_list(path)
    elif path.is_file():
        yield from items_of_file(path)
    elif glob.has_magic(name):
        yield from items_of_pattern(name)
    else:
        raise ValueError(f"{name}: does not exist; pass a folder, a file or a quoted pattern")


def items_of_pattern(pattern: str) -> Iterator[Item]:
    """List the images of the files that match a pattern."""
    names = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (absolute patterns too)
    files = [Path(name) for name in names if Path(name).is_file()]
    if not files:
        raise ValueError(f"{pattern}: no file matches this pattern")
    for path in files:
        for item in items_of_file(path):
            name = path.as_posix()
            yield replace(item, id=f"{name}/{item.id}" if item.location else name)


def items_of_file(path: Path) -> Iterator[Item]:
    """List the images of one file: a tar or Parquet file, or an image."""
    suffix = path.suffix.lower()
    if suffix == ".tar":
        yield from items_of_tar(path)
    elif suffix == ".parquet":
        yield from items_of_parquet(path)
    elif suffix in ARCHIVE_SUFFIXES:
        raise ValueError(
            f"{path}: compressed archives are not supported; unpack it or pass an uncompressed .tar"
        )
    else:
        yield Item(path.name, str(path))


def items_of_folder(path: Path) -> Iterator[Item]:
    """List the images of a folder recursively, following links; each folder is listed once.

    Raises:
        ValueError: A folder cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise ValueError(f"{error.filename}: folder cannot be listed ({error.strerror})") from error

    visited = {os.path.realpath(path)}
    for parent, folders, names in os.walk(path, onerror=fail, followlinks=True):
        subfolders = sorted(folders)
        folders.clear()  # `os.walk` descends into the folders that are added again
        for name in subfolders:
            target = os.path.realpath(Path(parent, name))
            if target not in visited:
                visited.add(target)
                folders.append(name)
        for name in sorted(names):
            file = Path(parent, name)
            if file.suffix.lower() in IMAGE_SUFFIXES:
                yield Item(file.relative_to(path).as_posix(), str(file))


def items_of_list(path: Path) -> Iterator[Item]:
    """List the images of a text file with a path per line."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors may write a BOM
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a list of paths ({error})") from error
    for line in text.split("\n"):
        name = line.strip()
        if is_url(name):
            raise ValueError(f"{path}: {name} is a URL; download the images first, list the files")
        if name:
            yield Item(name, str(path.parent / name))


def items_of_tar(path: Path) -> Iterator[Item]:
    """List the images of an uncompressed tar file; workers read them by offset."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.size < 0:  # endless loop over the same member (CVE-2025-8194)
                    raise tarfile.ReadError(
                        f"{member.name} has an invalid size of {member.size} bytes"
                    )
                if member.isreg() and Path(member.name).suffix.lower() in IMAGE_SUFFIXES:
                    yield Item(member.name, str(path), (member.offset_data, member.size))
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"{path}: cannot be read as an uncompressed tar file ({error})") from error


def items_of_parquet(path: Path) -> Iterator[Item]:
    """List the rows of a Parquet file."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        names = set(file.schema_arrow.names)
        if not names & set(IMAGE_COLUMNS):
            raise ValueError(
                f"{path}: no image column; expected {' or '.join(IMAGE_COLUMNS)}, "
                f"found {', '.join(sorted(names))}"
            )
        for group in range(file.num_row_groups):
            rows = range(file.metadata.row_group(group).num_rows)
            if "id" in names:
                ids = file.read_row_group(group, columns=["id"]).column("id").to_pylist()
            else:
                ids = [f"{path.name}:{group}:{row}" for row in rows]
            for row in rows:
                yield Item(str(ids[row]), str(path), (group, row))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: cannot be read as a Parquet file ({error})") from error


def read(item: Item) -> bytes:
    """Return the file contents of an image.

    Raises:
        ImageError: The image cannot be read.
    """
    try:
        if not item.location:
            return read_file(item.path)
        if item.path.lower().endswith(".parquet"):
            return read_parquet_row(item)
        return read_tar_member(item)
    except OSError as error:
        raise ImageError(f"the image cannot be read: {error.strerror or error}") from error


def read_tar_member(item: Item) -> bytes:
    """Return the file contents of an image in a tar file."""
    offset, size = item.location
    check_file_size(size)
    with Path(item.path).open("rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) < size:
        raise ImageError("the tar file is truncated inside the image")
    return content


def read_parquet_row(item: Item) -> bytes:
    """Return the file contents of an image in a Parquet file, or at the path in the row."""
    import pyarrow as pa

    group, row = item.location
    try:
        table = read_row_group(item.path, group, Path(item.path).stat().st_mtime_ns)
        cells = [table.column(name)[row].as_py() for name in table.column_names]
    except (pa.ArrowException, IndexError, ValueError) as error:
        # Damaged, or changed since it was listed.
        raise ImageError(f"the Parquet file cannot be read: {error}") from error
    for cell in cells:
        image = bytes_or_path(cell)
        if isinstance(image, bytes):
            return image
        if image is not None and is_url(image):
            return read_file(image)
        if image is not None:
            return read_file(Path(item.path).parent / image)
    raise ImageError("the row contains neither bytes nor a path")


@functools.lru_cache(maxsize=1)
def read_row_group(path: str, group: int, modified_ns: int) -> pa.Table:
    """Read the image columns of a row group, in the order of `IMAGE_COLUMNS`.

    The last row group is cached, since neighboring items share it; `modified_ns`, the time of the
    file's last change, is part of the key.
    """
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    names = [name for name in IMAGE_COLUMNS if name in file.schema_arrow.names]
    return file.read_row_group(group, columns=names).select(names)


def load_image_input(image: object) -> ImageInput:
    """Return an input of `siglip_port.image_processing.to_rgb`.

    Args:
        image: `Item`, or a struct of `bytes` and `path`; anything else is returned unchanged.

    Raises:
        ImageError: The image cannot be read, or is missing.
    """
    if isinstance(image, Item):
        return read(image)
    if image is not None and not isinstance(image, Mapping):
        return cast("ImageInput", image)
    cell = bytes_or_path(image)
    if cell is None:
        raise ImageError("the row contains neither bytes nor a path")
    return cell


def bytes_or_path(cell: object) -> bytes | str | None:
    """Return the file contents or the path in a cell of an image column, None if it is empty."""
    if isinstance(cell, Mapping):
        cell = cell.get("path") if cell.get("bytes") is None else cell["bytes"]
    if isinstance(cell, bytes) or (isinstance(cell, str) and cell):
        return cell
    return None


def ids_digest(items: Sequence[Item]) -> str:
    """Return a hash of all ids in order, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{len(item.id)}:{item.id}".encode(errors="surrogatepass"))
    return digest.hexdigest()[:16]

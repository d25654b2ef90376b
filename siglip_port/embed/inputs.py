"""Where many images come from: folders, patterns, lists, tar and parquet files.

They are listed as items, which any process can read.
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

from siglip_port.image_reading import ImageError, ImageInput, check_file_size, read_file

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
"""Suffixes of image names in folders and tar files; other files are skipped.

Not all of these can be read.
"""

ARCHIVE_SUFFIXES = (".bz2", ".gz", ".tgz", ".xz", ".zip", ".zst")

IMAGE_COLUMNS = ("bytes", "image", "path")
"""Columns of a parquet file that hold images.

Contents of files; structs of `bytes` and `path`, as the library `datasets` writes them; or paths.
"""


@dataclass(frozen=True)
class Item:
    """One image.

    Attributes:
        id: of its row.
        path: of its file, or of the file that it lies in.
        location: in that file: (offset, size) in a tar file, (row group, row) in a parquet file;
            empty for a file of its own.
    """

    id: str
    path: str
    location: tuple[int, ...] = ()


def find_items(inputs: Sequence[str | os.PathLike[str]]) -> list[Item]:
    """List the images of some inputs, in an order that depends on nothing else.

    Args:
        inputs: each a folder, searched in depth; an image; a `.txt` file with a path a line,
            relative to it; a `.tar` file; a `.parquet` file, see `IMAGE_COLUMNS`, and `id` if it
            has one; or a pattern of these but lists and folders, such as `photos/*.jpg`.

    Raises:
        ValueError: an input does not exist, or is none of these, or holds no image.
    """
    items: list[Item] = []
    for entry in inputs:
        name = os.fspath(entry)
        listed = list(items_of_input(name))
        if not listed:
            raise ValueError(
                f"{name} holds no image ({', '.join(IMAGE_SUFFIXES)}); name tar and parquet "
                "files one by one, or by a pattern such as 'folder/*.tar'"
            )
        if len(inputs) > 1:  # two folders may hold images of the same name
            listed = [replace(item, id=f"{name}/{item.id}") for item in listed]
        items += listed
    if not items:
        raise ValueError("there are no inputs; name folders, files or patterns")
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
        raise ValueError(
            f"{name} does not exist; name a folder, a file, or a pattern in quotation marks"
        )


def items_of_pattern(pattern: str) -> Iterator[Item]:
    """List the images of all files that match a pattern."""
    names = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (absolute patterns too)
    files = [Path(name) for name in names if Path(name).is_file()]
    if not files:
        raise ValueError(f"{pattern} is a pattern that no file here matches")
    for path in files:
        for item in items_of_file(path):
            name = path.as_posix()
            yield replace(item, id=f"{name}/{item.id}" if item.location else name)


def items_of_file(path: Path) -> Iterator[Item]:
    """List the images of one file: a tar or parquet file, or an image."""
    suffix = path.suffix.lower()
    if suffix == ".tar":
        yield from items_of_tar(path)
    elif suffix == ".parquet":
        yield from items_of_parquet(path)
    elif suffix in ARCHIVE_SUFFIXES:
        raise ValueError(
            f"{path} is a compressed archive: unpack it, or pass an uncompressed .tar file"
        )
    else:
        yield Item(path.name, str(path))


def items_of_folder(path: Path) -> Iterator[Item]:
    """List the images below a folder, those behind links to folders included, no folder twice.

    A folder that cannot be listed is an error.
    """

    def fail(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be listed: {error.strerror}") from error

    visited = {os.path.realpath(path)}
    for parent, folders, names in os.walk(path, onerror=fail, followlinks=True):
        subfolders = sorted(folders)
        folders.clear()  # `os.walk` enters what is put back
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
    """List the images that a text file names, one a line."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # on Windows, some begin with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a list of paths: {error}") from error
    for line in text.split("\n"):
        name = line.strip()
        if name:
            yield Item(name, str(path.parent / name))


def items_of_tar(path: Path) -> Iterator[Item]:
    """List the images of a tar file, which is not compressed: workers read at offsets."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.size < 0:  # the next one would be this one again (CVE-2025-8194)
                    raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
                if member.isreg() and Path(member.name).suffix.lower() in IMAGE_SUFFIXES:
                    yield Item(member.name, str(path), (member.offset_data, member.size))
    except (OSError, tarfile.TarError) as error:
        raise ValueError(
            f"{path} cannot be read as a tar file (compressed ones cannot): {error}"
        ) from error


def items_of_parquet(path: Path) -> Iterator[Item]:
    """List the rows of a parquet file."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        names = set(file.schema_arrow.names)
        if not names & set(IMAGE_COLUMNS):
            raise ValueError(
                f"{path} has no column {' or '.join(IMAGE_COLUMNS)}, but {', '.join(sorted(names))}"
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
        raise ValueError(f"{path} cannot be read as a parquet file: {error}") from error


def read(item: Item) -> bytes:
    """Return the contents of an image.

    Raises:
        ImageError: they cannot be read.
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
    """Return the contents of an image in a tar file."""
    offset, size = item.location
    check_file_size(size)
    with Path(item.path).open("rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) < size:
        raise ImageError("the tar file ends in the middle of the image")
    return content


def read_parquet_row(item: Item) -> bytes:
    """Return the contents of an image in a parquet file, or of the file that a row names."""
    import pyarrow as pa

    group, row = item.location
    try:
        table = read_row_group(item.path, group, Path(item.path).stat().st_mtime_ns)
        cells = [table.column(name)[row].as_py() for name in table.column_names]
    except (pa.ArrowException, IndexError, ValueError) as error:
        # Damaged, or not as it was when it was listed.
        raise ImageError(f"the parquet file cannot be read: {error}") from error
    for cell in cells:
        image = bytes_or_path(cell)
        if isinstance(image, bytes):
            return image
        if image is not None:
            return read_file(Path(item.path).parent / image)
    raise ImageError("the row holds neither bytes nor a path")


@functools.lru_cache(maxsize=1)
def read_row_group(path: str, group: int, modified_ns: int) -> pa.Table:
    """Read the columns of images of a row group, in the order of `IMAGE_COLUMNS`.

    The last one is kept, since neighbors are mostly in the same; the time of the file's last change
    makes it another one.
    """
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    names = [name for name in IMAGE_COLUMNS if name in file.schema_arrow.names]
    return file.read_row_group(group, columns=names).select(names)


def load_image_input(image: object) -> ImageInput:
    """Return what `siglip_port.image_processing.to_rgb` takes.

    Args:
        image: an `Item`, or a struct of `bytes` and `path`; all else is returned as it is.

    Raises:
        ImageError: it cannot be read, or there is nothing.
    """
    if isinstance(image, Item):
        return read(image)
    if image is not None and not isinstance(image, Mapping):
        return cast("ImageInput", image)
    cell = bytes_or_path(image)
    if cell is None:
        raise ImageError("the row holds neither bytes nor a path")
    return cell


def bytes_or_path(cell: object) -> bytes | str | None:
    """Return what a cell of a column of images holds, if it is that of a file, or a file's path."""
    if isinstance(cell, Mapping):
        cell = cell.get("path") if cell.get("bytes") is None else cell["bytes"]
    if isinstance(cell, bytes) or (isinstance(cell, str) and cell):
        return cell
    return None


def ids_digest(items: Sequence[Item]) -> str:
    """Return a hash of all ids, in their order."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{len(item.id)}:{item.id}".encode(errors="surrogatepass"))
    return digest.hexdigest()[:16]

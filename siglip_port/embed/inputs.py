"""Where many pictures come from: folders, patterns, lists, tar and parquet files.

As items that any process reads.
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
from typing import Any

from siglip_port.image_processing import ImageError, Picture, check_size, file_contents

SUFFIXES = (
    *(
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
    ),
    *(".ppm", ".tif", ".tiff", ".webp"),
)
"""What names of pictures end in, in folders and tar files; other files are passed over.

Not all can be read.
"""

ARCHIVES = (".bz2", ".gz", ".tgz", ".xz", ".zip", ".zst")

COLUMNS = ("bytes", "image", "path")
"""Of a parquet file: contents.

A struct of `bytes` and `path`, as the library `datasets` writes it; or paths.
"""


@dataclass(frozen=True)
class Item:
    """One picture.

    Attributes:
        id: what its row is called.
        path: of its file, or of the file that it lies in.
        place: in that file: (offset, size) of a tar file, (row group, row) of a parquet file; empty
            for a file.
    """

    id: str
    path: str
    place: tuple[int, ...] = ()


def find_items(inputs: Sequence[str | os.PathLike[str]]) -> list[Item]:
    """Lists the pictures of some inputs, in an order that depends on nothing else.

    Args:
        inputs: each a folder, searched in depth; a picture; a `.txt` file with a path a line,
            relative to it; a `.tar` file; a `.parquet` file, see `COLUMNS`, and `id` if it has one;
            or a pattern of these but lists and folders, such as `photos/*.jpg`.

    Raises:
        ValueError: an input does not exist, or is none of these, or holds no picture.
    """
    items: list[Item] = []
    for given in [os.fspath(each) for each in inputs]:
        found = list(_items_of(given))
        if not found:
            raise ValueError(
                f"{given} holds no picture ({', '.join(SUFFIXES)}); name tar and parquet files one "
                "by one, or by a "
                "pattern such as 'folder/*.tar'"
            )
        items += (
            found if len(inputs) == 1 else [Item(f"{given}/{i.id}", i.path, i.place) for i in found]
        )
    if not items:
        raise ValueError("there are no inputs; name folders, files or patterns")
    return items


def _items_of(given: str) -> Iterator[Item]:
    path = Path(given)
    if path.is_dir():
        yield from _of_folder(path)
    elif path.is_file():
        yield from _of_list(path) if path.suffix.lower() == ".txt" else _of_file(path)
    elif glob.has_magic(given):
        names = sorted(glob.glob(given, recursive=True))  # noqa: PTH207 (patterns of absolute paths too)
        files = [path for path in map(Path, names) if path.is_file()]
        if not files:
            raise ValueError(f"{given} is a pattern that no file here matches")
        for path in files:
            for item in _of_file(path):
                yield replace(
                    item, id=f"{path.as_posix()}/{item.id}" if item.place else path.as_posix()
                )
    else:
        raise ValueError(
            f"{given} does not exist; name a folder, a file, or a pattern in quotation marks"
        )


def _of_file(path: Path) -> Iterator[Item]:
    suffix = path.suffix.lower()
    if suffix == ".tar":
        yield from _of_tar(path)
    elif suffix == ".parquet":
        yield from _of_parquet(path)
    elif suffix in ARCHIVES:
        raise ValueError(
            f"{path} is a compressed archive: unpack it, or pass an uncompressed .tar file"
        )
    else:
        yield Item(path.name, str(path))


def _of_folder(path: Path) -> Iterator[Item]:
    """In depth, links to folders included, but no folder twice.

    A folder that cannot be listed is an error.
    """

    def fail(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be listed: {error.strerror}") from error

    seen = {os.path.realpath(path)}
    for parent, folders, names in os.walk(path, onerror=fail, followlinks=True):
        listed, folders[:] = sorted(folders), []
        for name in listed:
            if (real := os.path.realpath(Path(parent, name))) not in seen:
                seen.add(real)
                folders.append(name)
        for name in sorted(names):
            file = Path(parent, name)
            if file.suffix.lower() in SUFFIXES:
                yield Item(file.relative_to(path).as_posix(), str(file))


def _of_list(path: Path) -> Iterator[Item]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split(
            "\n"
        )  # of Windows, some begin with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a list of paths: {error}") from error
    for line in lines:
        if line.strip():
            yield Item(line.strip(), str(path.parent / line.strip()))


def _of_tar(path: Path) -> Iterator[Item]:
    try:
        with tarfile.open(path, "r:") as tar:  # not compressed: workers read at offsets
            for member in tar:
                if member.size < 0:  # the next one would be this one again (CVE-2025-8194)
                    raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
                if member.isreg() and Path(member.name).suffix.lower() in SUFFIXES:
                    yield Item(member.name, str(path), (member.offset_data, member.size))
    except (OSError, tarfile.TarError) as error:
        raise ValueError(
            f"{path} cannot be read as a tar file (compressed ones cannot): {error}"
        ) from error


def _of_parquet(path: Path) -> Iterator[Item]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        names = set(file.schema_arrow.names)
        if not names & set(COLUMNS):
            raise ValueError(
                f"{path} has no column {' or '.join(COLUMNS)}, but {', '.join(sorted(names))}"
            )
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["id"] if "id" in names else [])
            ids = table.column("id").to_pylist() if "id" in names else None
            for row in range(file.metadata.row_group(group).num_rows):
                yield Item(
                    f"{path.name}:{group}:{row}" if ids is None else str(ids[row]),
                    str(path),
                    (group, row),
                )
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read as a parquet file: {error}") from error


def read(item: Item) -> bytes:
    """Returns the contents of a picture.

    Raises:
        ImageError: they cannot be read.
    """
    try:
        if not item.place:
            return file_contents(item.path)
        if item.path.lower().endswith(".parquet"):
            return _cell(item)
        offset, size = item.place
        check_size(size)
        with open(item.path, "rb") as file:  # noqa: PTH123 (of many)
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise ImageError("the tar file ends in the middle of the picture")
        return content
    except OSError as error:
        raise ImageError(f"the picture cannot be read: {error.strerror or error}") from error


def _cell(item: Item) -> bytes:
    import pyarrow as pa

    group, row = item.place
    try:
        table = _row_group(item.path, group, Path(item.path).stat().st_mtime_ns)
        values = [table.column(name)[row].as_py() for name in COLUMNS if name in table.column_names]
    except (
        pa.ArrowException,
        IndexError,
        ValueError,
    ) as error:  # damaged, or not as it was when it was listed
        raise ImageError(f"the parquet file cannot be read: {error}") from error
    for found in map(_bytes_or_path, values):
        if isinstance(found, bytes):
            return found
        if found:
            return file_contents(Path(item.path).parent / found)
    raise ImageError("the row holds neither bytes nor a path")


def contents(picture: Any) -> Picture:  # noqa: ANN401 (whatever stands in a column)
    """What `siglip_port.image_processing.to_rgb` takes, of an `Item`, or of a struct of `bytes` and `path`; all else as it is.

    Raises:
        ImageError: it cannot be read, or there is nothing.
    """
    if isinstance(picture, Item):
        return read(picture)
    if picture is None or isinstance(picture, Mapping):
        picture = _bytes_or_path(picture)
        if picture is None:
            raise ImageError("the row holds neither bytes nor a path")
    return picture  # type: ignore[no-any-return]


def _bytes_or_path(value: Any) -> bytes | str | None:  # noqa: ANN401
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    return value if isinstance(value, bytes) or (isinstance(value, str) and value) else None


@functools.lru_cache(maxsize=1)
def _row_group(path: str, group: int, changed: int) -> Any:  # noqa: ANN401 (pyarrow has no types)
    """The columns of a part of a parquet file, as it was at a time.

    Neighbours are mostly in the same.
    """
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    return file.read_row_group(
        group, columns=[name for name in COLUMNS if name in file.schema_arrow.names]
    )


def digest(items: Sequence[Item]) -> str:
    """A hash of all ids, in their order."""
    found = hashlib.sha256()
    for item in items:
        found.update(f"{len(item.id)}:{item.id}".encode(errors="surrogatepass"))
    return found.hexdigest()[:16]

"""Files put together from chunks, several at a time. An interrupted download goes on."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from siglip_port.hub.errors import RangesNotSupportedError
from siglip_port.hub.http_range import RemoteFile
from siglip_port.hub.integrity import Span, hash_spans

if TYPE_CHECKING:
    from huggingface_hub.utils import tqdm

CHUNK_BYTES = 16 * 1024 * 1024
"""What is asked for at once, what an interruption can lose, and what is hashed at once.

To change it makes all vision encoders that are cached invalid."""

MAX_CONCURRENCY = 4
"""Requests at a time."""

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Chunk:
    """Bytes of `filename` from `first` to before `stop`, put at `offset` in what is made."""

    filename: str
    first: int
    stop: int
    offset: int

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.stop - self.first

    @property
    def target(self) -> Span:
        """Where it is put."""
        return self.offset, self.offset + self.size

    def split(self) -> Iterator[Chunk]:
        """Cut what is longer than `CHUNK_BYTES`."""
        for first in range(self.first, self.stop, CHUNK_BYTES):
            stop = min(first + CHUNK_BYTES, self.stop)
            yield Chunk(self.filename, first, stop, self.offset + first - self.first)


class ChunkedDownload:
    """Bytes of files at the Hub, put together in one file here.

    Chunks that an interrupted attempt has fetched are used, if they are still as they arrived.

    Args:
        path: what is made. It is put together beside it, under a name of its own.
        size: of that, in bytes.
        chunks: what it is made of.

    Attributes:
        incomplete: what is put together.
        journal: which chunks have arrived, and their checksums.
    """

    def __init__(self, path: Path, size: int, chunks: Sequence[Chunk]) -> None:
        self.incomplete = path.with_suffix(".incomplete")
        self.journal = path.with_suffix(".journal")
        self._size = size
        self._chunks = chunks

    def run(self, files: Mapping[str, RemoteFile], title: str) -> list[str]:
        """Fetch what is missing.

        Args:
            files: the source's files, by name.
            title: for the progress bar.

        Returns:
            The checksum of each chunk.
        """
        self._allocate()
        checksums = self._load_checksums()
        self._fetch_missing(files, title, checksums)
        return [checksums[number] for number in range(len(self._chunks))]

    def discard(self) -> None:
        """Remove what has been fetched."""
        self.journal.unlink(missing_ok=True)
        self.incomplete.unlink(missing_ok=True)

    def _allocate(self) -> None:
        """Take the room for the whole file: the disk is full before the first byte, or never."""
        if self.incomplete.exists() and self.incomplete.stat().st_size == self._size:
            return
        self.discard()
        check_free_space(self.incomplete.parent, self._size)
        with self.incomplete.open("wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, self._size)
            # not on this system, or not on this file system
            except (AttributeError, OSError) as error:
                if isinstance(error, OSError) and error.errno in _DISK_FULL:
                    self.incomplete.unlink()
                    raise
                file.truncate(self._size)

    def _load_checksums(self) -> dict[int, str]:
        """Return the checksums of chunks that an earlier attempt has fetched.

        Of those that were noted, and are still as they were.
        """
        noted: dict[int, str] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in self.journal.read_text(encoding="ascii", errors="replace").splitlines():
                label, _, checksum = line.partition(" ")
                if label.isdecimal() and int(label) < len(self._chunks):
                    noted[int(label)] = checksum
        actual = hash_spans(self.incomplete, [self._chunks[number].target for number in noted])
        checksums: dict[int, str] = {}
        for number, checksum in zip(noted, actual, strict=True):
            if noted[number] == checksum:
                checksums[number] = checksum
        return checksums

    def _fetch_missing(
        self, files: Mapping[str, RemoteFile], title: str, checksums: dict[int, str]
    ) -> None:
        """Fetch several chunks at a time, and note their checksums.

        The first that fails stops all.
        """
        total = sum(chunk.size for chunk in self._chunks)
        done = sum(self._chunks[number].size for number in checksums)
        missing = [item for item in enumerate(self._chunks) if item[0] not in checksums]
        with (
            open_progress_bar(total, done, title) as bar,
            self.journal.open("a", encoding="ascii") as journal,
            ThreadPoolExecutor(MAX_CONCURRENCY) as pool,
        ):
            transfer = Transfer(files, self.incomplete, journal, bar, checksums)
            running = [pool.submit(transfer.run, number, chunk) for number, chunk in missing]
            try:
                wait(running)
            except BaseException:  # Ctrl-C
                transfer.stop.set()
                raise
        if transfer.errors:
            raise transfer.errors[0]  # those after it are of chunks that were stopped


@dataclass
class Transfer:
    """What the threads of a download share.

    Attributes:
        files: the source's files, by name.
        path: what is put together.
        journal: what has arrived is noted here.
        bar: shows progress.
        checksums: of the chunks that have arrived, by number.
        stop: when set, no chunk is begun, and none goes on.
        errors: the first is what has stopped all.
    """

    files: Mapping[str, RemoteFile]
    path: Path
    journal: TextIO
    bar: tqdm
    checksums: dict[int, str]
    stop: threading.Event = field(default_factory=threading.Event)
    errors: list[Exception] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, number: int, chunk: Chunk) -> None:
        """Fetch a chunk; if that fails, stop all before this thread can begin another."""
        if self.stop.is_set():
            return
        try:
            self.fetch(number, chunk)
        except Exception as error:
            self.errors.append(error)
            self.stop.set()

    def fetch(self, number: int, chunk: Chunk) -> None:
        """Fetch a chunk to its place, and note its checksum."""
        checksum = hashlib.sha256()
        with self.path.open("r+b") as out:
            out.seek(chunk.offset)
            for content in self.files[chunk.filename].read(chunk.first, chunk.stop, self.stop):
                out.write(content)
                checksum.update(content)
                with self.lock:
                    self.bar.update(len(content))
        with self.lock:
            self.checksums[number] = checksum.hexdigest()
            self.journal.write(f"{number} {checksum.hexdigest()}\n")
            self.journal.flush()


def open_progress_bar(total: int, done: int, title: str) -> tqdm:
    """Return the bar of a download; invisible where nobody looks on."""
    from huggingface_hub.utils import tqdm

    return tqdm(  # type: ignore[no-untyped-call]
        total=total, initial=done, desc=title, unit="B", unit_scale=True, disable=None
    )


def download_file(file: RemoteFile, path: Path, title: str) -> Path:
    """Fetch all of a file, by ranges, several at a time.

    What an interrupted attempt has fetched is used.

    Args:
        file: at the Hub.
        path: beside which it is put together.
        title: for the progress bar.

    Returns:
        Where it lies until it is moved.

    Raises:
        OSError: it cannot be written, or there is no room for it.
        RangesNotSupportedError, RetriesExhaustedError: as `RemoteFile.read`.
    """
    whole = Chunk(file.filename, 0, file.size, 0)
    download = ChunkedDownload(path, file.size, list(whole.split()))
    try:
        download.run({file.filename: file}, title)
    except RangesNotSupportedError:
        download.discard()
        raise
    download.journal.unlink(missing_ok=True)
    return download.incomplete


def check_free_space(folder: Path, size: int) -> None:
    """Check that there is room for a file.

    Raises:
        OSError: there is not.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        message = (
            f"No space left on device: {size / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
        )
        raise OSError(errno.ENOSPC, message, str(folder))

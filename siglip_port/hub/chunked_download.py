"""Download files in chunks, several at a time. Interrupted downloads resume."""

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
"""Size of a request; also what an interruption can lose per thread, and the unit of checksums.

Changing it invalidates all cached partial downloads."""

MAX_CONCURRENCY = 4
"""Number of concurrent requests."""

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Chunk:
    """The bytes [first, stop) of `filename`, which are written at `offset` of the local file."""

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
        """Byte range in the local file."""
        return self.offset, self.offset + self.size

    def split(self) -> Iterator[Chunk]:
        """Split into chunks of at most `CHUNK_BYTES`."""
        for first in range(self.first, self.stop, CHUNK_BYTES):
            stop = min(first + CHUNK_BYTES, self.stop)
            yield Chunk(self.filename, first, stop, self.offset + first - self.first)


class ChunkedDownload:
    """A local file that is assembled from chunks of files on the Hub.

    Chunks of an interrupted download are reused if their checksums match.

    Args:
        path: Path of the finished file.
        size: Size of the finished file, in bytes.
        chunks: Chunks of the file.

    Attributes:
        incomplete: Path of the incomplete file.
        journal: Path of the journal: numbers and checksums of the chunks that have arrived.
    """

    def __init__(self, path: Path, size: int, chunks: Sequence[Chunk]) -> None:
        self.incomplete = path.with_suffix(".incomplete")
        self.journal = path.with_suffix(".journal")
        self._size = size
        self._chunks = chunks

    def run(self, files: Mapping[str, RemoteFile], title: str) -> list[str]:
        """Download the missing chunks.

        Args:
            files: Files on the Hub, by name.
            title: Title of the progress bar.

        Returns:
            Checksum of each chunk.
        """
        self._allocate()
        checksums = self._load_checksums()
        self._fetch_missing(files, title, checksums)
        return [checksums[number] for number in range(len(self._chunks))]

    def discard(self) -> None:
        """Remove the incomplete file and its journal."""
        self.journal.unlink(missing_ok=True)
        self.incomplete.unlink(missing_ok=True)

    def _allocate(self) -> None:
        """Allocate the whole file, so that a full disk is detected before the download."""
        if self.incomplete.exists() and self.incomplete.stat().st_size == self._size:
            return
        self.discard()
        check_free_space(self.incomplete.parent, self._size)
        with self.incomplete.open("wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, self._size)
            # not supported by this system or file system
            except (AttributeError, OSError) as error:
                if isinstance(error, OSError) and error.errno in _DISK_FULL:
                    self.incomplete.unlink()
                    raise
                file.truncate(self._size)

    def _load_checksums(self) -> dict[int, str]:
        """Return the checksums of the chunks in the journal that are intact, by number."""
        recorded: dict[int, str] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in self.journal.read_text(encoding="ascii", errors="replace").splitlines():
                label, _, checksum = line.partition(" ")
                if label.isdecimal() and int(label) < len(self._chunks):
                    recorded[int(label)] = checksum
        actual = hash_spans(self.incomplete, [self._chunks[number].target for number in recorded])
        checksums: dict[int, str] = {}
        for number, checksum in zip(recorded, actual, strict=True):
            if recorded[number] == checksum:
                checksums[number] = checksum
        return checksums

    def _fetch_missing(
        self, files: Mapping[str, RemoteFile], title: str, checksums: dict[int, str]
    ) -> None:
        """Download the missing chunks concurrently; the first error stops all."""
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
            raise transfer.errors[0]  # later errors are those of interrupted chunks


@dataclass
class Transfer:
    """The shared state of the threads of a download.

    Attributes:
        files: Files on the Hub, by name.
        path: Path of the incomplete file.
        journal: Open journal.
        bar: Progress bar.
        checksums: Checksums of the chunks that have arrived, by number.
        stop: Event that stops all threads.
        errors: Errors; the first one stopped the download.
        lock: Guards the journal, the checksums and the progress bar.
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
        """Download a chunk; an error stops all threads."""
        if self.stop.is_set():
            return
        try:
            self.fetch(number, chunk)
        except Exception as error:
            self.errors.append(error)
            self.stop.set()

    def fetch(self, number: int, chunk: Chunk) -> None:
        """Download a chunk to its offset, and record its checksum."""
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
    """Return the progress bar of a download, hidden if stderr is not a terminal."""
    from huggingface_hub.utils import tqdm

    return tqdm(  # type: ignore[no-untyped-call]
        total=total, initial=done, desc=title, unit="B", unit_scale=True, disable=None
    )


def download_file(file: RemoteFile, path: Path, title: str) -> Path:
    """Download a whole file in concurrent ranges; an interrupted download resumes.

    Args:
        file: File on the Hub.
        path: Path of the finished file; the staged file is next to it.
        title: Title of the progress bar.

    Returns:
        Path of the staged file.

    Raises:
        OSError: The file cannot be written, or the disk is full.
        RangesNotSupportedError, RetriesExhaustedError: See `RemoteFile.read`.
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
    """Check the free disk space for a file of this size, in bytes.

    Raises:
        OSError: The disk is full.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        message = f"No space left on device: {size / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
        raise OSError(errno.ENOSPC, message, str(folder))

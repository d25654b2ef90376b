"""The tower of a checkpoint on the Hub, without what surrounds it: planned, fetched by ranges, kept as one file.

Everything is kept in the folder `.siglip_port` of the repository's place in the Hub's cache, and goes with it: the
headers of the source's files, by commit; and towers, by the etags and ranges that they are made of, so that a commit
that changes only other files costs nothing. A tower is a safetensors file whose tensors are named as in the source.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import struct
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siglip_port.files import DTYPES, Header, UnreadableFileError, parse_header, read_header
from siglip_port.ranges import RemoteFile

PIECE = 16 * 1024 * 1024
"""Bytes: what is asked for at once, what an interruption can lose, and what is hashed at once.

To change it makes all towers that are kept invalid."""

AT_ONCE = 4
"""Requests at a time."""

_DIGEST = "sha256"  # in the metadata of a tower: see `_digest`
_UNKNOWN = "0" * 64


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISTURBED = (errno.ENOENT, errno.EIO)


@dataclass(frozen=True)
class Part:
    """The tensors that are wanted of one file of the source.

    Attributes:
        filename: in the repository.
        header: of the whole file.
        etag: the Hub's identifier of its contents.
        names: of the tensors wanted.
    """

    filename: str
    header: Header
    etag: str
    names: Collection[str]


@dataclass(frozen=True)
class _Piece:
    """Neighbours in the source and in the tower: bytes of `filename` from `first` to before `stop`, to be put `at`."""

    filename: str
    first: int
    stop: int
    at: int


class Tower:
    """What a tower's file has to be; and, once it has been fetched, that file.

    Args:
        folder: where it is kept.
        source: the Hub id, for the file's metadata.
        parts: what it is made of.

    Attributes:
        path: of the file.
        nbytes: size of all tensors.
    """

    def __init__(self, folder: Path, source: str, parts: Collection[Part]) -> None:
        # The widest first, so that each begins at a multiple of its width; else as in the source, so that neighbours
        # stay neighbours.
        tensors = [(part, name) for part in parts for name in part.names]
        tensors.sort(
            key=lambda t: (-DTYPES[t[0].header.tensors[t[1]].dtype].itemsize, t[0].filename, t[0].header.begins[t[1]])
        )
        self._tensors = tensors
        stored = [part.header.tensors[name] for part, name in tensors]
        self.nbytes = sum(tensor.nbytes for tensor in stored)
        ends = list(itertools.accumulate((tensor.nbytes for tensor in stored), initial=0))
        described = [
            (part.filename, part.etag, name, tensor.dtype, tensor.shape, part.header.begins[name])
            for (part, name), tensor in zip(tensors, stored, strict=True)
        ]
        key = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:20]
        self.path = folder / f"{Path(tensors[0][0].filename).stem}-tower-{key}.safetensors"
        self._metadata = {
            "format": "pt",
            "source": source,
            "files": json.dumps({part.filename: part.etag for part in parts}),
        }
        self._header = {
            name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
            for (_, name), tensor, begin, end in zip(tensors, stored, ends[:-1], ends[1:], strict=True)
        }
        self._begin = len(self._first_bytes(_UNKNOWN))
        self._pieces = list(self._cut())

    def is_whole(self) -> bool:
        """Whether the file is there, with every byte as it was fetched.

        Raises:
            OSError: it cannot be read.
        """
        return self._is_whole(self.path)

    def fetch(self, files: Mapping[str, RemoteFile], title: str) -> None:
        """Fetches what is missing of the file. What an interrupted attempt has fetched is used.

        Args:
            files: the source's files, by name.
            title: for the progress bar.

        Raises:
            OSError: it cannot be written, or there is no room for it.
            siglip_port.ranges.NoRangesError, siglip_port.ranges.GivenUpError: as `RemoteFile.read`.
        """
        from huggingface_hub.utils import WeakFileLock

        self.path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(self.path.with_suffix(".lock")):
            for left in (2, 1, 0):
                if self.is_whole():  # another process has just fetched it
                    return
                try:
                    self._fetch_and_move(files, title)
                    return
                except OSError as error:
                    # Where locks do not hold, as on some network file systems, others may move the file, or begin anew.
                    if error.errno not in _DISTURBED or (not left and not self.is_whole()):
                        raise

    def _fetch_and_move(self, files: Mapping[str, RemoteFile], title: str) -> None:
        incomplete, journal = self.path.with_suffix(".incomplete"), self.path.with_suffix(".journal")
        self._prepare(incomplete, journal)
        checksums = self._kept(incomplete, journal)
        self._fetch_missing(files, title, incomplete, journal, checksums)
        with incomplete.open("r+b") as file:
            file.write(self._first_bytes(_digest(checksums[number] for number in range(len(self._pieces)))))
        if not self._is_whole(incomplete):
            journal.unlink(missing_ok=True)
            raise OSError(errno.EIO, "what was written is not what was fetched: try again", str(incomplete))
        incomplete.replace(self.path)
        journal.unlink(missing_ok=True)

    def _is_whole(self, path: Path) -> bool:
        try:
            kept = read_header(path).metadata.get(_DIGEST, "")
        except (FileNotFoundError, UnreadableFileError):
            return False
        with path.open("rb") as file:
            if file.read(self._begin) != self._first_bytes(kept):
                return False
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            return _digest(pool.map(lambda piece: _checksum(path, piece), self._pieces)) == kept

    def _first_bytes(self, digest: str) -> bytes:
        content = json.dumps({"__metadata__": {**self._metadata, _DIGEST: digest}, **self._header}).encode()
        content += b" " * (-len(content) % 8)
        return struct.pack("<Q", len(content)) + content

    def _cut(self) -> Iterator[_Piece]:
        """Joins neighbours, then cuts what is long."""
        at = self._begin
        spans: list[_Piece] = []
        for part, name in self._tensors:
            first = part.header.begins[name]
            stop = first + part.header.tensors[name].nbytes
            last = spans[-1] if spans else None
            if last is not None and (last.filename, last.stop) == (part.filename, first):
                spans[-1] = _Piece(last.filename, last.first, stop, last.at)
            else:
                spans.append(_Piece(part.filename, first, stop, at))
            at += stop - first
        for span in spans:
            for first in range(span.first, span.stop, PIECE):
                yield _Piece(span.filename, first, min(first + PIECE, span.stop), span.at + first - span.first)

    def _prepare(self, incomplete: Path, journal: Path) -> None:
        """Takes the room for the whole file, so that the disk is full before the first byte is fetched, or never."""
        size = self._begin + self.nbytes
        if incomplete.exists() and incomplete.stat().st_size == size:
            return
        journal.unlink(missing_ok=True)
        incomplete.unlink(missing_ok=True)
        if (free := shutil.disk_usage(incomplete.parent).free) < size:
            room = f"No space left on device: {size / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
            raise OSError(errno.ENOSPC, room, str(incomplete.parent))
        with incomplete.open("wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except (AttributeError, OSError) as error:  # not on this system, or not on this file system
                if isinstance(error, OSError) and error.errno in _FULL:
                    incomplete.unlink()
                    raise
                file.truncate(size)

    def _kept(self, incomplete: Path, journal: Path) -> dict[int, str]:
        """Returns the checksums of the pieces that an earlier attempt has fetched, noted, and still as they were."""
        noted: dict[int, str] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in journal.read_text(encoding="ascii", errors="replace").splitlines():
                number, _, checksum = line.partition(" ")
                if number.isdecimal() and int(number) < len(self._pieces):
                    noted[int(number)] = checksum
        return {n: checksum for n, checksum in noted.items() if _checksum(incomplete, self._pieces[n]) == checksum}

    def _fetch_missing(
        self,
        files: Mapping[str, RemoteFile],
        title: str,
        incomplete: Path,
        journal: Path,
        checksums: dict[int, str],
    ) -> None:
        """Fetches several pieces at a time, and puts down their checksums. The first that fails stops all."""
        from huggingface_hub.utils import tqdm

        stop, lock = threading.Event(), threading.Lock()
        errors: list[Exception] = []
        done = sum(self._pieces[number].stop - self._pieces[number].first for number in checksums)
        look = {"unit": "B", "unit_scale": True, "desc": title, "disable": None}  # None: where nobody looks on
        with (
            tqdm(total=self.nbytes, initial=done, **look) as bar,  # type: ignore[no-untyped-call]
            journal.open("a", encoding="ascii") as notes,
            ThreadPoolExecutor(AT_ONCE) as pool,
        ):

            def fetch(number: int, piece: _Piece) -> None:
                checksum = hashlib.sha256()
                with incomplete.open("r+b") as out:
                    out.seek(piece.at)
                    for chunk in files[piece.filename].read(piece.first, piece.stop, stop):
                        out.write(chunk)
                        checksum.update(chunk)
                        with lock:
                            bar.update(len(chunk))
                with lock:
                    checksums[number] = checksum.hexdigest()
                    notes.write(f"{number} {checksum.hexdigest()}\n")
                    notes.flush()

            def fetch_unless_stopped(number: int, piece: _Piece) -> None:
                """Stops all where it fails, before this thread can begin another piece."""
                if stop.is_set():
                    return
                try:
                    fetch(number, piece)
                except Exception as error:
                    errors.append(error)
                    stop.set()

            missing = [item for item in enumerate(self._pieces) if item[0] not in checksums]
            running = [pool.submit(fetch_unless_stopped, *item) for item in missing]
            try:
                wait(running)
            except BaseException:  # Ctrl-C
                stop.set()
                raise
        if errors:
            raise errors[0]  # those after it are of pieces that were stopped


def _checksum(path: Path, piece: _Piece) -> str:
    with path.open("rb") as file:
        file.seek(piece.at)
        return hashlib.sha256(file.read(piece.stop - piece.first)).hexdigest()


def _digest(checksums: Iterable[str]) -> str:
    """One for all pieces, of the bytes that arrived. Taken by pieces, so that all cores can help at every later use."""
    return hashlib.sha256("".join(checksums).encode()).hexdigest()


def keep_header(path: Path, file: RemoteFile, content: bytes) -> None:
    """Keeps the header of a file of the source. Where that is not possible, it is simply asked for again.

    Args:
        path: where to.
        file: of the source.
        content: the JSON of its header.
    """
    document = {"etag": file.etag, "size": file.size, "sha256": hashlib.sha256(content).hexdigest()}
    unfinished = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(json.dumps(document).encode() + b"\n" + content)
        unfinished.replace(path)


def kept_header(path: Path) -> tuple[Header, str] | None:
    """Returns a header that was kept, and the etag of its file; None where there is none, or it is damaged."""
    try:
        first, _, content = path.read_bytes().partition(b"\n")
        document: Any = json.loads(first)
        if hashlib.sha256(content).hexdigest() != document["sha256"]:
            return None
        return parse_header(content, document["size"]), str(document["etag"])
    except (OSError, ValueError, TypeError, KeyError):
        return None

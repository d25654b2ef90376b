"""The tower of a checkpoint on the Hub, without what surrounds it.

Planned, fetched by ranges, kept as one file.

Everything is kept in the folder `.siglip_port` of the repository's place in the Hub's cache, and
goes with it: the headers of the source's files, by commit; and towers, by the etags and ranges that
they are made of, so that a commit that changes only other files costs nothing. A tower is a
safetensors file whose tensors are named as in the source. Whole files are fetched in the same way,
and then moved to where the Hub's client keeps them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import os
import shutil
import struct
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siglip_port.checkpoint.formats import (
    DTYPES,
    Header,
    UnreadableFileError,
    parse_header,
    read_header,
)
from siglip_port.hub.cache import RepositoryCache, checksums
from siglip_port.hub.http_range import LEAST, GivenUpError, NoRangesError, RemoteFile, within
from siglip_port.hub.network_errors import quoted

log = logging.getLogger(__name__)

PIECE = 16 * 1024 * 1024
"""Bytes: what is asked for at once, what an interruption can lose, and what is hashed at once.

To change it makes all towers that are kept invalid."""

AT_ONCE = 4
"""Requests at a time."""

CLIENT_IDLE = 30.0
"""Seconds: the Hub's own client is not waited for when it has written nothing for so long."""

IDLE = 10.0
"""Seconds: another process that holds a lock and writes nothing for so long is not waited for."""

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
    """Neighbours in the source and in what is made.

    Bytes of `filename` from `first` to before `stop`, put `at`.
    """

    filename: str
    first: int
    stop: int
    at: int

    @property
    def span(self) -> tuple[int, int]:
        """Where it is put, and how many bytes it has."""
        return self.at, self.stop - self.first


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
        # The widest first, so that each begins at a multiple of its width; else as in the source,
        # so that neighbours stay neighbours.
        tensors = [(part, name) for part in parts for name in part.names]
        tensors.sort(
            key=lambda t: (
                -DTYPES[t[0].header.tensors[t[1]].dtype].itemsize,
                t[0].filename,
                t[0].header.offsets[t[1]],
            )
        )
        self._tensors = tensors
        stored = [part.header.tensors[name] for part, name in tensors]
        self.nbytes = sum(tensor.nbytes for tensor in stored)
        ends = list(itertools.accumulate((tensor.nbytes for tensor in stored), initial=0))
        described = [
            (part.filename, part.etag, name, tensor.dtype, tensor.shape, part.header.offsets[name])
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
            for (_, name), tensor, begin, end in zip(
                tensors, stored, ends[:-1], ends[1:], strict=True
            )
        }
        self._begin = len(self._first_bytes(_UNKNOWN))
        self._pieces = list(self._spans())

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
            siglip_port.hub.http_range.NoRangesError, siglip_port.hub.http_range.GivenUpError: as
            `RemoteFile.read`.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        download = _Download(self.path, self._begin + self.nbytes, self._pieces)
        with alone(self.path):
            for left in (2, 1, 0):
                if self.is_whole():  # another process has just fetched it
                    return
                try:
                    self._fetch_and_move(download, files, title)
                    return
                except OSError as error:
                    # Where locks do not hold, as on some network file systems, others may move the
                    # file, or begin anew.
                    if error.errno not in _DISTURBED or (not left and not self.is_whole()):
                        raise

    def _fetch_and_move(
        self, download: _Download, files: Mapping[str, RemoteFile], title: str
    ) -> None:
        digest = _digest(download.run(files, title))
        with download.incomplete.open("r+b") as file:
            file.write(self._first_bytes(digest))
        if not self._is_whole(download.incomplete):
            download.journal.unlink(missing_ok=True)
            raise OSError(
                errno.EIO,
                "what was written is not what was fetched: try again",
                str(download.incomplete),
            )
        download.incomplete.replace(self.path)
        download.journal.unlink(missing_ok=True)

    def _is_whole(self, path: Path) -> bool:
        try:
            kept = read_header(path).metadata.get(_DIGEST, "")
        except (FileNotFoundError, UnreadableFileError):
            return False
        with path.open("rb") as file:
            if file.read(self._begin) != self._first_bytes(kept):
                return False
        return _digest(checksums(path, [piece.span for piece in self._pieces])) == kept

    def _first_bytes(self, digest: str) -> bytes:
        content = json.dumps(
            {"__metadata__": {**self._metadata, _DIGEST: digest}, **self._header}
        ).encode()
        content += b" " * (-len(content) % 8)
        return struct.pack("<Q", len(content)) + content

    def _spans(self) -> Iterator[_Piece]:
        """Joins neighbours, then cuts what is long."""
        at = self._begin
        spans: list[_Piece] = []
        for part, name in self._tensors:
            first = part.header.offsets[name]
            stop = first + part.header.tensors[name].nbytes
            last = spans[-1] if spans else None
            if last is not None and (last.filename, last.stop) == (part.filename, first):
                spans[-1] = _Piece(last.filename, last.first, stop, last.at)
            else:
                spans.append(_Piece(part.filename, first, stop, at))
            at += stop - first
        for span in spans:
            yield from _cut(span)


class _Download:
    """Bytes of files at the Hub, put together in one file here.

    What an interrupted attempt has fetched is used.

    Args:
        path: what is made. It is put together beside it, under a name of its own.
        size: of that, in bytes.
        pieces: what it is made of.

    Attributes:
        incomplete: what is put together.
        journal: which pieces have arrived, and their checksums.
    """

    def __init__(self, path: Path, size: int, pieces: Sequence[_Piece]) -> None:
        self.incomplete, self.journal = (
            path.with_suffix(".incomplete"),
            path.with_suffix(".journal"),
        )
        self._size, self._pieces = size, pieces

    def run(self, files: Mapping[str, RemoteFile], title: str) -> list[str]:
        """Fetches what is missing.

        Args:
            files: the source's files, by name.
            title: for the progress bar.

        Returns:
            The checksum of each piece.
        """
        self._prepare()
        arrived = self._arrived()
        self._fetch_missing(files, title, arrived)
        return [arrived[number] for number in range(len(self._pieces))]

    def forget(self) -> None:
        """Removes what has been fetched."""
        self.journal.unlink(missing_ok=True)
        self.incomplete.unlink(missing_ok=True)

    def _prepare(self) -> None:
        """Takes the room for the whole file, so that the disk is full before the first byte is fetched, or never."""
        if self.incomplete.exists() and self.incomplete.stat().st_size == self._size:
            return
        self.forget()
        check_room(self.incomplete.parent, self._size)
        with self.incomplete.open("wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, self._size)
            except (
                AttributeError,
                OSError,
            ) as error:  # not on this system, or not on this file system
                if isinstance(error, OSError) and error.errno in _FULL:
                    self.incomplete.unlink()
                    raise
                file.truncate(self._size)

    def _arrived(self) -> dict[int, str]:
        """Returns the checksums of the pieces that an earlier attempt has fetched, noted, and still as they were."""
        noted: dict[int, str] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in self.journal.read_text(encoding="ascii", errors="replace").splitlines():
                number, _, checksum = line.partition(" ")
                if number.isdecimal() and int(number) < len(self._pieces):
                    noted[int(number)] = checksum
        found = checksums(self.incomplete, [self._pieces[number].span for number in noted])
        return {
            n: noted[n] for n, checksum in zip(noted, found, strict=True) if noted[n] == checksum
        }

    def _fetch_missing(
        self, files: Mapping[str, RemoteFile], title: str, arrived: dict[int, str]
    ) -> None:
        """Fetches several pieces at a time, and puts down their checksums.

        The first that fails stops all.
        """
        from huggingface_hub.utils import tqdm

        stop, lock = threading.Event(), threading.Lock()
        errors: list[Exception] = []
        total = sum(piece.stop - piece.first for piece in self._pieces)
        done = sum(self._pieces[number].stop - self._pieces[number].first for number in arrived)
        look = {
            "unit": "B",
            "unit_scale": True,
            "desc": title,
            "disable": None,
        }  # None: where nobody looks on
        with (
            tqdm(total=total, initial=done, **look) as bar,  # type: ignore[no-untyped-call]
            self.journal.open("a", encoding="ascii") as notes,
            ThreadPoolExecutor(AT_ONCE) as pool,
        ):

            def fetch(number: int, piece: _Piece) -> None:
                checksum = hashlib.sha256()
                with self.incomplete.open("r+b") as out:
                    out.seek(piece.at)
                    for chunk in files[piece.filename].read(piece.first, piece.stop, stop):
                        out.write(chunk)
                        checksum.update(chunk)
                        with lock:
                            bar.update(len(chunk))
                with lock:
                    arrived[number] = checksum.hexdigest()
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

            missing = [item for item in enumerate(self._pieces) if item[0] not in arrived]
            running = [pool.submit(fetch_unless_stopped, *item) for item in missing]
            try:
                wait(running)
            except BaseException:  # Ctrl-C
                stop.set()
                raise
        if errors:
            raise errors[0]  # those after it are of pieces that were stopped


def fetch_whole(file: RemoteFile, path: Path, title: str) -> Path:
    """Fetches all of a file, by ranges, several at a time.

    What an interrupted attempt has fetched is used.

    Args:
        file: at the Hub.
        path: beside which it is put together.
        title: for the progress bar.

    Returns:
        Where it lies until it is moved.

    Raises:
        OSError: it cannot be written, or there is no room for it.
        siglip_port.hub.http_range.NoRangesError, siglip_port.hub.http_range.GivenUpError: as
        `RemoteFile.read`.
    """
    download = _Download(path, file.size, list(_cut(_Piece(file.filename, 0, file.size, 0))))
    try:
        download.run({file.filename: file}, title)
    except NoRangesError:
        download.forget()
        raise
    download.journal.unlink(missing_ok=True)
    return download.incomplete


def fetch_by_client(name: str, file: RemoteFile, path: Path, token: str | bool | None) -> Path:
    """Has the Hub's client fetch a file, from the Xet store, where the Hub's other hosts do not give it.

    Args:
        name: the Hub id.
        file: at the Hub.
        path: beside which it is put.
        token: a Hub token, True for the stored one, False for none.

    Raises:
        OSError: it cannot be written.
        siglip_port.hub.http_range.GivenUpError: the client cannot fetch it either, or for
            `CLIENT_IDLE` seconds nothing came.
    """
    from huggingface_hub import hf_hub_download

    folder = path.with_suffix(".xet")

    def download() -> str:
        return hf_hub_download(
            name, file.filename, revision=file.commit, local_dir=folder, token=token
        )

    def written() -> int:
        return sum(part.stat().st_size for part in folder.rglob("*") if part.is_file()) // LEAST

    try:
        fetched = path.with_suffix(".stream")
        Path(within(CLIENT_IDLE, download, written)).replace(fetched)
        return fetched
    except (
        Exception
    ) as error:  # of Xet, of HTTP, of whatever the client uses; it has no base in common
        if isinstance(error, OSError) and error.errno is not None:
            raise
        store = "the Xet store (cas-server.xethub.hf.co, for the real Hub)"
        raise GivenUpError(f"{store} does not give it either ({quoted(error)})") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _cut(span: _Piece) -> Iterator[_Piece]:
    for first in range(span.first, span.stop, PIECE):
        yield _Piece(
            span.filename, first, min(first + PIECE, span.stop), span.at + first - span.first
        )


def check_room(folder: Path, size: int) -> None:
    """Finds out whether there is room for a file.

    Raises:
        OSError: there is not.
    """
    if (free := shutil.disk_usage(folder).free) < size:
        room = (
            f"No space left on device: {size / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
        )
        raise OSError(errno.ENOSPC, room, str(folder))


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Waits until no other process or thread makes a file; but not for one that does nothing.

    Without the lock it is made as well: processes that make the same file write the same bytes to
    the same places.

    Args:
        path: of the file, which is put together beside it.
    """
    from filelock import Timeout
    from huggingface_hub.utils import WeakFileLock

    lock, incomplete = path.with_suffix(".lock"), path.with_suffix(".incomplete")
    with contextlib.ExitStack() as held:
        before, since, first = _written(incomplete), time.monotonic(), True
        while True:
            try:
                held.enter_context(WeakFileLock(lock, timeout=1))
                break
            except Timeout:
                if first:
                    log.warning(
                        "another process fetches %s: waiting for it, as long as it does", path.name
                    )
                first = False
                if (now := _written(incomplete)) != before:
                    before, since = now, time.monotonic()
                elif time.monotonic() - since > IDLE:
                    log.warning("another process holds %s and does nothing: going on without", lock)
                    break
        yield


def _written(path: Path) -> int:
    """When a file was written to last."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def tidy(cache: RepositoryCache, commit: str, tower: Path) -> None:
    """Removes what is kept here of commits that the cache has no more, as after `hf cache rm`.

    Args:
        cache: of the repository.
        commit: that is being loaded.
        tower: its own, which stays.
    """
    kept = cache.commits() | {commit}
    folders = list(cache.own_commits())
    for folder in folders:
        if folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)
    etags = {
        header[1]
        for folder in folders
        if folder.name in kept
        for path in folder.rglob("*.header")
        if (header := kept_header(path)) is not None
    }
    for path in set(cache.own.glob("*-tower-*.safetensors")) - {tower}:
        with contextlib.suppress(OSError, ValueError, KeyError, UnreadableFileError):
            if not etags.issuperset(json.loads(read_header(path).metadata["files"]).values()):
                for suffix in (".safetensors", ".lock"):
                    path.with_suffix(suffix).unlink(missing_ok=True)


def _digest(checksums: Iterable[str]) -> str:
    """One for all pieces, of the bytes that arrived.

    Taken by pieces, so that all cores can help at every later use.
    """
    return hashlib.sha256("".join(checksums).encode()).hexdigest()


def keep_header(path: Path, file: RemoteFile, content: bytes) -> None:
    """Keeps the header of a file of the source.

    Where that is not possible, it is simply asked for again.

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
    """Returns a header that was kept, and the etag of its file.

    None where there is none, or it is damaged.
    """
    try:
        first, _, content = path.read_bytes().partition(b"\n")
        document: Any = json.loads(first)
        if hashlib.sha256(content).hexdigest() != document["sha256"]:
            return None
        return parse_header(content, document["size"]), str(document["etag"])
    except (OSError, ValueError, TypeError, KeyError):
        return None

"""The vision encoder of a checkpoint on the Hub, without what surrounds it.

Planned, fetched by ranges, kept as one safetensors file whose tensors are named as in the source.

It is kept in the folder `.siglip_port` of the repository's place in the Hub's cache, and goes with
it; under a name made of the etags and ranges that it is made of, so that a commit that changes only
other files costs nothing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from siglip_port.checkpoint.formats import DTYPES, TensorInfo, UnreadableFileError, read_header
from siglip_port.hub.cache import CachedHeader
from siglip_port.hub.chunked_download import Chunk, ChunkedDownload
from siglip_port.hub.http_range import RemoteFile
from siglip_port.hub.integrity import hash_spans
from siglip_port.hub.lock import exclusive_lock

MAX_ATTEMPTS = 3
"""To put a file together, where locks do not hold."""

_DIGEST_KEY = "sha256"  # in the metadata of the file: see `combine_checksums`
_NO_DIGEST = "0" * 64
_MOVED_BY_OTHERS = (errno.ENOENT, errno.EIO)


@dataclass(frozen=True)
class Selection:
    """The tensors that are wanted of one file of the source.

    Attributes:
        filename: in the repository.
        source: the header of the whole file, and its etag.
        names: of the tensors.
    """

    filename: str
    source: CachedHeader
    names: Collection[str]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the source, and where in its file it is."""

    name: str
    filename: str
    etag: str
    first: int
    stored: TensorInfo

    @property
    def sort_key(self) -> tuple[int, str, int]:
        """The widest first, so that each begins at a multiple of its width; else as in the source.

        So neighbors stay neighbors.
        """
        return -DTYPES[self.stored.dtype].itemsize, self.filename, self.first

    @property
    def identity(self) -> tuple[object, ...]:
        """What a file's name is made of."""
        stored = self.stored
        return self.filename, self.etag, self.name, stored.dtype, stored.shape, self.first


class VisionDownload:
    """What a vision encoder's file has to be; and, once it has been fetched, that file.

    Args:
        folder: where it is kept.
        repository: the Hub id, for the file's metadata.
        selections: what it is made of.

    Attributes:
        path: of the file.
        nbytes: size of all tensors.
    """

    def __init__(self, folder: Path, repository: str, selections: Collection[Selection]) -> None:
        tensors = sorted(list_tensors(selections), key=lambda tensor: tensor.sort_key)
        identities = [tensor.identity for tensor in tensors]
        key = hashlib.sha256(json.dumps(identities).encode()).hexdigest()[:20]
        self.path = folder / f"{Path(tensors[0].filename).stem}-tower-{key}.safetensors"
        self.nbytes = sum(tensor.stored.nbytes for tensor in tensors)
        etags = {selection.filename: selection.source.etag for selection in selections}
        self._metadata = {"format": "pt", "source": repository, "files": json.dumps(etags)}
        self._header = tensor_header(tensors)
        self._data_offset = len(self._header_bytes(_NO_DIGEST))
        self._chunks = list(plan_chunks(tensors, self._data_offset))

    def is_complete(self) -> bool:
        """Whether the file is there, with every byte as it was fetched.

        Raises:
            OSError: it cannot be read.
        """
        return self._is_valid(self.path)

    def fetch(self, files: Mapping[str, RemoteFile], title: str) -> None:
        """Fetch what is missing of the file. What an interrupted attempt has fetched is used.

        Args:
            files: the source's files, by name.
            title: for the progress bar.

        Raises:
            OSError: it cannot be written, or there is no room for it.
            RangesNotSupportedError, RetriesExhaustedError: as `RemoteFile.read`.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(self.path):
            for attempt in range(1, MAX_ATTEMPTS + 1):
                if self.is_complete():  # another process has just fetched it
                    return
                try:
                    self._fetch_and_move(files, title)
                    return
                except OSError as error:
                    # Where locks do not hold, as on some network file systems, others may move the
                    # file, or begin anew.
                    if error.errno not in _MOVED_BY_OTHERS:
                        raise
                    if attempt == MAX_ATTEMPTS and not self.is_complete():
                        raise

    def _fetch_and_move(self, files: Mapping[str, RemoteFile], title: str) -> None:
        download = ChunkedDownload(self.path, self._data_offset + self.nbytes, self._chunks)
        digest = combine_checksums(download.run(files, title))
        with download.incomplete.open("r+b") as file:
            file.write(self._header_bytes(digest))
        if not self._is_valid(download.incomplete):
            download.journal.unlink(missing_ok=True)
            raise OSError(
                errno.EIO,
                "what was written is not what was fetched: try again",
                str(download.incomplete),
            )
        download.incomplete.replace(self.path)
        download.journal.unlink(missing_ok=True)

    def _is_valid(self, path: Path) -> bool:
        try:
            digest = read_header(path).metadata.get(_DIGEST_KEY, "")
        except (FileNotFoundError, UnreadableFileError):
            return False
        with path.open("rb") as file:
            if file.read(self._data_offset) != self._header_bytes(digest):
                return False
        checksums = hash_spans(path, [chunk.target for chunk in self._chunks])
        return combine_checksums(checksums) == digest

    def _header_bytes(self, digest: str) -> bytes:
        """Return what the file begins with: the length of the header, and the header."""
        metadata = {**self._metadata, _DIGEST_KEY: digest}
        content = json.dumps({"__metadata__": metadata, **self._header}).encode()
        content += b" " * (-len(content) % 8)
        return struct.pack("<Q", len(content)) + content


def list_tensors(selections: Iterable[Selection]) -> Iterator[StoredTensor]:
    """Yield the tensors that are wanted."""
    for selection in selections:
        header = selection.source.header
        for name in selection.names:
            yield StoredTensor(
                name=name,
                filename=selection.filename,
                etag=selection.source.etag,
                first=header.offsets[name],
                stored=header.tensors[name],
            )


def tensor_header(tensors: Iterable[StoredTensor]) -> dict[str, object]:
    """Return what the header of a safetensors file says of tensors that lie one after another."""
    header: dict[str, object] = {}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.stored.nbytes
        header[tensor.name] = {
            "dtype": tensor.stored.dtype,
            "shape": list(tensor.stored.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    return header


def plan_chunks(tensors: Iterable[StoredTensor], offset: int) -> Iterator[Chunk]:
    """Join tensors that are neighbors in the source, then cut what is long.

    Args:
        tensors: in the order in which they are put.
        offset: where the first is put.
    """
    runs: list[Chunk] = []
    for tensor in tensors:
        run = Chunk(tensor.filename, tensor.first, tensor.first + tensor.stored.nbytes, offset)
        offset += run.size
        if runs and (runs[-1].filename, runs[-1].stop) == (run.filename, run.first):
            run = Chunk(run.filename, runs[-1].first, run.stop, runs[-1].offset)
            runs.pop()
        runs.append(run)
    for run in runs:
        yield from run.split()


def combine_checksums(checksums: Iterable[str]) -> str:
    """Return one checksum for all chunks, of the bytes that arrived.

    Taken by chunks, so that all cores can help at every later use.
    """
    return hashlib.sha256("".join(checksums).encode()).hexdigest()

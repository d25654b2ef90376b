"""Download only the vision encoder of a checkpoint on the Hub.

Its tensors are downloaded by byte ranges into one safetensors file, under their original names.

The file is cached in the folder `.siglip_port` of the repository. Its name contains a hash of the
ETags and ranges of its tensors, so a commit that changes only other files causes no new download.
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
"""Maximum number of attempts to store a file on file systems without working locks."""

_DIGEST_KEY = "sha256"  # in the metadata of the file: see `combine_checksums`
_NO_DIGEST = "0" * 64
_MOVED_BY_OTHERS = (errno.ENOENT, errno.EIO)


@dataclass(frozen=True)
class Selection:
    """The tensors to download from one file.

    Attributes:
        filename: Name in the repository.
        source: Header and ETag of the whole file.
        names: Names of the tensors.
    """

    filename: str
    source: CachedHeader
    names: Collection[str]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file on the Hub, with its offset in that file."""

    name: str
    filename: str
    etag: str
    first: int
    stored: TensorInfo

    @property
    def sort_key(self) -> tuple[int, str, int]:
        """Widest dtype first, so that all tensors are aligned; else in the order of the source."""
        return -DTYPES[self.stored.dtype].itemsize, self.filename, self.first

    @property
    def identity(self) -> tuple[object, ...]:
        """The part of the tensor in the hash of the file name."""
        stored = self.stored
        return self.filename, self.etag, self.name, stored.dtype, stored.shape, self.first


class VisionDownload:
    """The partial download of a vision encoder.

    Args:
        folder: Folder of the file.
        repository: Hub id, for the metadata of the file.
        selections: Tensors to download.

    Attributes:
        path: Path of the finished file.
        nbytes: Size of all tensors, in bytes.
    """

    def __init__(self, folder: Path, repository: str, selections: Collection[Selection]) -> None:
        tensors = sorted(list_tensors(selections), key=lambda tensor: tensor.sort_key)
        identities = [tensor.identity for tensor in tensors]
        key = hashlib.sha256(json.dumps(identities).encode()).hexdigest()[:20]
        self.path = folder / f"{Path(tensors[0].filename).stem}-vision-{key}.safetensors"
        self.nbytes = sum(tensor.stored.nbytes for tensor in tensors)
        etags = {selection.filename: selection.source.etag for selection in selections}
        self._metadata = {"format": "pt", "source": repository, "files": json.dumps(etags)}
        self._header = tensor_header(tensors)
        self._data_offset = len(self._header_bytes(_NO_DIGEST))
        self._chunks = list(plan_chunks(tensors, self._data_offset))

    def is_complete(self) -> bool:
        """Return whether the file exists and matches its checksum.

        Raises:
            OSError: The file cannot be read.
        """
        return self._is_valid(self.path)

    def fetch(self, files: Mapping[str, RemoteFile], title: str) -> None:
        """Download the file; an interrupted download resumes.

        Args:
            files: Files on the Hub, by name.
            title: Title of the progress bar.

        Raises:
            OSError: The file cannot be written, or the disk is full.
            RangesNotSupportedError, RetriesExhaustedError: See `RemoteFile.read`.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(self.path):
            for attempt in range(1, MAX_ATTEMPTS + 1):
                if self.is_complete():  # another process has just downloaded it
                    return
                try:
                    self._fetch_and_move(files, title)
                    return
                except OSError as error:
                    # On file systems without working locks, another process may move the file,
                    # or start over.
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
                "the file does not match the downloaded bytes; try again",
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
        """Return the first bytes of the file: the length of the header, and the header."""
        metadata = {**self._metadata, _DIGEST_KEY: digest}
        content = json.dumps({"__metadata__": metadata, **self._header}).encode()
        content += b" " * (-len(content) % 8)
        return struct.pack("<Q", len(content)) + content


def list_tensors(selections: Iterable[Selection]) -> Iterator[StoredTensor]:
    """Yield the selected tensors."""
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
    """Return the safetensors header of contiguous tensors."""
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
    """Merge tensors that are adjacent in the source, then split long runs into chunks.

    Args:
        tensors: Tensors in the order of the local file.
        offset: Offset of the first tensor in the local file.
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
    """Return the checksum of all chunks: a hash of hashes, which is computed in parallel."""
    return hashlib.sha256("".join(checksums).encode()).hexdigest()

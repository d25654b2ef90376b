"""The weights files of one checkpoint: which of them holds which tensor, and what headers say."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import torch

from siglip_port.checkpoint.errors import CheckpointError, HubUnreachableError
from siglip_port.checkpoint.formats import (
    SUFFIXES,
    Header,
    TensorInfo,
    UnreadableFileError,
    open_tensors,
    read_header,
)
from siglip_port.checkpoint.json_files import read_index
from siglip_port.checkpoint.source import INDEX, WEIGHTS, WEIGHTS_FILES, Source, pickle_advice

MAX_DECOMPRESSION_RATIO = 100
"""How many times larger than its file a model may be. Weights hardly compress.

What does is made to fill the memory.
"""


class WeightFiles:
    """The weights files of a checkpoint. Headers are read when they are asked for, and once.

    Args:
        source: where they come from.

    Attributes:
        source: likewise.
        file_of: the name of every stored tensor -> the name of its file.
        index_bytes: of all shards, by their index; 0 where none says.

    Raises:
        CheckpointError: there are none, or they cannot be read.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.index_bytes = 0
        self._headers: dict[str, Header] = {}
        self.file_of = self._list_tensors()

    def header(self, filename: str) -> Header:
        """Return the header of a file.

        Raises:
            CheckpointError: the file is not there, or damaged.
        """
        if filename not in self._headers:
            header = self.source.header(filename)
            if header is None:
                raise CheckpointError(f"{self.source.title} has no file {filename}")
            self._headers[filename] = header
        return self._headers[filename]

    def headers(self) -> dict[str, Header | None]:
        """Return the headers of all files; None for one that is not there or damaged."""
        headers: dict[str, Header | None] = {}
        for filename in dict.fromkeys(self.file_of.values()):
            headers[filename] = None
            with contextlib.suppress(CheckpointError):
                headers[filename] = self.header(filename)
        return headers

    def tensor(self, name: str) -> TensorInfo | None:
        """Return what the header says of one tensor.

        None where there is none, or it cannot be read, which is found out again later.
        """
        if name not in self.file_of:
            return None
        try:
            return self.header(self.file_of[name]).tensors.get(name)
        except CheckpointError:
            return None

    def shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors behind a prefix whose header can be read."""
        shapes = {}
        for name in self.file_of:
            if name.startswith(prefix):
                info = self.tensor(name)
                if info is not None:
                    shapes[name] = info.shape
        return shapes

    def metadata(self, key: str) -> set[str]:
        """Return what the headers that were read so far say under a key of their metadata."""
        metadata = [header.metadata for header in self._headers.values()]
        return {values[key] for values in metadata if key in values}

    def group_by_file(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Group tensors by the file that holds them."""
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(self.file_of[name], []).append(name)
        return groups

    def read(
        self, groups: Mapping[str, Collection[str]], paths: Mapping[str, Path]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Read stored tensors one after the other, mapped from their files where that can be.

        Args:
            groups: their names by weights file.
            paths: by weights file, a file that holds them.

        Raises:
            CheckpointError: a tensor is damaged, or a file unpacks to more than weights do.
        """
        for filename, names in groups.items():
            path = paths[filename]
            check_decompression(path, self.header(filename), names)
            with open_tensors(path) as get_tensor:
                for name in names:
                    try:
                        yield name, get_tensor(name)
                    except UnreadableFileError as error:
                        raise CheckpointError(
                            f"{path}: {name} is damaged ({error}); fetch the file again"
                        ) from error

    def _list_tensors(self) -> dict[str, str]:
        """Find the file of every tensor, in the first of the usual weights files that exists."""
        if self.source.weights is not None:
            filename = self.source.weights
            return dict.fromkeys(self.header(filename).tensors, filename)
        not_cached: HubUnreachableError | None = None
        for filename in WEIGHTS_FILES:
            try:
                file_of = self._list_tensors_of(filename)
            except HubUnreachableError as error:
                # Offline, a cache tells what it has, not what the repository has.
                not_cached = not_cached or error
                continue
            if file_of is not None:
                return file_of
        if not_cached is not None:
            raise not_cached
        listing = self.source.listing()
        weights = [name for name in listing if name.endswith(SUFFIXES)]
        raise CheckpointError(
            f"{self.source.title} holds neither {WEIGHTS} nor {INDEX}; found: "
            f"{', '.join(listing) or 'nothing'}"
            + pickle_advice(listing)
            + "".join(f"; pass the file {name} itself" for name in weights)
        )

    def _list_tensors_of(self, filename: str) -> dict[str, str] | None:
        """Find the file of every tensor by one weights file or index; None where there is none."""
        if filename == INDEX:
            path = self.source.get(filename)
            if path is None:
                return None
            index = read_index(path)
            self.index_bytes = index.total_bytes
            return index.file_of
        header = self.source.header(filename)
        if header is None:
            return None
        self._headers[filename] = header
        return dict.fromkeys(header.tensors, filename)


def check_decompression(path: Path, header: Header, names: Iterable[str]) -> None:
    """Raise CheckpointError if tensors are far larger than the file that holds them."""
    size = sum(header.tensors[name].nbytes for name in names)
    if size > MAX_DECOMPRESSION_RATIO * header.size:
        raise CheckpointError(
            f"{path} has {header.size} bytes, and its encoder would have {size}: more "
            f"than {MAX_DECOMPRESSION_RATIO} "
            "times as many, which no weights have. Nothing was loaded; where you trust it, "
            "unpack it yourself"
        )


def read_weights_header(path: Path) -> Header:
    """Read which tensors a weights file holds.

    Raises:
        CheckpointError: it cannot be read, or is damaged.
    """
    try:
        return read_header(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except UnreadableFileError as error:
        kind = path.suffix.removeprefix(".")
        raise CheckpointError(
            f"{path} is not a whole {kind} file ({error}); {error.advice}"
        ) from error

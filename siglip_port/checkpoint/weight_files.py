"""The weights files of a checkpoint: their tensors and headers."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
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
from siglip_port.checkpoint.source import (
    INDEX,
    WEIGHTS,
    WEIGHTS_FILES,
    Source,
    pickle_advice,
    subfolder_advice,
)
from siglip_port.checkpoint.stored_names import canonical_names, removed_wrappers

NOT_GATHERED = (
    (
        ".distcp",
        "; the weights are sharded by torch.distributed.checkpoint: merge them with `accelerate "
        "merge-weights` and load the result",
    ),
    (
        "zero_to_fp32.py",
        "; the weights were saved under DeepSpeed ZeRO without gathering them: run "
        "zero_to_fp32.py, save the model as safetensors and load that",
    ),
)
"""End of the name of a file that is not in a complete checkpoint, and what to do."""

MAX_DECOMPRESSION_RATIO = 100
"""Maximum ratio of a model's size to its file's size.

Weights hardly compress, so a larger ratio means a decompression bomb.
"""


class WeightFiles:
    """The weights files of a checkpoint. Each header is read once, on first use.

    Names of tensors are canonical (see `siglip_port.checkpoint.stored_names`), also in headers;
    only if two tensors would have the same name, all names are those in the files.

    Args:
        source: Source of the files.

    Attributes:
        source: Source of the files.
        file_of: Name of every tensor -> name of its file. An index is the authority: tensors that
            it does not list are not loaded.
        has_index: Whether an index lists the tensors.
        index_bytes: Total size of all shards according to the index; 0 if unknown.
        wrappers: Wrappers that were removed from the names.
        duplicates: Canonical names that several tensors would have, and the names in the files.

    Raises:
        CheckpointError: There are no weights files, or they cannot be read.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.has_index = False
        self.index_bytes = 0
        self.wrappers: tuple[str, ...] = ()
        self.duplicates: dict[str, list[str]] = {}
        self._headers: dict[str, Header] = {}
        self._stored_names: dict[str, str] = {}  # of renamed tensors, by canonical name
        self.file_of = self._with_canonical_names(self._list_tensors())

    def stored_name(self, name: str) -> str:
        """Return the name of a tensor in its file."""
        return self._stored_names.get(name, name)

    def header(self, filename: str) -> Header:
        """Return the header of a file.

        Raises:
            CheckpointError: The file is missing or damaged.
        """
        if filename not in self._headers:
            header = self.source.header(filename)
            if header is None:
                raise CheckpointError(f"{self.source.title} has no file {filename}")
            self._headers[filename] = self._rename(header)
        return self._headers[filename]

    def known_tensors(self) -> dict[str, TensorInfo]:
        """Return the tensors of the headers read so far."""
        tensors: dict[str, TensorInfo] = {}
        for filename, header in self._headers.items():
            for name, info in header.tensors.items():
                if self.file_of.get(name) == filename:
                    tensors[name] = info
        return tensors

    def unlisted(self, filename: str) -> list[str]:
        """Return the tensors of a file, whose header was read, that the index does not list there.

        Shards may contain tensors of another save, or outdated copies; they are not loaded.
        """
        if filename not in self._headers:
            return []
        tensors = self._headers[filename].tensors
        return [name for name in tensors if self.file_of.get(name) != filename]

    def headers(self) -> dict[str, Header | None]:
        """Return the headers of all files; None for a missing or damaged file."""
        headers: dict[str, Header | None] = {}
        for filename in dict.fromkeys(self.file_of.values()):
            headers[filename] = None
            with contextlib.suppress(CheckpointError):
                headers[filename] = self.header(filename)
        return headers

    def tensor(self, name: str) -> TensorInfo | None:
        """Return the header entry of a tensor; None if it is missing or cannot be read."""
        if name not in self.file_of:
            return None
        try:
            return self.header(self.file_of[name]).tensors.get(name)
        except CheckpointError:
            return None

    def shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all readable tensors under a prefix."""
        shapes = {}
        for name in self.file_of:
            if name.startswith(prefix):
                info = self.tensor(name)
                if info is not None:
                    shapes[name] = info.shape
        return shapes

    def metadata(self, key: str) -> set[str]:
        """Return the values of a metadata key in the headers read so far."""
        metadata = [header.metadata for header in self._headers.values()]
        return {values[key] for values in metadata if key in values}

    def group_by_file(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Group tensor names by file."""
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(self.file_of[name], []).append(name)
        return groups

    def fetch(self, groups: Mapping[str, Collection[str]]) -> dict[str, Path]:
        """Download tensors if necessary.

        Args:
            groups: Tensor names by weights file.

        Returns:
            By weights file, the path of a local file that contains its tensors.
        """
        stored = {}
        for filename, names in groups.items():
            stored[filename] = [self.stored_name(name) for name in names]
        return self.source.fetch(stored)

    def read(
        self, groups: Mapping[str, Collection[str]], paths: Mapping[str, Path]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield stored tensors one by one, memory-mapped where possible.

        Args:
            groups: Tensor names by weights file.
            paths: Local path of each weights file.

        Raises:
            CheckpointError: A tensor is damaged, or a file exceeds `MAX_DECOMPRESSION_RATIO`.
        """
        for filename, names in groups.items():
            path = paths[filename]
            check_decompression(path, self.header(filename), names)
            with open_tensors(path) as get_tensor:
                for name in names:
                    try:
                        yield name, get_tensor(self.stored_name(name))
                    except UnreadableFileError as error:
                        raise CheckpointError(
                            f"{path}: tensor {name} is damaged ({error}); download the file again"
                        ) from error

    def _with_canonical_names(self, file_of: Mapping[str, str]) -> dict[str, str]:
        """Rename the tensors to their canonical names, unless two would have the same name."""
        groups: dict[str, list[str]] = {}
        for stored, name in canonical_names(file_of).items():
            groups.setdefault(name, []).append(stored)
        self.duplicates = {name: stored for name, stored in groups.items() if len(stored) > 1}
        if self.duplicates:
            return dict(file_of)
        for name, (stored,) in groups.items():
            if name != stored:
                self._stored_names[name] = stored
        self.wrappers = removed_wrappers(self._stored_names.values())
        for filename, header in self._headers.items():
            self._headers[filename] = self._rename(header)
        return {name: file_of[stored] for name, (stored,) in groups.items()}

    def _rename(self, header: Header) -> Header:
        """Return the header with canonical names of tensors."""
        if not self._stored_names:
            return header
        canonical = {stored: name for name, stored in self._stored_names.items()}
        # A tensor that the index does not list never replaces one that it lists.
        hidden = {stored for stored in header.tensors if stored in self._stored_names}
        tensors = {}
        for stored, info in header.tensors.items():
            if stored not in hidden:
                tensors[canonical.get(stored, stored)] = info
        return replace(header, tensors=tensors)

    def _list_tensors(self) -> dict[str, str]:
        """Map every tensor to its file, using the first of `WEIGHTS_FILES` that exists."""
        if self.source.weights is not None:
            filename = self.source.weights
            return dict.fromkeys(self.header(filename).tensors, filename)
        not_cached: HubUnreachableError | None = None
        for filename in WEIGHTS_FILES:
            try:
                file_of = self._list_tensors_of(filename)
            except HubUnreachableError as error:
                # Offline, another weights file of the repository may be cached.
                not_cached = not_cached or error
                continue
            if file_of is not None:
                return file_of
        if not_cached is not None:
            raise not_cached
        listing = self.source.listing()
        weights = [name for name in listing if name.endswith(SUFFIXES) and "/" not in name]
        advice = ""
        for ending, text in NOT_GATHERED:
            if any(name.endswith(ending) for name in listing):
                advice = text
        raise CheckpointError(
            f"{self.source.title} contains neither {WEIGHTS} nor {INDEX}; found: "
            f"{', '.join(listing) or 'nothing'}"
            + (advice or pickle_advice(listing))
            + "".join(f"; pass the file {name} itself" for name in weights)
            + subfolder_advice(self.source)
        )

    def _list_tensors_of(self, filename: str) -> dict[str, str] | None:
        """Map every tensor to its file by one weights file or index; None if it does not exist."""
        if filename == INDEX:
            path = self.source.get(filename)
            if path is None:
                return None
            index = read_index(path)
            self.has_index = True
            self.index_bytes = index.total_bytes
            return index.file_of
        header = self.source.header(filename)
        if header is None:
            return None
        self._headers[filename] = header
        return dict.fromkeys(header.tensors, filename)


def check_decompression(path: Path, header: Header, names: Iterable[str]) -> None:
    """Raise CheckpointError if tensors are far larger than their file."""
    size = sum(header.tensors[name].nbytes for name in names)
    if size > MAX_DECOMPRESSION_RATIO * header.size:
        raise CheckpointError(
            f"{path} is {header.size} bytes and decompresses to {size}, more than "
            f"{MAX_DECOMPRESSION_RATIO} times its size; nothing was loaded; if you trust the file, "
            "decompress it first"
        )


def read_weights_header(path: Path) -> Header:
    """Read the header of a weights file.

    Raises:
        CheckpointError: The file cannot be read, or is damaged.
    """
    try:
        return read_header(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except UnreadableFileError as error:
        kind = path.suffix.removeprefix(".")
        raise CheckpointError(
            f"{path} is not a valid {kind} file ({error}); {error.advice}"
        ) from error

"""Whole files in the cache, verified against the Hub's hashes at every use."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from siglip_port.checkpoint.errors import CheckpointError
from siglip_port.checkpoint.formats import Header, read_header
from siglip_port.hub.client import RepositoryClient
from siglip_port.hub.http_range import RemoteFile
from siglip_port.hub.integrity import Receipt, Span, is_unchanged, verify_file
from siglip_port.hub.messages import damaged_file

log = logging.getLogger(__name__)


class CachedFiles:
    """The cached whole files of a repository.

    Args:
        client: Client of the repository.

    Attributes:
        damaged: Names of the cached files that do not match the Hub's hash.
    """

    def __init__(self, client: RepositoryClient) -> None:
        self._client = client
        self._cache = client.cache
        self.damaged: set[str] = set()

    def find(self, filename: str) -> Path | None:
        """Return the path of a file; None if it is not cached or is damaged."""
        commit = self._client.known_commit
        if commit is None or filename in self.damaged:
            return None
        return self._cache.find(commit, filename)

    def check_config(self, path: Path, filename: str) -> None:
        """Verify a configuration file.

        Raises:
            CheckpointError: The file was modified.
        """
        if not self.is_intact(path, filename, [(0, path.stat().st_size)]):
            raise CheckpointError(
                f"{path}: modified after it was downloaded from the Hub; delete it to download it "
                "again, or, to use the modified file, copy the checkpoint to a folder and pass that"
            )

    def is_damaged(self, path: Path, filename: str, names: Collection[str] | None = None) -> bool:
        """Return whether a weights file is damaged, and record it in `damaged`.

        Args:
            path: Path of the cached file.
            filename: Name in the repository.
            names: Tensors to verify, if the file has a receipt; None for the whole file.

        Raises:
            CheckpointError: The file is damaged, and downloads are disabled.
        """
        spans = None if names is None else tensor_spans(read_header(path), names)
        if self.is_intact(path, filename, spans):
            return False
        if self._client.options.is_offline:
            raise damaged_file(path, self._client.options)
        log.warning("%s: damaged or modified after it was downloaded; downloading it again", path)
        self.damaged.add(filename)
        return True

    def is_intact(self, path: Path, filename: str, spans: Collection[Span] | None) -> bool:
        """Return whether a file matches its receipt or the Hub's hash; True if there is neither.

        Args:
            path: Path of the cached file.
            filename: Name in the repository.
            spans: Byte ranges to verify, if the file has a receipt; None for the whole file.
        """
        commit = self._client.commit or ""
        etag = self._cache.etag_of(commit, filename)
        if etag is None:
            # downloaded by another program to a cache without symlinks: the hash is not known
            return True
        receipt = self._cache.receipt(commit, filename)
        if spans is not None and receipt is not None and receipt.etag == etag:
            return is_unchanged(path, receipt, spans)
        receipt = verify_file(path, etag)
        if receipt is None:
            return False
        self._cache.save_receipt(commit, filename, receipt)
        return True

    def find_by_etag(self, file: RemoteFile) -> Path | None:
        """Return the path of a blob of any commit; None if it is absent or damaged."""
        blob = self._cache.blob(file.etag)
        if not blob.is_file():
            return None
        receipt = verify_file(blob, file.etag)
        if receipt is None:
            return None
        try:
            path = self._cache.link(file.commit, file.filename, file.etag)
        except OSError:  # The cache is read-only, but has the blob.
            path = blob
        self._record(file, receipt)
        return path

    def is_occupied(self, file: RemoteFile) -> bool:
        """Return whether a download of the file would replace an existing one."""
        return self._cache.blob(file.etag).is_file() or file.filename in self.damaged

    def set_aside(self, file: RemoteFile) -> None:
        """Rename the existing files that a download is about to replace."""
        for path in self._cache.set_aside(file.commit, file.filename, file.etag):
            log.warning(
                "%s: the damaged %s was moved to %s", self._client.title, file.filename, path
            )

    def add(self, file: RemoteFile, staged: Path, receipt: Receipt) -> Path:
        """Move a file into the cache.

        Raises:
            OSError: The cache cannot be written.
        """
        path = self._cache.add(file.commit, file.filename, receipt.etag, staged)
        self._record(file, receipt)
        return path

    def _record(self, file: RemoteFile, receipt: Receipt) -> None:
        self.damaged.discard(file.filename)
        self._cache.save_receipt(file.commit, file.filename, receipt)


def tensor_spans(header: Header, names: Collection[str]) -> list[Span]:
    """Return the byte ranges of the header and of some tensors; for `.npz`, the whole file."""
    if not header.offsets:
        return [(0, header.size)]
    spans = [(0, min(header.offsets.values()))]
    for name in names:
        first = header.offsets[name]
        spans.append((first, first + header.tensors[name].nbytes))
    return spans

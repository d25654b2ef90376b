"""Whole files in the cache, compared at every use with what the Hub says of them."""

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
    """The whole files of a repository that are in the cache.

    Args:
        client: of the repository.

    Attributes:
        damaged: names of the files that are there, but not as the Hub has them.
    """

    def __init__(self, client: RepositoryClient) -> None:
        self._client = client
        self._cache = client.cache
        self.damaged: set[str] = set()

    def find(self, filename: str) -> Path | None:
        """Return where a file lies; None where it is not here, or damaged."""
        commit = self._client.known_commit
        if commit is None or filename in self.damaged:
            return None
        return self._cache.find(commit, filename)

    def check_config(self, path: Path, filename: str) -> None:
        """Check a small file.

        Raises:
            CheckpointError: it was changed.
        """
        if not self.is_intact(path, filename, [(0, path.stat().st_size)]):
            raise CheckpointError(
                f"{path} has changed since it was fetched from the Hub: delete it, and it is "
                "fetched again; or, to "
                "keep the change, copy the checkpoint to a folder and pass that"
            )

    def is_damaged(self, path: Path, filename: str, names: Collection[str] | None = None) -> bool:
        """Whether a weights file is something else than the Hub has, which is noted.

        Args:
            path: where it lies.
            filename: in the repository.
            names: the tensors that count, where it is known that the file was right once; None for
                all of it.

        Raises:
            CheckpointError: it is, and the Hub may not be asked.
        """
        spans = None if names is None else tensor_spans(read_header(path), names)
        if self.is_intact(path, filename, spans):
            return False
        if self._client.options.is_offline:
            raise damaged_file(path)
        log.warning(
            "%s is damaged, or was changed, since it was fetched from the Hub: fetching it again",
            path,
        )
        self.damaged.add(filename)
        return True

    def is_intact(self, path: Path, filename: str, spans: Collection[Span] | None) -> bool:
        """Whether a file is what it was, or as the Hub says, as far as that is known.

        Args:
            path: where it lies.
            filename: in the repository.
            spans: the parts of it that count, where it is known that it was right once; None for
                all of it.
        """
        commit = self._client.commit or ""
        etag = self._cache.etag_of(commit, filename)
        if etag is None:
            # fetched by another program, to where there are no links: nobody says what it should be
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
        """Find the bytes of a file, of another commit perhaps; None where they are not right."""
        blob = self._cache.blob(file.etag)
        if not blob.is_file():
            return None
        receipt = verify_file(blob, file.etag)
        if receipt is None:
            return None
        try:
            path = self._cache.link(file.commit, file.filename, file.etag)
        except OSError:  # The cache cannot be written; it has the bytes nevertheless.
            path = blob
        self._note(file, receipt)
        return path

    def is_occupied(self, file: RemoteFile) -> bool:
        """Whether something stands where the file is to be put."""
        return self._cache.blob(file.etag).is_file() or file.filename in self.damaged

    def set_aside(self, file: RemoteFile) -> None:
        """Move out of the way what stands where the file is to be put."""
        for path in self._cache.set_aside(file.commit, file.filename, file.etag):
            log.warning(
                "what stood in the place of %s of %s is kept as %s",
                file.filename,
                self._client.title,
                path,
            )

    def add(self, file: RemoteFile, staged: Path, receipt: Receipt) -> Path:
        """Move a file into the cache.

        Raises:
            OSError: the cache cannot be written.
        """
        path = self._cache.add(file.commit, file.filename, receipt.etag, staged)
        self._note(file, receipt)
        return path

    def _note(self, file: RemoteFile, receipt: Receipt) -> None:
        self.damaged.discard(file.filename)
        self._cache.save_receipt(file.commit, file.filename, receipt)


def tensor_spans(header: Header, names: Collection[str]) -> list[Span]:
    """Return where the header and some tensors are in a file; all of an `.npz` file."""
    if not header.offsets:
        return [(0, header.size)]
    spans = [(0, min(header.offsets.values()))]
    for name in names:
        first = header.offsets[name]
        spans.append((first, first + header.tensors[name].nbytes))
    return spans

"""A checkpoint in a model repository of the Hub."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from siglip_port.checkpoint.errors import CheckpointError
from siglip_port.checkpoint.formats import Header, UnreadableFileError, read_header
from siglip_port.checkpoint.weight_files import read_weights_header
from siglip_port.hub.cache import CachedHeader, RepositoryCache
from siglip_port.hub.cached_files import CachedFiles
from siglip_port.hub.client import RepositoryClient
from siglip_port.hub.errors import NotCachedError, RangesNotSupportedError, RetriesExhaustedError
from siglip_port.hub.file_download import FileDownloader
from siglip_port.hub.http_range import RemoteFile
from siglip_port.hub.messages import damaged_file, explain_failure
from siglip_port.hub.options import HubOptions
from siglip_port.hub.partial_download import Selection, VisionDownload
from siglip_port.hub.redact import redact

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_VISION_SHARE = 0.8
"""Of a file. A vision encoder that is more of it is not worth a copy that nobody else can use."""


class HubRepository:
    """A checkpoint in a model repository of the Hub.

    With the cache, the variables and the login of `huggingface_hub`.

    All files are of one commit: see `RepositoryClient`. Every file that is fetched is compared with
    what the Hub says of it, and again at every use.

    Args:
        name: the Hub id.
        options: how it is read.
        weights: the name of the weights file; None for the usual ones.
    """

    def __init__(
        self, name: str, options: HubOptions | None = None, *, weights: str | None = None
    ) -> None:
        self.name = name
        self.options = options or HubOptions()
        self.weights = weights
        self._client = RepositoryClient(name, self.options)
        self._cached = CachedFiles(self._client)
        self._downloader = FileDownloader(self._client, self._cached)
        self._headers: dict[str, CachedHeader] = {}  # of files that are not here as a whole

    @property
    def title(self) -> str:
        """What messages call it."""
        revision = self.options.revision
        return f"{self.name} at revision {revision!r}" if revision else self.name

    @property
    def commit(self) -> str | None:
        """The commit that is read; None before it is known."""
        return self._client.commit

    @property
    def cache(self) -> RepositoryCache:
        """The repository's place in the Hub's cache."""
        return self._client.cache

    # --- what a source does: see `siglip_port.checkpoint.reader.Source` ---------------------------

    def get(self, filename: str) -> Path | None:
        """Fetch the file into the cache, or find it there.

        None where the repository has no such file.

        Raises:
            HubUnreachableError: the file is not cached, and the Hub cannot be reached or may not be
                asked.
            CheckpointError: the Hub refuses, or the file cannot be stored.
        """
        return self._with_explained_errors(filename, lambda: self._get(filename))

    def header(self, filename: str) -> Header | None:
        """Read which tensors a weights file holds; None where there is no such file.

        Raises:
            CheckpointError: as `get` does; or the file is damaged.
        """
        return self._with_explained_errors(filename, lambda: self._read_header(filename))

    def fetch(self, tensors: Mapping[str, Collection[str]]) -> dict[str, Path]:
        """Fetch tensors, or find them in the cache.

        The vision encoder alone, where it is the lesser part of files that are not in the cache and
        can be read in parts.

        Args:
            tensors: their names, by weights file.

        Returns:
            By weights file, a file on this machine that holds these tensors, and perhaps others.

        Raises:
            CheckpointError: as `get` does.
        """
        filenames = " and ".join(tensors)
        return self._with_explained_errors(filenames, lambda: self._fetch(tensors))

    def local(self, filename: str) -> Path | None:
        """Return the path of the file, where the cache has it whole; without asking the Hub."""
        return self._cached.find(filename)

    def listing(self) -> list[str]:
        """Return the names of the files in the repository; none where the Hub does not say."""
        return self._client.listing()

    def _with_explained_errors(self, filename: str, call: Callable[[], T]) -> T:
        """Call a function; what it raises becomes one sentence, with no signed address in its wake.

        Raises:
            CheckpointError: whatever went wrong.
        """
        try:
            return call()
        except CheckpointError:
            raise
        except Exception as error:
            request = self._client.describe_file(filename)
            failure = explain_failure(error, request, self._client.older_commit)
        raise failure  # out of the handler, so that it does not carry what it came of

    # --- whole files ------------------------------------------------------------------------------

    def _get(self, filename: str) -> Path | None:
        from huggingface_hub.errors import RemoteEntryNotFoundError

        self._client.resolve_commit(filename)
        if self._client.is_absent(filename):
            return None
        path = self.local(filename)
        if path is not None:
            if path.suffix == ".json":
                self._cached.check_config(path, filename)
            return path
        if self.options.is_offline:
            raise NotCachedError
        try:
            file = self._client.request(filename)
        except RemoteEntryNotFoundError:
            return None
        if filename.endswith(".json"):
            return self._downloader.fetch_config(file)
        return self._downloader.fetch_weights(file)

    # --- headers ----------------------------------------------------------------------------------

    def _read_header(self, filename: str) -> Header | None:
        self._client.resolve_commit(filename)
        if self._client.is_absent(filename):
            return None
        path = self.local(filename)
        if path is not None:
            try:
                return read_header(path)
            except UnreadableFileError:
                if not self._cached.is_damaged(path, filename):
                    # This is what the Hub has; the error says what is wrong with it.
                    return read_weights_header(path)
        if self.options.vision_only and filename.endswith(".safetensors"):
            cached = self._find_header(filename)
            if cached is not None:
                return cached.header
            if not self.options.is_offline:
                try:
                    return self._request_header(filename)
                except (RangesNotSupportedError, RetriesExhaustedError) as error:
                    self._continue_with_whole_files([filename], error)
        path = self._get(filename)
        return None if path is None else read_weights_header(path)

    def _find_header(self, filename: str) -> CachedHeader | None:
        """Return the header of a file, if it was read before."""
        commit = self._client.known_commit
        if filename not in self._headers and commit is not None:
            cached = self.cache.header(commit, filename)
            if cached is not None:
                self._headers[filename] = cached
        return self._headers.get(filename)

    def _request_header(self, filename: str) -> Header | None:
        """Read the first bytes of a safetensors file, by requests for a range of it."""
        from huggingface_hub.errors import RemoteEntryNotFoundError

        try:
            file = self._client.request(filename)
        except RemoteEntryNotFoundError:
            return None
        header, content = file.header()
        cached = CachedHeader(header, file.etag)
        self._headers[filename] = cached
        self.cache.save_header(file.commit, filename, cached, content)
        return header

    # --- tensors ----------------------------------------------------------------------------------

    def _fetch(self, tensors: Mapping[str, Collection[str]]) -> dict[str, Path]:
        paths = self._find_intact(tensors)
        missing = [filename for filename in tensors if filename not in paths]
        if missing and self._can_fetch_parts(tensors):
            try:
                vision_file = self._fetch_vision(tensors)
                if vision_file is not None:
                    self._client.save_commit()
                    return dict.fromkeys(tensors, vision_file)
            except (RangesNotSupportedError, RetriesExhaustedError) as error:
                self._continue_with_whole_files(sorted(missing), error)
        for filename in missing:
            path = self._get(filename)
            if path is None:
                raise CheckpointError(f"{self.title} has no file {filename}")
            paths[filename] = path
        self._client.save_commit()
        return paths

    def _find_intact(self, tensors: Mapping[str, Collection[str]]) -> dict[str, Path]:
        """Return the whole files that are in the cache, with these tensors as the Hub has them."""
        paths: dict[str, Path] = {}
        for filename, names in tensors.items():
            path = self.local(filename)
            if path is not None and not self._cached.is_damaged(path, filename, names):
                paths[filename] = path
        return paths

    def _can_fetch_parts(self, filenames: Iterable[str]) -> bool:
        if not self.options.vision_only or self._downloader.range_errors:
            return False
        return all(filename.endswith(".safetensors") for filename in filenames)

    def _fetch_vision(self, tensors: Mapping[str, Collection[str]]) -> Path | None:
        """Fetch the vision encoder alone, or find it in the cache.

        None where the whole files are to be had instead.
        """
        missing = [filename for filename in tensors if self._find_header(filename) is None]
        if missing and self.options.is_offline:
            return None
        for filename in missing:
            self._request_header(filename)
        selections = [
            Selection(filename, self._headers[filename], names)
            for filename, names in tensors.items()
        ]
        download = VisionDownload(self.cache.own, self.name, selections)
        total = sum(selection.source.header.size for selection in selections)
        if download.nbytes > MAX_VISION_SHARE * total:
            return None
        if not download.is_complete():
            if self.options.is_offline:
                if download.path.exists():
                    raise damaged_file(download.path)
                return None
            download.fetch(self._request_unchanged(selections), f"{self.name}, tower")
        self.cache.prune(self.commit or "", download.path)
        return download.path

    def _request_unchanged(self, selections: Iterable[Selection]) -> dict[str, RemoteFile]:
        """Ask for the files whose headers are known.

        Raises:
            RetriesExhaustedError: they are not those that the headers are of.
        """
        files: dict[str, RemoteFile] = {}
        changed: list[str] = []
        for selection in selections:
            file = self._client.request(selection.filename)
            files[selection.filename] = file
            if file.etag != selection.source.etag:
                changed.append(selection.filename)
        if changed:
            raise RetriesExhaustedError(f"{' and '.join(changed)} changed while it was read")
        return files

    def _continue_with_whole_files(
        self, filenames: Iterable[str], error: RangesNotSupportedError | RetriesExhaustedError
    ) -> None:
        """Say that more than the vision encoder is fetched, and why.

        Raises the error where that would not help.
        """
        known = self._client.remote_files
        files = [known[filename] for filename in filenames if filename in known]
        has_xet = bool(files) and all(file.can_use_xet for file in files)
        if isinstance(error, RetriesExhaustedError) and not has_xet:
            raise error
        for file in files:
            self._downloader.range_errors[file.filename] = error
            size = f"{file.size / 1e6:,.1f} MB" if file.has_known_size else "bytes"
            log.warning(
                "%s of %s cannot be fetched in parts, so all %s of it are fetched, not the encoder "
                "alone: %s",
                file.filename,
                self._client.title,
                size,
                redact(str(error)),
            )

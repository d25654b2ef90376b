"""Checkpoints in model repositories on the Hub."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from siglip_port.checkpoint.errors import CheckpointError
from siglip_port.checkpoint.formats import Header, UnreadableFileError, read_header
from siglip_port.checkpoint.source import parents_of_weights
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
"""If the vision encoder is more than this share of the file, the whole file is downloaded, which
other programs can use, too."""


class HubRepository:
    """A checkpoint in a model repository on the Hub.

    Uses the cache, the environment variables and the login of `huggingface_hub`. All files are from
    one commit (see `RepositoryClient`). Whole files are verified against the Hub's hash after the
    download and at every use.

    Args:
        name: Hub id.
        options: Options of the load.
        weights: Name of the weights file; None for the default names.
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
        self._headers: dict[str, CachedHeader] = {}  # of files that are not cached whole

    @property
    def address(self) -> str:
        """Hub id, or the address of the weights file."""
        return self.name if self.weights is None else f"hf://{self.name}/{self.weights}"

    @property
    def title(self) -> str:
        """The repository in messages."""
        return self._client.title

    @property
    def commit(self) -> str | None:
        """The commit that is read; None before it is resolved."""
        return self._client.commit

    @property
    def cache(self) -> RepositoryCache:
        """The cache of the repository."""
        return self._client.cache

    # --- Source: see `siglip_port.checkpoint.source` ----------------------------------------------

    def get(self, filename: str) -> Path | None:
        """Return the cached path of a file, after a download if necessary.

        None if the repository has no such file.

        Raises:
            HubUnreachableError: The file is not cached, and the Hub cannot be reached, or downloads
                are disabled.
            CheckpointError: The Hub refused the request, or the file cannot be stored.
        """
        return self._with_explained_errors(filename, lambda: self._get(filename))

    def get_sibling(self, folder: str, filename: str) -> Path | None:
        """Return None: nothing is beside the root of a repository."""
        return None

    def header(self, filename: str) -> Header | None:
        """Return the header of a weights file; None if the repository has no such file.

        Raises:
            CheckpointError: The file is damaged, or one of the errors of `get`.
        """
        return self._with_explained_errors(filename, lambda: self._read_header(filename))

    def fetch(self, tensors: Mapping[str, Collection[str]]) -> dict[str, Path]:
        """Return local files with these tensors, after a download if necessary.

        Only the tensors are downloaded, unless they are most of the file, or the server does not
        support range requests.

        Args:
            tensors: Tensor names by weights file.

        Returns:
            Local path by weights file; the local file may contain other tensors, too.

        Raises:
            CheckpointError: See `get`.
        """
        filenames = " and ".join(tensors)
        return self._with_explained_errors(filenames, lambda: self._fetch(tensors))

    def local(self, filename: str) -> Path | None:
        """Return the path of a file if it is cached whole; never sends a request."""
        return self._cached.find(filename)

    def listing(self) -> list[str]:
        """Return the names of the files in the repository; empty if the request fails."""
        return self._client.listing()

    def subfolders(self) -> list[str]:
        """Return the known folders that contain a checkpoint's weights."""
        return parents_of_weights(self.listing())

    def _with_explained_errors(self, filename: str, call: Callable[[], T]) -> T:
        """Call a function, and turn its errors into `CheckpointError`.

        Raises:
            CheckpointError: The function failed.
        """
        try:
            return call()
        except CheckpointError:
            raise
        except Exception as error:
            request = self._client.describe_file(filename)
            failure = explain_failure(error, request, self._client.older_commit)
        raise failure  # outside the handler: the cause may contain signed URLs

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
                    # The file is invalid on the Hub, too; raise the error with its path.
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
        """Return the cached header of a file; None if there is none."""
        commit = self._client.known_commit
        if filename not in self._headers and commit is not None:
            cached = self.cache.header(commit, filename)
            if cached is not None:
                self._headers[filename] = cached
        return self._headers.get(filename)

    def _request_header(self, filename: str) -> Header | None:
        """Read the header of a safetensors file by range requests, and cache it."""
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
        """Return the cached whole files in which these tensors are intact."""
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
        """Return the cached partial download, after a download if necessary.

        None if the whole files are to be used instead.
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
        download = VisionDownload(self.cache.own_folder, self.name, selections)
        total = sum(selection.source.header.size for selection in selections)
        if download.nbytes > MAX_VISION_SHARE * total:
            return None
        if not download.is_complete():
            if self.options.is_offline:
                if download.path.exists():
                    raise damaged_file(download.path, self.options)
                return None
            download.fetch(self._request_unchanged(selections), f"{self.name}: vision encoder")
        self.cache.prune(self.commit or "", download.path)
        return download.path

    def _request_unchanged(self, selections: Iterable[Selection]) -> dict[str, RemoteFile]:
        """Request the files of cached headers.

        Raises:
            RetriesExhaustedError: A file was replaced since its header was read.
        """
        files: dict[str, RemoteFile] = {}
        changed: list[str] = []
        for selection in selections:
            file = self._client.request(selection.filename)
            files[selection.filename] = file
            if file.etag != selection.source.etag:
                changed.append(selection.filename)
        if changed:
            names = " and ".join(changed)
            raise RetriesExhaustedError(f"{names} was replaced on the Hub during the download")
        return files

    def _continue_with_whole_files(
        self, filenames: Iterable[str], error: RangesNotSupportedError | RetriesExhaustedError
    ) -> None:
        """Warn that whole files are downloaded, and why; raise the error if that cannot help."""
        known = self._client.remote_files
        files = [known[filename] for filename in filenames if filename in known]
        has_xet = bool(files) and all(file.can_use_xet for file in files)
        if isinstance(error, RetriesExhaustedError) and not has_xet:
            raise error
        for file in files:
            self._downloader.range_errors[file.filename] = error
            size = f" ({file.size / 1e6:,.1f} MB)" if file.has_known_size else ""
            log.warning(
                "%s: %s cannot be downloaded in parts (%s); downloading the whole file%s, not only "
                "the vision encoder",
                self._client.title,
                file.filename,
                redact(str(error)),
                size,
            )

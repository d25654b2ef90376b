"""Download whole files into the cache: verified, then moved atomically."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

from siglip_port.checkpoint.errors import CheckpointError
from siglip_port.checkpoint.formats import MAX_JSON_BYTES
from siglip_port.hub.cached_files import CachedFiles
from siglip_port.hub.chunked_download import check_free_space, download_file
from siglip_port.hub.client import RepositoryClient
from siglip_port.hub.errors import RangesNotSupportedError, RetriesExhaustedError
from siglip_port.hub.http_range import RemoteFile
from siglip_port.hub.integrity import Receipt, verify_file
from siglip_port.hub.lock import exclusive_lock
from siglip_port.hub.redact import redact
from siglip_port.hub.xet import download_with_client

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""Maximum number of attempts to store a file on file systems without working locks."""

Download = Callable[[RemoteFile, Path], Path]
"""Downloads a file to a staged path next to the given one; returns the staged path."""


class FileDownloader:
    """Downloader of whole files of a repository.

    Args:
        client: Client of the repository.
        cached: Cached files of the repository.

    Attributes:
        range_errors: Errors of files that cannot be downloaded in parts, by name.
    """

    def __init__(self, client: RepositoryClient, cached: CachedFiles) -> None:
        self._client = client
        self._cached = cached
        self._cache = client.cache
        self._scratch: Path | None = None  # for configurations, if the cache is read-only
        self.range_errors: dict[str, Exception] = {}

    def fetch_config(self, file: RemoteFile) -> Path:
        """Download a configuration, or find its blob in the cache.

        If the cache is not writable, a temporary copy is used.

        Raises:
            CheckpointError: The file is too large for a configuration.
        """
        if file.has_known_size and file.size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{self._client.title}: {file.filename} is too large for a configuration: "
                f"{file.size:,} bytes, the limit is {MAX_JSON_BYTES:,}"
            )
        try:
            path = self._cached.find_by_etag(file)
            if path is not None:
                return path
            self._cache.own_folder.mkdir(parents=True, exist_ok=True)
            target = self._cache.own_folder / Path(file.filename).name
            return self._fetch_into_cache(file, target, self._download_json)
        except OSError as error:
            if error.errno is None:
                raise
            log.warning(
                "%s: %s cannot be cached (%s); using a temporary copy",
                self._client.title,
                file.filename,
                error,
            )
        path = self._scratch_folder() / file.filename
        path.parent.mkdir(parents=True, exist_ok=True)
        _, staged = self._download_verified(file, path, self._download_json)
        return staged.replace(path)

    def fetch_weights(self, file: RemoteFile) -> Path:
        """Download weights, or find their blob in the cache, possibly of another commit."""
        path = self._cached.find_by_etag(file)
        if path is not None:
            return path
        target = self._cache.own_folder / self._cache.blob(file.etag).name
        target.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(target):
            return self._fetch_until_cached(file, target)

    def _fetch_until_cached(self, file: RemoteFile, target: Path) -> Path:
        attempt = 1
        while True:
            path = self._cached.find_by_etag(file)
            if path is not None:  # another process has just downloaded it
                return path
            try:
                return self._fetch_into_cache(file, target, self._download_weights)
            except OSError as error:
                # On file systems without working locks, another process may move the file.
                if error.errno != errno.ENOENT or attempt == MAX_ATTEMPTS:
                    raise
            attempt += 1

    def _fetch_into_cache(self, file: RemoteFile, target: Path, download: Download) -> Path:
        """Download and verify a file, and move it into the cache."""
        is_occupied = self._cached.is_occupied(file)
        receipt, staged = self._download_verified(file, target, download)
        if is_occupied:
            self._cached.set_aside(file)
        return self._cached.add(file, staged, receipt)

    def _download_verified(
        self, file: RemoteFile, target: Path, download: Download
    ) -> tuple[Receipt, Path]:
        """Download a file and compare it with the Hub's hash.

        After a mismatch, both the metadata and the file are requested again.

        Returns:
            Receipt and path of the staged file.

        Raises:
            CheckpointError: The hash does not match the second time, either.
        """
        staged = download(file, target)
        receipt = verify_download(file, staged)
        if receipt is None:
            staged.unlink()
            file = self._client.request_again(file)
            staged = download(file, target)
            receipt = verify_download(file, staged)
        if receipt is not None:
            return receipt, staged
        size = staged.stat().st_size
        staged.unlink()
        raise CheckpointError(
            f"{self._client.title}: {file.filename} was corrupted in transit: the {size:,} bytes "
            f"received do not match the Hub's hash {file.etag}; they were removed, try again"
        )

    def _download_weights(self, file: RemoteFile, path: Path) -> Path:
        """Download a file by ranges, else as a stream, else from the Xet store."""
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return self._download_by_http(file, path)
        except (RetriesExhaustedError, HfHubHTTPError) as error:
            if not file.can_use_xet:
                raise
            log.warning(
                "%s: cannot download %s over HTTP: %s; trying hf_xet",
                self._client.title,
                file.filename,
                redact(str(error)),
            )
            try:
                return download_with_client(
                    self._client.name, file, path, self._client.options.token
                )
            except RetriesExhaustedError as xet_error:
                raise RetriesExhaustedError(f"{error}; {xet_error}") from xet_error

    def _download_by_http(self, file: RemoteFile, path: Path) -> Path:
        range_error = self.range_errors.get(file.filename)
        if isinstance(range_error, RetriesExhaustedError):
            raise range_error
        if range_error is None:
            try:
                return download_file(file, path, f"{self._client.name}: {file.filename}")
            except RangesNotSupportedError as error:
                log.info(
                    "%s: %s cannot be downloaded in parts (%s); downloading it as a stream",
                    self._client.title,
                    file.filename,
                    error,
                )
        return download_stream(file, path)

    def _download_json(self, file: RemoteFile, path: Path) -> Path:
        return download_stream(file, path, MAX_JSON_BYTES)

    def _scratch_folder(self) -> Path:
        """Return a temporary folder that is removed with this object."""
        if self._scratch is None:
            self._scratch = Path(tempfile.mkdtemp(prefix="siglip_port-"))
            weakref.finalize(self, shutil.rmtree, self._scratch, ignore_errors=True)
        return self._scratch


def verify_download(file: RemoteFile, path: Path) -> Receipt | None:
    """Compare a downloaded file with its size and hash on the Hub; None if they differ."""
    if not file.has_size(path.stat().st_size):
        return None
    return verify_file(path, file.etag)


def download_stream(file: RemoteFile, path: Path, max_bytes: int | None = None) -> Path:
    """Download a file in one request.

    Args:
        file: File on the Hub.
        path: Path of the finished file; the staged file is next to it.
        max_bytes: Maximum size; None for no limit.

    Returns:
        Path of the staged file.

    Raises:
        OSError: The file cannot be written, or the disk is full.
        RetriesExhaustedError, ValueError: See `RemoteFile.read_all`.
    """
    if file.has_known_size:
        check_free_space(path.parent, file.size)
    staged = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.stream")
    try:
        with staged.open("w+b") as out:
            file.read_all(out, max_bytes)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    return staged

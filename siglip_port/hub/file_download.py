"""Whole files from the Hub into the cache: verified, then moved to their place in one step."""

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
"""To put a file in its place, where locks do not hold."""

Download = Callable[[RemoteFile, Path], Path]
"""Fetches a file to a place beside a path; returns which."""


class FileDownloader:
    """Fetches whole files of a repository.

    Args:
        client: of the repository.
        cached: its files in the cache.

    Attributes:
        range_errors: files that cannot be fetched in parts, and why.
    """

    def __init__(self, client: RepositoryClient, cached: CachedFiles) -> None:
        self._client = client
        self._cached = cached
        self._cache = client.cache
        self._scratch: Path | None = None  # for small files, where the cache is read-only
        self.range_errors: dict[str, Exception] = {}

    def fetch_config(self, file: RemoteFile) -> Path:
        """Fetch a configuration, or find its bytes in the cache.

        It is kept beside the cache where the cache cannot be written.

        Raises:
            CheckpointError: it is too large to be one.
        """
        if file.has_known_size and file.size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{file.filename} of {self._client.title} has {file.size} bytes, more than the "
                f"{MAX_JSON_BYTES} that such a "
                "file may have; it is not fetched"
            )
        try:
            path = self._cached.find_by_etag(file)
            if path is not None:
                return path
            self._cache.own.mkdir(parents=True, exist_ok=True)
            return self._fetch_into_cache(
                file, self._cache.own / file.filename, self._download_json
            )
        except OSError as error:
            if error.errno is None:
                raise
            log.warning(
                "%s of %s cannot be kept in the cache (%s)",
                file.filename,
                self._client.title,
                error,
            )
        path = self._scratch_folder() / file.filename
        _, staged = self._download_verified(file, path, self._download_json)
        return staged.replace(path)

    def fetch_weights(self, file: RemoteFile) -> Path:
        """Fetch weights, or find their bytes in the cache, of another commit perhaps."""
        path = self._cached.find_by_etag(file)
        if path is not None:
            return path
        place = self._cache.own / self._cache.blob(file.etag).name
        place.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(place):
            return self._fetch_until_cached(file, place)

    def _fetch_until_cached(self, file: RemoteFile, place: Path) -> Path:
        attempt = 1
        while True:
            path = self._cached.find_by_etag(file)
            if path is not None:  # another process has just fetched it
                return path
            try:
                return self._fetch_into_cache(file, place, self._download_weights)
            except OSError as error:
                # Where locks do not hold, as on some network file systems, others may move the
                # file.
                if error.errno != errno.ENOENT or attempt == MAX_ATTEMPTS:
                    raise
            attempt += 1

    def _fetch_into_cache(self, file: RemoteFile, place: Path, download: Download) -> Path:
        """Fetch a file, compare it with what the Hub says of it, and make it one of the cache."""
        is_occupied = self._cached.is_occupied(file)
        receipt, staged = self._download_verified(file, place, download)
        if is_occupied:
            self._cached.set_aside(file)
        return self._cached.add(file, staged, receipt)

    def _download_verified(
        self, file: RemoteFile, place: Path, download: Download
    ) -> tuple[Receipt, Path]:
        """Fetch a file, and compare it with what the Hub says of it.

        Once more where they differ: perhaps it was what the Hub says that was spoiled on its way.

        Returns:
            What it is, and where it lies until it is moved.

        Raises:
            CheckpointError: they differ again.
        """
        staged = download(file, place)
        receipt = verify_download(file, staged)
        if receipt is None:
            staged.unlink()
            file = self._client.request_again(file)
            staged = download(file, place)
            receipt = verify_download(file, staged)
        if receipt is not None:
            return receipt, staged
        size = staged.stat().st_size
        staged.unlink()
        raise CheckpointError(
            f"{file.filename} of {self._client.title} did not arrive as it left: its hash should "
            f"be {file.etag}, which the {size} bytes that came have not; they have been removed: "
            "try again"
        )

    def _download_weights(self, file: RemoteFile, path: Path) -> Path:
        """Fetch a file by ranges, as a stream where these are refused, by Xet where both are."""
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return self._download_by_http(file, path)
        except (RetriesExhaustedError, HfHubHTTPError) as error:
            if not file.can_use_xet:
                raise
            log.warning(
                "%s of %s: %s; trying hf_xet",
                file.filename,
                self._client.title,
                redact(str(error)),
            )
            try:
                return download_with_client(
                    self._client.name, file, path, self._client.options.token
                )
            except RetriesExhaustedError as xet_error:
                raise RetriesExhaustedError(f"{error}; and {xet_error}") from xet_error

    def _download_by_http(self, file: RemoteFile, path: Path) -> Path:
        range_error = self.range_errors.get(file.filename)
        if isinstance(range_error, RetriesExhaustedError):
            raise range_error
        if range_error is None:
            try:
                return download_file(file, path, f"{self._client.name}, {file.filename}")
            except RangesNotSupportedError as error:
                log.info(
                    "%s of %s cannot be fetched in parts (%s)",
                    file.filename,
                    self._client.title,
                    error,
                )
        return download_stream(file, path)

    def _download_json(self, file: RemoteFile, path: Path) -> Path:
        return download_stream(file, path, MAX_JSON_BYTES)

    def _scratch_folder(self) -> Path:
        """Return a folder that goes with this object."""
        if self._scratch is None:
            self._scratch = Path(tempfile.mkdtemp(prefix="siglip_port-"))
            weakref.finalize(self, shutil.rmtree, self._scratch, ignore_errors=True)
        return self._scratch


def verify_download(file: RemoteFile, path: Path) -> Receipt | None:
    """Compare a file that has arrived with what the Hub says of it; None where they differ."""
    if not file.has_size(path.stat().st_size):
        return None
    return verify_file(path, file.etag)


def download_stream(file: RemoteFile, path: Path, max_bytes: int | None = None) -> Path:
    """Fetch a file by one request.

    Args:
        file: at the Hub.
        path: beside which it is put.
        max_bytes: that it may have; None for any number.

    Returns:
        Where it lies until it is moved.

    Raises:
        OSError: it cannot be written, or there is no room for it.
        RetriesExhaustedError, ValueError: as `RemoteFile.read_all`.
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

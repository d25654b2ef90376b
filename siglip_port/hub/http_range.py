"""Read files on the Hub, in byte ranges or whole, with checks, retries and timeouts.

The signed URL of a large file expires; an expired URL is requested again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import BinaryIO

from siglip_port.checkpoint.formats import Header, header_length, parse_header, readable
from siglip_port.hub.errors import (
    AddressExpiredError,
    BadRangeError,
    NoConnectionError,
    RangesNotSupportedError,
    RetriesExhaustedError,
    TransientError,
)
from siglip_port.hub.file_metadata import FileMetadata, request_metadata
from siglip_port.hub.network_errors import classify_errors
from siglip_port.hub.retry import Retry, RetryBudget, call_with_timeout, require_progress
from siglip_port.hub.session import (
    CONTENT_RANGE,
    FileSession,
    Response,
    plain_etag,
    raise_for_status,
)

HEADER_BYTES = 65_536
"""Size of the first request for a header; most headers are shorter."""


class RemoteFile:
    """A file in a repository of the Hub.

    Args:
        name: Hub id.
        filename: Name in the repository.
        revision: Branch, tag or commit; None for `main`.
        token: Hub token; True for the stored token, False for none.
        budget: Retry budget of the load.
        max_attempts: Maximum number of requests for the metadata; None for the default.

    Attributes:
        commit: Commit that `revision` resolved to.
        etag: ETag of the contents.

    Raises:
        RetriesExhaustedError: The Hub cannot be reached, or the server is not the Hub.
        huggingface_hub.errors.HfHubHTTPError: The Hub refused the request.
    """

    def __init__(
        self,
        name: str,
        filename: str,
        revision: str | None,
        token: str | bool | None,
        budget: RetryBudget,
        max_attempts: int | None = None,
    ) -> None:
        from huggingface_hub import hf_hub_url

        self.filename = filename
        self._budget = budget
        self._session = FileSession(hf_hub_url(name, filename, revision=revision), token)
        self._lock = threading.Lock()
        self._etag_by_host: dict[str, str] = {}  # hosts may differ in the ETag of the same bytes
        metadata = self._request_metadata(max_attempts)
        self.commit = metadata.commit
        self.etag = metadata.etag
        # All further requests name the commit, so a push between two requests has no effect.
        pinned = hf_hub_url(name, filename, revision=metadata.commit)
        if metadata.location == self._session.url:
            metadata = replace(metadata, location=pinned)
        self._session = FileSession(pinned, token)
        self._metadata = metadata

    @property
    def size(self) -> int:
        """Size in bytes.

        Raises:
            RangesNotSupportedError: The server does not report the size.
        """
        if self._metadata.size is None:
            raise RangesNotSupportedError("the server does not report the file size")
        return self._metadata.size

    @property
    def has_known_size(self) -> bool:
        """Whether the server reports the size."""
        return self._metadata.size is not None

    @property
    def can_use_xet(self) -> bool:
        """Whether the file is in the Xet store, and `hf_xet` is installed and enabled."""
        from huggingface_hub import constants

        return (
            self._metadata.is_xet
            and not constants.HF_HUB_DISABLE_XET
            and find_spec("hf_xet") is not None
        )

    def has_size(self, size: int) -> bool:
        """Return whether the file has this size; True if the server does not report it."""
        return self._metadata.size in (None, size)

    def header(self) -> tuple[Header, bytes]:
        """Read the header of a safetensors file.

        Returns:
            The header, and its JSON bytes.

        Raises:
            siglip_port.checkpoint.formats.UnreadableFileError: Not a safetensors file.
            RangesNotSupportedError, RetriesExhaustedError: See `read`.
            huggingface_hub.errors.HfHubHTTPError: See `read`.
        """
        content = b"".join(self.read(0, min(HEADER_BYTES, self.size)))
        with readable():
            end = 8 + header_length(content[:8], self.size)
        content += b"".join(self.read(len(content), max(len(content), end)))
        with readable():
            return parse_header(content[8:end], self.size), content[8:end]

    def read(
        self, first: int, stop: int, interrupt: threading.Event | None = None
    ) -> Iterator[bytes]:
        """Yield the bytes of the range [first, stop) as they arrive.

        A retry requests only the bytes that are missing.

        Args:
            first: First byte.
            stop: One past the last byte.
            interrupt: Event that cancels the read.

        Raises:
            RangesNotSupportedError: The server serves only whole files.
            RetriesExhaustedError: All attempts failed.
            huggingface_hub.errors.HfHubHTTPError: The Hub refused the request.
        """
        retry = Retry(self._budget, interrupt=interrupt)
        while first < stop:
            metadata = self._metadata
            retry.start_attempt()
            try:
                for chunk in self._request_range(metadata, first, stop):
                    retry.receive(len(chunk))
                    first += len(chunk)
                    yield chunk
            except (BadRangeError, AddressExpiredError) as error:
                self._prepare_retry_of_range(error, metadata, retry)
            except TransientError as error:
                retry.wait(error)

    def read_all(self, out: BinaryIO, max_bytes: int | None = None) -> None:
        """Download the file in one request; a retry starts over.

        The caller compares the contents with the ETag.

        Args:
            out: File to write to, from offset 0.
            max_bytes: Maximum size; None for no limit.

        Raises:
            RetriesExhaustedError: All attempts failed.
            ValueError: The file is longer than `max_bytes`.
            huggingface_hub.errors.HfHubHTTPError: The Hub refused the request.
        """
        retry = Retry(self._budget)
        while True:
            metadata = self._metadata
            out.seek(0)
            out.truncate()
            try:
                for chunk in self._request_all(metadata):
                    out.write(chunk)
                    if max_bytes is not None and out.tell() > max_bytes:
                        raise ValueError(f"the file is longer than {max_bytes:,} bytes")
                return
            except TransientError as error:
                self._prepare_retry(error, metadata, retry)

    # --- retries ----------------------------------------------------------------------------------

    def _prepare_retry(self, error: TransientError, metadata: FileMetadata, retry: Retry) -> None:
        """Wait before the next attempt, and refresh an expired URL.

        Raises:
            RetriesExhaustedError: No attempts are left.
        """
        is_expired = isinstance(error, AddressExpiredError)
        if is_expired and not self._refresh_location(metadata):
            return  # another thread has just refreshed the URL
        retry.wait(error)

    def _prepare_retry_of_range(
        self, error: BadRangeError | AddressExpiredError, metadata: FileMetadata, retry: Retry
    ) -> None:
        """Prepare a retry of a range; if only ranges fail, the whole file may be available.

        Raises:
            RangesNotSupportedError: All attempts were refused.
            RetriesExhaustedError: See `_prepare_retry`.
        """
        try:
            self._prepare_retry(error, metadata, retry)
        except RetriesExhaustedError as end:
            if str(end) == str(error):
                raise RangesNotSupportedError(str(end)) from end
            raise

    def _refresh_location(self, metadata: FileMetadata) -> bool:
        """Request a new URL, unless another thread has just done so.

        Returns:
            Whether a new URL was requested.

        Raises:
            RetriesExhaustedError: The file was replaced on the Hub.
        """
        with self._lock:
            if self._metadata is not metadata:
                return False
            new = self._request_metadata()
            if (new.etag, new.size) != (metadata.etag, metadata.size):
                raise RetriesExhaustedError("the file was replaced on the Hub during the download")
            self._metadata = new
            return True

    # --- requests ---------------------------------------------------------------------------------

    def _request_metadata(self, max_attempts: int | None = None) -> FileMetadata:
        """Request the metadata of the file, with retries."""
        from huggingface_hub import constants

        seconds = 2 * constants.HF_HUB_ETAG_TIMEOUT + 5
        retry = Retry(self._budget, max_attempts)
        while True:
            try:
                with classify_errors(self._session.url):
                    return call_with_timeout(seconds, lambda: request_metadata(self._session))
            except NoConnectionError as error:
                retry.wait(error, max_attempts=2)
            except TransientError as error:
                retry.wait(error)

    def _request_all(self, metadata: FileMetadata) -> Iterator[bytes]:
        """Yield the bytes of the whole file from one request.

        Raises:
            TransientError: The request failed; a retry may succeed.
        """
        with (
            classify_errors(self._session.url, metadata.location),
            self._session.stream(metadata.location, {}) as response,
        ):
            raise_for_status(response)
            yield from require_progress(response.iter_bytes(), self._budget)

    def _request_range(self, metadata: FileMetadata, first: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes of a range from one request.

        Raises:
            TransientError: The request failed, possibly partway; a retry may succeed.
        """
        headers = {"Range": f"bytes={first}-{stop - 1}"}
        with (
            classify_errors(self._session.url, metadata.location),
            self._session.stream(metadata.location, headers) as response,
        ):
            self._check_range(response, metadata, first, stop)
            for chunk in require_progress(response.iter_raw(), self._budget):
                if len(chunk) > stop - first:
                    raise BadRangeError("the server sent more bytes than requested")
                first += len(chunk)
                yield chunk
        if first < stop:
            raise TransientError("the connection closed before all bytes arrived")

    def _check_range(
        self, response: Response, metadata: FileMetadata, first: int, stop: int
    ) -> None:
        """Check that a response has the requested range of the same file.

        Raises:
            BadRangeError: The response has another range or another file.
            RangesNotSupportedError: The response has the whole file.
            huggingface_hub.errors.HfHubHTTPError: The server refused the request.
        """
        status = response.status_code
        if status == 200:
            raise RangesNotSupportedError("the server does not support range requests")
        if status == 416:
            raise BadRangeError("the server rejected the byte range (HTTP 416)")
        raise_for_status(response)  # `classify_errors` decides which statuses are transient
        content_range = response.headers.get("Content-Range", "")
        if not is_within(content_range, first, stop, metadata.size):
            raise BadRangeError(
                f"the server returned other bytes than the requested range (HTTP {status})"
            )
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise BadRangeError("the server compressed the response")
        self._check_etag(response)

    def _check_etag(self, response: Response) -> None:
        """Check that the ETag of a host stays the same; it may differ from the Hub's."""
        etag = plain_etag(response.headers.get("ETag", ""))
        host = str(response.url.host)
        with self._lock:
            expected = self._etag_by_host.get(host) or etag
            self._etag_by_host[host] = expected
        if etag not in ("", expected):
            raise BadRangeError("the file changed on the server during the download")


def is_within(content_range: str, first: int, stop: int, size: int | None) -> bool:
    """Return whether a response starts at `first` and ends before `stop`, in a file of this size.

    Args:
        content_range: Content-Range header.
        first: First byte requested.
        stop: One past the last byte requested.
        size: File size; None if it is not reported.
    """
    match = CONTENT_RANGE.fullmatch(content_range)
    if match is None or match["size"] not in ("*", str(size)):
        return False
    return int(match["first"]) == first and first <= int(match["last"]) < stop

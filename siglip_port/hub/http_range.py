"""Files on the Hub, in parts or whole: requests that are repeated, exact, and end.

The address of a large file expires; it is asked for again when it has.
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
"""Asked for at first: the headers of most files are shorter, so one request is enough."""


class RemoteFile:
    """A file in a repository of the Hub.

    Args:
        name: the Hub id.
        filename: in the repository.
        revision: branch, tag or commit.
        token: a Hub token, True for the stored one, False for none.
        budget: of the load.
        max_attempts: to find it; None for the usual number.

    Attributes:
        commit: the commit that the Hub has taken `revision` for.
        etag: the Hub's identifier of the contents.

    Raises:
        RetriesExhaustedError: the Hub cannot be reached, or what answers is not the Hub.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
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
        self._etag_by_host: dict[str, str] = {}  # each host may have its own for the same bytes
        metadata = self._request_metadata(max_attempts)
        self.commit = metadata.commit
        self.etag = metadata.etag
        # From now on it is asked for by its commit, so that a push between two requests changes
        # nothing.
        pinned = hf_hub_url(name, filename, revision=metadata.commit)
        if metadata.location == self._session.url:
            metadata = replace(metadata, location=pinned)
        self._session = FileSession(pinned, token)
        self._metadata = metadata

    @property
    def size(self) -> int:
        """The size in bytes.

        Raises:
            RangesNotSupportedError: nobody says.
        """
        if self._metadata.size is None:
            raise RangesNotSupportedError(
                "neither the Hub nor the host that it names says how large the file is"
            )
        return self._metadata.size

    @property
    def has_known_size(self) -> bool:
        """Whether anybody says how large the file is."""
        return self._metadata.size is not None

    @property
    def can_use_xet(self) -> bool:
        """Whether the Hub has it in its Xet store, and the Hub's client may fetch it from there."""
        from huggingface_hub import constants

        return (
            self._metadata.is_xet
            and not constants.HF_HUB_DISABLE_XET
            and find_spec("hf_xet") is not None
        )

    def has_size(self, size: int) -> bool:
        """Whether this is the size of the file, as far as anybody says."""
        return self._metadata.size in (None, size)

    def header(self) -> tuple[Header, bytes]:
        """Read the header of a safetensors file.

        Returns:
            The header, and the bytes of its JSON.

        Raises:
            siglip_port.checkpoint.formats.UnreadableFileError: it is no safetensors file.
            RangesNotSupportedError, RetriesExhaustedError: as `read`.
            huggingface_hub.errors.HfHubHTTPError: as `read`.
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
        """Yield the bytes from `first` to before `stop`, as they arrive.

        What has arrived is not asked for again.

        Args:
            first: of the bytes.
            stop: one after the last.
            interrupt: when set, nothing more is waited for.

        Raises:
            RangesNotSupportedError: the server has only the whole file to give.
            RetriesExhaustedError: the bytes cannot be had.
            huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
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
        """Fetch the file without asking for a part of it.

        After an attempt that fails, all of it is asked for again.

        Whether it is the file that the Hub describes is for the caller to find out.

        Args:
            out: what is written to, from its beginning.
            max_bytes: that it may have; None for any number.

        Raises:
            RetriesExhaustedError: it cannot be had.
            ValueError: it is longer than `max_bytes`.
            huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
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
                        raise ValueError(f"it has more than {max_bytes} bytes")
                return
            except TransientError as error:
                self._prepare_retry(error, metadata, retry)

    # --- retries ----------------------------------------------------------------------------------

    def _prepare_retry(self, error: TransientError, metadata: FileMetadata, retry: Retry) -> None:
        """Wait before the next attempt, which may need a new address.

        Raises:
            RetriesExhaustedError: there is to be none.
        """
        is_expired = isinstance(error, AddressExpiredError)
        if is_expired and not self._refresh_location(metadata):
            return  # another thread has just done so
        retry.wait(error)

    def _prepare_retry_of_range(
        self, error: BadRangeError | AddressExpiredError, metadata: FileMetadata, retry: Retry
    ) -> None:
        """As `_prepare_retry`; where ranges are always refused, there may still be the whole file.

        Raises:
            RangesNotSupportedError: the usual number of ranges has been refused.
            RetriesExhaustedError: as `_prepare_retry`.
        """
        try:
            self._prepare_retry(error, metadata, retry)
        except RetriesExhaustedError as end:
            if str(end) == str(error):
                raise RangesNotSupportedError(str(end)) from end
            raise

    def _refresh_location(self, metadata: FileMetadata) -> bool:
        """Ask for the address again, unless another thread has just done so.

        Returns:
            Whether it was asked for.

        Raises:
            RetriesExhaustedError: the file has been replaced.
        """
        with self._lock:
            if self._metadata is not metadata:
                return False
            new = self._request_metadata()
            if (new.etag, new.size) != (metadata.etag, metadata.size):
                raise RetriesExhaustedError("the file has been replaced while it was read")
            self._metadata = new
            return True

    # --- requests ---------------------------------------------------------------------------------

    def _request_metadata(self, max_attempts: int | None = None) -> FileMetadata:
        """Ask the Hub for the file's address, etag and size."""
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
        """Yield the bytes of the whole file, by one request.

        Raises:
            TransientError: whatever ends it early.
        """
        with (
            classify_errors(self._session.url, metadata.location),
            self._session.stream(metadata.location, {}) as response,
        ):
            raise_for_status(response)
            yield from require_progress(response.iter_bytes(), self._budget)

    def _request_range(self, metadata: FileMetadata, first: int, stop: int) -> Iterator[bytes]:
        """Yield bytes from `first` on, perhaps not all, by one request.

        Raises:
            TransientError: whatever ends it early.
        """
        headers = {"Range": f"bytes={first}-{stop - 1}"}
        with (
            classify_errors(self._session.url, metadata.location),
            self._session.stream(metadata.location, headers) as response,
        ):
            self._check_range(response, metadata, first, stop)
            for chunk in require_progress(response.iter_raw(), self._budget):
                if len(chunk) > stop - first:
                    raise BadRangeError("the server sends more bytes than were asked for")
                first += len(chunk)
                yield chunk
        if first < stop:
            raise TransientError("the connection was closed before all bytes had arrived")

    def _check_range(
        self, response: Response, metadata: FileMetadata, first: int, stop: int
    ) -> None:
        """Check that the bytes to come are those that were asked for, of the same file.

        Raises:
            BadRangeError: they are not.
            RangesNotSupportedError: it is the whole file that comes.
            huggingface_hub.errors.HfHubHTTPError: the server refuses.
        """
        status = response.status_code
        if status == 200:
            raise RangesNotSupportedError("the server does not serve parts of files")
        if status == 416:
            raise BadRangeError("the server has no such bytes (HTTP 416)")
        raise_for_status(response)  # `classify_errors` decides which refusals may pass
        content_range = response.headers.get("Content-Range", "")
        if not is_within(content_range, first, stop, metadata.size):
            raise BadRangeError(
                f"the server answers with other bytes than were asked for (HTTP {status})"
            )
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise BadRangeError("the server compresses what it sends")
        self._check_etag(response)

    def _check_etag(self, response: Response) -> None:
        """Check that a host stays with its ETag, which may differ from the Hub's."""
        etag = plain_etag(response.headers.get("ETag", ""))
        host = str(response.url.host)
        with self._lock:
            expected = self._etag_by_host.get(host) or etag
            self._etag_by_host[host] = expected
        if etag not in ("", expected):
            raise BadRangeError("the file changes while it is read")


def is_within(content_range: str, first: int, stop: int, size: int | None) -> bool:
    """Whether a response brings bytes from `first` on, none from `stop` on, of a file of this size.

    Args:
        content_range: the header.
        first: byte that was asked for.
        stop: one after the last.
        size: of the file, as the Hub says; None where it does not.
    """
    match = CONTENT_RANGE.fullmatch(content_range)
    if match is None or match["size"] not in ("*", str(size)):
        return False
    return int(match["first"]) == first and first <= int(match["last"]) < stop

"""HTTP requests through the session of `huggingface_hub`.

The Hub redirects large files to a CDN by a signed URL that soon expires. The token is sent only to
the Hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, cast
from urllib.parse import urlsplit

from siglip_port import __version__
from siglip_port.hub.errors import RetriesExhaustedError

CONTENT_RANGE = re.compile(r"bytes\s+(?P<first>\d+)-(?P<last>\d+)/(?P<size>\d+|\*)", re.IGNORECASE)

FIRST_BYTE = {"Range": "bytes=0-0"}
"""Range header that requests one byte, to learn the file size."""

HEAD_NOT_ALLOWED_STATUS = (405, 501)
"""HTTP statuses of a server that does not support HEAD."""

KNOWN_HUBS = ("https://huggingface.co", "https://hub-ci.huggingface.co", "https://hf.co")
"""Trusted besides the endpoint, since a mirror may redirect to the Hub."""

_DEFAULT_PORTS = {"http": 80, "https": 443}


class Url(Protocol):
    """The URL of a response."""

    @property
    def host(self) -> str:
        """Host name."""


class Response(Protocol):
    """The common interface of HTTP responses across releases of `huggingface_hub`."""

    @property
    def status_code(self) -> int:
        """HTTP status."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers by case-insensitive name."""

    @property
    def url(self) -> Url:
        """URL that responded."""

    def iter_bytes(self) -> Iterator[bytes]:
        """Yield the decompressed body."""

    def iter_raw(self) -> Iterator[bytes]:
        """Yield the body without decompression."""


@dataclass(frozen=True)
class FileSession:
    """Requests for one file, to the Hub or its redirect targets.

    Attributes:
        url: URL of the file on the Hub.
        token: Hub token; True for the stored token, False for none.
    """

    url: str
    token: str | bool | None = field(default=None, repr=False)

    def head(self, address: str) -> tuple[int, Mapping[str, str]]:
        """Request the headers of the file by HEAD, or by GET if HEAD is not supported.

        Redirects are not followed.

        Returns:
            HTTP status and headers.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: The Hub refused the request.
        """
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session

        response = get_session().request(
            "HEAD",
            address,
            headers=self.headers_for(address),
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
            follow_redirects=False,
        )
        if response.status_code in HEAD_NOT_ALLOWED_STATUS:
            return self._head_by_get(address)
        raise_for_status(response)
        return response.status_code, response.headers

    def _head_by_get(self, address: str) -> tuple[int, Mapping[str, str]]:
        from huggingface_hub import constants

        timeout = constants.HF_HUB_ETAG_TIMEOUT
        with self.stream(address, FIRST_BYTE, timeout=timeout, follow_redirects=False) as response:
            raise_for_status(response)
            headers = {
                name: value
                for name, value in response.headers.items()
                if name.lower() != "content-length"  # length of the first byte alone
            }
            size = file_size(response)
            if size:
                headers["Content-Length"] = str(size)
            return response.status_code, headers

    def stream(
        self,
        address: str,
        headers: Mapping[str, str],
        *,
        timeout: float | None = None,
        follow_redirects: bool = True,
    ) -> AbstractContextManager[Response]:
        """Send a GET request whose body is streamed.

        Args:
            address: URL of the request.
            headers: Additional headers.
            timeout: Timeout in seconds; None for `HF_HUB_DOWNLOAD_TIMEOUT`.
            follow_redirects: Whether to follow redirects.
        """
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session

        stream = get_session().stream(
            "GET",
            address,
            headers={**self.headers_for(address), **headers},
            timeout=timeout or constants.HF_HUB_DOWNLOAD_TIMEOUT,
            follow_redirects=follow_redirects,
        )
        return cast("AbstractContextManager[Response]", stream)

    def headers_for(self, address: str) -> dict[str, str]:
        """Return the default headers, with the token only if the URL is on the Hub.

        Raises:
            RetriesExhaustedError: The stored token is not a valid token.
        """
        from huggingface_hub.utils import build_hf_headers

        headers = build_hf_headers(
            token=self.token if is_hub(address, self.url) else False,
            library_name="siglip-port",
            library_version=__version__,
        )
        if not re.fullmatch(r"(Bearer [!-~]+)?", headers.get("authorization", "")):
            raise RetriesExhaustedError(
                "the stored Hub token has invalid characters; set HF_TOKEN again or log in with "
                "`hf auth login`; for a public repository, pass token=False"
            )
        return {**headers, "Accept-Encoding": "identity"}


def raise_for_status(response: Response) -> None:
    """Raise the error of `huggingface_hub` for an HTTP error status.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: The request was refused.
    """
    from huggingface_hub.utils import hf_raise_for_status

    hf_raise_for_status(response)  # type: ignore[arg-type]


def file_size(response: Response) -> int | None:
    """Return the size of the whole file from a response to a GET; None if it is not reported."""
    if "Content-Encoding" in response.headers:
        return None
    content_range = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    size = ""
    if content_range is not None:
        size = content_range["size"]
    elif response.status_code == 200:
        size = response.headers.get("Content-Length", "")
    return int(size) if size.isdecimal() else None


def plain_etag(etag: str) -> str:
    """Return an ETag without quotes and without the prefix of weak ETags."""
    return etag.removeprefix("W/").strip('"')


def is_hub(address: str, url: str) -> bool:
    """Return whether a URL is on the Hub, which may receive the token.

    Args:
        address: URL of the request.
        url: URL of the file on the Hub.
    """
    from huggingface_hub import constants

    hubs = (url, constants.ENDPOINT, *KNOWN_HUBS)
    return origin(address) in {origin(hub) for hub in hubs}


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Return scheme, host and port of a URL."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or _DEFAULT_PORTS.get(parts.scheme)

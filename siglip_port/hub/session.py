"""Requests of the Hub's client: where the token is sent, and what responses say of a file.

The Hub redirects large files to another host (a content delivery network), by an address that is
signed and soon expires. The token is sent to the Hub alone.
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
"""Headers of a request for a file's size."""

HEAD_NOT_ALLOWED_STATUS = (405, 501)
"""What a server answers that knows GET alone."""

KNOWN_HUBS = ("https://huggingface.co", "https://hub-ci.huggingface.co", "https://hf.co")
"""Besides the endpoint: a mirror may redirect to the Hub that it mirrors."""

_DEFAULT_PORTS = {"http": 80, "https": 443}


class Url(Protocol):
    """The address of a response."""

    @property
    def host(self) -> str:
        """Its host."""


class Response(Protocol):
    """What is used of a response of the client's HTTP library, which differs by release."""

    @property
    def status_code(self) -> int:
        """The HTTP status."""

    @property
    def headers(self) -> Mapping[str, str]:
        """By name, in any case."""

    @property
    def url(self) -> Url:
        """The address that has answered."""

    def iter_bytes(self) -> Iterator[bytes]:
        """Yield the body, decompressed."""

    def iter_raw(self) -> Iterator[bytes]:
        """Yield the body as it is sent."""


@dataclass(frozen=True)
class FileSession:
    """Requests for one file of the Hub, at the Hub or where it redirects to.

    Attributes:
        url: of the file at the Hub.
        token: a Hub token, True for the stored one, False for none.
    """

    url: str
    token: str | bool | None = field(default=None, repr=False)

    def head(self, address: str) -> tuple[int, Mapping[str, str]]:
        """Ask for what the Hub says of the file, without its bytes. Redirects are not followed.

        By HEAD, or, where that is not allowed, by GET.

        Returns:
            The HTTP status, and the headers.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
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
                if name.lower() != "content-length"  # of the first byte
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
        """Ask for bytes by GET; they are read from the response.

        Args:
            address: that is asked.
            headers: besides those of every request.
            timeout: seconds; None for the client's own, of downloads.
            follow_redirects: whether to go on to where the answer points.
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
        """Return the headers of every request, with the token if the address may see it.

        Raises:
            RetriesExhaustedError: the stored token cannot be one.
        """
        from huggingface_hub.utils import build_hf_headers

        headers = build_hf_headers(
            token=self.token if is_hub(address, self.url) else False,
            library_name="siglip-port",
            library_version=__version__,
        )
        if not re.fullmatch(r"(Bearer [!-~]+)?", headers.get("authorization", "")):
            raise RetriesExhaustedError(
                "the stored Hub token has characters that no token has: set HF_TOKEN anew, or log "
                "in with `hf auth login`; or pass token=False, for what is public"
            )
        return {**headers, "Accept-Encoding": "identity"}


def raise_for_status(response: Response) -> None:
    """Raise what the Hub's client raises for a refusal.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
    """
    from huggingface_hub.utils import hf_raise_for_status

    hf_raise_for_status(response)  # type: ignore[arg-type]


def file_size(response: Response) -> int | None:
    """Return the size of the file of which a response brings a part, or all."""
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
    """Return an ETag without its quotes; a weak one without its mark."""
    return etag.removeprefix("W/").strip('"')


def is_hub(address: str, url: str) -> bool:
    """Whether an address is of the Hub itself, which may see the token.

    Args:
        address: that is asked.
        url: of the file at the Hub.
    """
    from huggingface_hub import constants

    hubs = (url, constants.ENDPOINT, *KNOWN_HUBS)
    return origin(address) in {origin(hub) for hub in hubs}


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Return scheme, host and port of an address."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or _DEFAULT_PORTS.get(parts.scheme)

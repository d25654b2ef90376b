"""File metadata from the Hub: commit, hash, size and download URL."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

from siglip_port.hub.errors import NoConnectionError, RetriesExhaustedError
from siglip_port.hub.session import FIRST_BYTE, FileSession, file_size, is_hub, plain_etag

MAX_REDIRECTS = 20


@dataclass(frozen=True)
class FileMetadata:
    """Metadata of a file on the Hub.

    Attributes:
        location: Download URL, possibly signed.
        commit: Commit that the revision resolved to.
        etag: ETag of the contents: SHA-256 for LFS and Xet files, else the git blob hash.
        size: Size in bytes; None if the server does not report it.
        is_xet: Whether the file is also in the Xet store.
    """

    location: str
    commit: str
    etag: str
    size: int | None
    is_xet: bool


@dataclass(frozen=True)
class MetadataResponse:
    """The last response of a redirect chain.

    Attributes:
        location: Download URL.
        status: HTTP status.
        headers: Headers by lowercase name, including the `X-` headers of earlier responses.
    """

    location: str
    status: int
    headers: Mapping[str, str]


def request_metadata(session: FileSession) -> FileMetadata:
    """Request the metadata of a file.

    Raises:
        NoConnectionError: The server is not the Hub.
        RetriesExhaustedError: The Hub redirects in a loop.
        huggingface_hub.errors.HfHubHTTPError: The Hub refused the request.
    """
    response = follow_redirects(session)
    headers = response.headers
    etag = plain_etag(headers.get("x-linked-etag") or headers.get("etag", ""))
    commit = headers.get("x-repo-commit", "")
    if not etag or not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise NoConnectionError(describe_other_server(session.url, response))
    size = announced_size(response)
    if size is None:
        size = request_size(session, response.location)
    return FileMetadata(response.location, commit, etag, size, "x-xet-hash" in headers)


def follow_redirects(session: FileSession) -> MetadataResponse:
    """Follow redirects within the Hub, such as those of a renamed repository."""
    location = session.url
    headers: dict[str, str] = {}
    for _ in range(MAX_REDIRECTS):
        status, response_headers = session.head(location)
        # A mirror may describe the file only in its first response, before the redirect.
        known = {name: value for name, value in headers.items() if name.startswith("x-")}
        headers = {name.lower(): value for name, value in response_headers.items()} | known
        if not 300 <= status < 400 or "location" not in headers:
            return MetadataResponse(location, status, headers)
        location = urljoin(location, headers["location"])
        is_described = "x-linked-etag" in headers and "x-repo-commit" in headers
        if is_described or not is_hub(location, session.url):
            return MetadataResponse(location, status, headers)
    raise RetriesExhaustedError(
        f"{urlsplit(session.url).hostname} redirects in a loop; check HF_ENDPOINT and the proxy"
    )


def describe_other_server(url: str, response: MetadataResponse) -> str:
    """Return why a response is not from the Hub."""
    headers = response.headers
    missing = "ETag" if headers.get("x-repo-commit") else "X-Repo-Commit"
    page = " with a web page" if "html" in headers.get("content-type", "") else ""
    return (
        f"{urlsplit(url).hostname} did not respond like the Hub (HTTP {response.status}{page}, no "
        f"{missing} header); check HF_ENDPOINT, and whether a proxy, firewall or login page "
        "intercepts the connection"
    )


def announced_size(response: MetadataResponse) -> int | None:
    """Return the file size from the headers; None if they do not report it."""
    headers = response.headers
    size = headers.get("x-linked-size", "")
    has_body = 200 <= response.status < 300  # a redirect may have a body of its own
    if not size and has_body and "content-encoding" not in headers:
        size = headers.get("content-length", "")
    return int(size) if size.isdecimal() else None


def request_size(session: FileSession, location: str) -> int | None:
    """Return the file size from a request for the first byte; None if it is not reported."""
    with (
        contextlib.suppress(Exception),
        session.stream(location, FIRST_BYTE) as response,
    ):
        return file_size(response)
    return None

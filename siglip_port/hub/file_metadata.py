"""What the Hub says of a file: its commit, hash and size, and where its bytes are."""

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
    """What the Hub says of a file, and where its bytes are to be had at present.

    Attributes:
        location: an address of the bytes, perhaps signed.
        commit: that the Hub took the revision for.
        etag: the Hub's identifier of the contents: SHA-256, or git's own hash of what git holds
            itself.
        size: in bytes; None where nobody says.
        is_xet: whether the Hub has it in its Xet store, too.
    """

    location: str
    commit: str
    etag: str
    size: int | None
    is_xet: bool


@dataclass(frozen=True)
class MetadataResponse:
    """The Hub's last answer, of several.

    Attributes:
        location: where the bytes are.
        status: HTTP status.
        headers: names in lower case, with what answers before it said of the file.
    """

    location: str
    status: int
    headers: Mapping[str, str]


def request_metadata(session: FileSession) -> FileMetadata:
    """Ask the Hub for a file's metadata.

    Raises:
        NoConnectionError: what answers is not the Hub.
        RetriesExhaustedError: the Hub redirects in a circle.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
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
    """Ask the Hub, and again where it redirects to itself, as when a repository is renamed."""
    location = session.url
    headers: dict[str, str] = {}
    for _ in range(MAX_REDIRECTS):
        status, response_headers = session.head(location)
        # A mirror may say what it knows of the file in its first answer, and not in that which it
        # redirects to.
        known = {name: value for name, value in headers.items() if name.startswith("x-")}
        headers = {name.lower(): value for name, value in response_headers.items()} | known
        if not 300 <= status < 400 or "location" not in headers:
            return MetadataResponse(location, status, headers)
        location = urljoin(location, headers["location"])
        is_described = "x-linked-etag" in headers and "x-repo-commit" in headers
        if is_described or not is_hub(location, session.url):
            return MetadataResponse(location, status, headers)
    raise RetriesExhaustedError(
        f"{urlsplit(session.url).hostname} redirects in a circle: check HF_ENDPOINT, and proxies"
    )


def describe_other_server(url: str, response: MetadataResponse) -> str:
    """Say, for a sentence, why what answers is not the Hub."""
    headers = response.headers
    missing = "ETag" if headers.get("x-repo-commit") else "X-Repo-Commit"
    page = ", a web page" if "html" in headers.get("content-type", "") else ""
    return (
        f"{urlsplit(url).hostname} does not answer as the Hub does (no {missing}; "
        f"HTTP {response.status}{page}): check HF_ENDPOINT, and whether "
        "a proxy, a firewall or a login page stands between"
    )


def announced_size(response: MetadataResponse) -> int | None:
    """Return the size of the file, if the headers say."""
    headers = response.headers
    size = headers.get("x-linked-size", "")
    has_body = 200 <= response.status < 300  # and no message beside a redirect
    if not size and has_body and "content-encoding" not in headers:
        size = headers.get("content-length", "")
    return int(size) if size.isdecimal() else None


def request_size(session: FileSession, location: str) -> int | None:
    """Ask for the first byte of a file, for its size; None where the answer does not say."""
    with (
        contextlib.suppress(Exception),
        session.stream(location, FIRST_BYTE) as response,
    ):
        return file_size(response)
    return None

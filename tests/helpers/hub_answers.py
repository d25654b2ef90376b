"""Responses of a Hub on loopback, and faults of these responses."""

from __future__ import annotations

import gzip
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

CHUNK = 1 << 18

LOGIN_PAGE = (
    b"<!DOCTYPE html><html><title>Welcome to the airport</title>"
    b"<form>Accept the terms to go on</form></html>"
)

Kind = Literal[
    "none",
    "status",  # the response is `status`
    "html",  # 200 and a login page, as from a captive portal
    "reset",  # the connection is reset (RST); `after=None`: before the headers
    "close",  # the connection is closed (FIN); `after=None`: before the headers
    # nothing is sent for `seconds`; None: until the Hub is reset; `after=None`: before the headers
    "stall",
    "slow",  # from `after` on, chunks of SLOW_CHUNK bytes, `seconds` apart
    "short",  # announces and sends only `after` bytes; None: half of them
    "long",  # announces and sends `after` more bytes than requested; None: one more
    "other range",  # 206 and a range that is shifted by `after` bytes; None: by one
    "other size",  # the reported file size is `after` bytes larger; None: by one
    "wrong bytes",  # flips the bits of byte `after` of the body; None: of the first
    "gzip",  # Content-Encoding: gzip
    "no length",  # Transfer-Encoding: chunked
    "other etag",
    "no etag",
    "no commit",
]


@dataclass(frozen=True)
class Fault:
    """A fault of requests.

    Attributes:
        kind: Kind of the fault.
        request: Key of the requests, or a glob.
        times: Number of requests; None for all.
        after: See `Kind`.
        seconds: See `Kind`.
        status: HTTP status of the response.
        headers: Headers that are added to those of the response, or replace them.
    """

    kind: Kind
    request: str = "*"
    times: int | None = 1
    after: int | None = None
    seconds: float | None = None
    status: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Answer:
    """A response, which sends the bytes [first, stop) of `body`.

    Attributes:
        status: HTTP status.
        headers: Headers by name.
        body: File or bytes.
        file: Name of the file in the repository; empty for messages.
    """

    status: int
    headers: dict[str, str]
    body: Path | bytes = b""
    file: str = ""

    def __post_init__(self) -> None:
        self.size = len(self.body) if isinstance(self.body, bytes) else self.body.stat().st_size
        self.first = 0
        self.stop = self.size
        self.wrong_byte = -1

    def send(self, first: int, stop: int) -> None:
        """Send only this part of the body."""
        self.first = first
        self.stop = stop
        if self.status == 206:
            self.headers["Content-Range"] = f"bytes {first}-{stop - 1}/{self.size}"

    def part(self, content_range: str) -> Answer:
        """Return the response to a Range header; an invalid header is ignored, as in RFC 9110."""
        span = parse_range(content_range, self.size)
        if span is None:
            return self
        first, stop = span
        if first >= self.size:
            return Answer(416, {"Content-Range": f"bytes */{self.size}"}, b"Range not satisfiable")
        self.status = 206
        self.send(first, stop)
        return self

    def read(self, first: int, stop: int, chunk: int = CHUNK) -> Iterator[tuple[int, bytes]]:
        """Yield offset and bytes of each chunk of the body, with zeros beyond its end."""
        opened = io.BytesIO(self.body) if isinstance(self.body, bytes) else self.body.open("rb")
        with opened:
            opened.seek(first)
            for start in range(first, stop, chunk):
                length = min(chunk, stop - start)
                content = bytearray(opened.read(length).ljust(length, b"\0"))
                wrong = self.wrong_byte - start
                if 0 <= wrong < length:
                    content[wrong] ^= 0xFF
                yield start, bytes(content)

    def disturbed(self, fault: Fault) -> Answer:
        """Return the response with the faults that affect its headers or body."""
        answer = self._disturb(fault)
        if fault.kind == "no length":
            answer.headers["Transfer-Encoding"] = "chunked"
        else:
            answer.headers["Content-Length"] = str(answer.stop - answer.first)
        answer.headers |= fault.headers
        return answer

    def _disturb(self, fault: Fault) -> Answer:
        num_bytes = fault.after or 1
        match fault.kind:
            case "status":
                return Answer(fault.status, {}, b"A fault of the test")
            case "html":
                return Answer(200, {"Content-Type": "text/html; charset=utf-8"}, LOGIN_PAGE)
            case "short":
                half = (self.stop - self.first) // 2
                self.send(self.first, self.first + (half if fault.after is None else fault.after))
            case "long":
                self.send(self.first, self.stop + num_bytes)
            case "other range":
                self.status = 206
                self.send(self.first + num_bytes, self.stop + num_bytes)
            case "other size":
                self._enlarge(num_bytes)
            case "wrong bytes":
                self.wrong_byte = self.first + (fault.after or 0)
            case "gzip":
                self._compress()
            case "other etag":
                names = {"ETag", "X-Linked-Etag"} & self.headers.keys()
                self.headers |= dict.fromkeys(names, f'"{"0" * 40}"')
            case "no etag":
                for name in [name for name in self.headers if "etag" in name.lower()]:
                    del self.headers[name]
            case "no commit":
                self.headers.pop("X-Repo-Commit", None)
        return self

    def _enlarge(self, num_bytes: int) -> None:
        self.size += num_bytes
        self.send(self.first, self.stop)
        size = self.headers.get("X-Linked-Size")
        if size is not None:
            self.headers["X-Linked-Size"] = str(int(size) + num_bytes)

    def _compress(self) -> None:
        """Compress the body; Content-Range stays that of the uncompressed body."""
        content = b"".join(chunk for _, chunk in self.read(self.first, self.stop))
        self.body = gzip.compress(content)
        self.first = 0
        self.stop = len(self.body)
        self.headers["Content-Encoding"] = "gzip"


def parse_range(header: str, size: int) -> tuple[int, int] | None:
    """Return first byte and stop of a Range header; None if it is invalid."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header)
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        return max(size - int(last), 0), size
    if not last:
        return int(first), size
    if int(first) > int(last):
        return None
    return int(first), min(int(last) + 1, size)


def refuse(status: int, code: str, message: str, **headers: str) -> Answer:
    """Return an error of the Hub; `code` determines the exception of the client."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    fields["X-Error-Message"] = message
    if code:
        fields["X-Error-Code"] = code
    return Answer(status, fields, message.encode())

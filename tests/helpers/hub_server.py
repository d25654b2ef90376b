"""A HuggingFace Hub on loopback, for the real `huggingface_hub` client.

There are two servers, like on the real Hub: the Hub, which checks access to repositories, and the
CDN, another origin, which serves large files by signed URLs and must never receive a token. Both
obey `Hub.faults`.

Files of `Hub.store_by_xet` are also in a Xet store on disk, from which the real `hf_xet` downloads
them; on the real Hub, all large files are in the Xet store.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import socket
import struct
import sys
import termios
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from tests.helpers.hub_answers import CHUNK, Answer, Fault, Kind, refuse
from tests.helpers.hub_repositories import Repository, etag_of, files

__all__ = ["RESOLVE", "Answer", "Fault", "Hub", "Kind", "Repository", "Server", "files"]

SLOW_CHUNK = 1 << 12

DISABLED = "Access to this resource is disabled."
"""Text by which the client recognizes a disabled repository."""

RESOLVE = re.compile(
    r"/(?:datasets/)?(?P<name>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)"
)
API = re.compile(
    r"/api/models/(?P<name>[^/]+(?:/[^/]+)?)"
    r"(?:/(?P<endpoint>revision|tree)/(?P<revision>[^/]+)(?:/(?P<below>.+))?)?"
)
XET_TOKEN = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)/xet-read-token/[0-9a-f]{40}")
SIGNED = re.compile(r"/(?P<etag>[^/]+)/(?P<file>.+)")


@dataclass
class Signed:
    """The file of a signed URL, its expiration time, and the number of uses left."""

    file: Path
    expires: float
    uses: int | None


@dataclass
class Exchange:
    """State of a request in progress, which stays valid when the Hub is reset."""

    fault: Fault
    released: threading.Event
    sent: Counter[str]


class Hub:
    """The two servers. The attributes can be changed while they run.

    Requests have keys: "HEAD config.json", "GET config.json", "RANGE config.json" for a GET with a
    Range header, the same with the prefix "CDN " at the CDN, and "GET api/models/..." for other
    paths.

    Attributes:
        repositories: Repositories by Hub id.
        faults: Faults; a request gets the first that matches, which is removed once used up.
        after: Callbacks by key; run once, before the client can send another request.
        ranges: Whether Range headers are obeyed.
        cdn_seconds: Lifetime of new signed URLs, in seconds.
        cdn_uses: Number of requests that a new signed URL is valid for; None for no limit.
        requests: Number of requests by key.
        sent: Bytes of the bodies by file, from both servers.
        authorizations: Server (`url` or `cdn_url`) and Authorization header of each request.
        max_concurrency: Maximum number of concurrent requests at one server. May be lower than the
            client's, since a request ends just before its last bytes are sent.
        xet_url: URL of the Xet store.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.released = threading.Event()
        self.reset()
        self.api = Server(self, self.respond, RESOLVE, "")
        self.cdn = Server(self, self.respond_cdn, SIGNED, "CDN ")
        self.url = self.api.url
        self.cdn_url = self.cdn.url

    def reset(self) -> None:
        """Reset all attributes; requests in progress are released and no longer counted."""
        self.released.set()
        self.released = threading.Event()
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.after: dict[str, Callable[[], object]] = {}
        self.ranges = True
        self.cdn_seconds = 3600.0
        self.cdn_uses: int | None = None
        self.requests: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.authorizations: list[tuple[str, str]] = []
        self.max_concurrency = 0
        self.xet_url = ""
        self._busy: Counter[str] = Counter()
        self._signed: dict[str, Signed] = {}
        self._xet_hashes: dict[str, str] = {}  # by etag

    def wait_for_requests(self, key: str, count: int, seconds: float = 60) -> None:
        """Wait until the number of requests with this key reaches `count`."""
        with self._changed:
            has_arrived = self._changed.wait_for(lambda: self.requests[key] >= count, seconds)
        assert has_arrived, self.requests

    def store_by_xet(self, folder: Path, *paths: Path) -> None:
        """Upload files to a Xet store on disk by `hf_xet`; the Hub reports them as Xet files."""
        import hf_xet

        folder.mkdir(parents=True, exist_ok=True)
        self.xet_url = f"local://{folder}"
        with hf_xet.XetSession().new_upload_commit(
            self.xet_url, "token", int(time.time()) + 3600
        ) as commit:
            uploads = [commit.start_upload_file(str(path)) for path in paths]
        for path, upload in zip(paths, uploads, strict=True):
            self._xet_hashes[etag_of(path, lfs=True)] = upload.result().xet_info.hash

    def expire(self) -> None:
        """Expire all signed URLs."""
        self._signed.clear()

    @contextmanager
    def in_progress(self, address: str, key: str, authorization: str | None) -> Iterator[Exchange]:
        """Count a request while it is in progress, and yield its fault."""
        busy = self._busy
        with self._changed:
            self.requests[key] += 1
            busy[address] += 1
            self.max_concurrency = max(self.max_concurrency, busy[address])
            if authorization is not None:
                self.authorizations.append((address, authorization))
            fault = self._take_fault(key)
            self._changed.notify_all()
        try:
            yield Exchange(fault, self.released, self.sent)
        finally:
            with self._changed:
                busy[address] -= 1

    def _take_fault(self, key: str) -> Fault:
        for i, fault in enumerate(self.faults):
            if not fnmatchcase(key, fault.request):
                continue
            if fault.times == 1:
                del self.faults[i]
            elif fault.times is not None:
                self.faults[i] = replace(fault, times=fault.times - 1)
            return fault
        return Fault("none")

    def count_sent(self, sent: Counter[str], file: str, count: int) -> None:
        with self._changed:
            sent[file] += count

    # --- the Hub ----------------------------------------------------------------------------------

    def respond(self, target: str, authorization: str | None) -> Answer:
        """Respond like the Hub."""
        path = urlsplit(target).path
        if XET_TOKEN.fullmatch(path):
            return self._xet_token()
        match = RESOLVE.fullmatch(path) or API.fullmatch(path)
        if match is None:
            return refuse(404, "", "Not found")
        groups = match.groupdict().items()
        request = {name: unquote(value) for name, value in groups if value is not None}
        repository = self.repositories.get(request["name"])
        if repository is None:
            return refuse(404, "RepoNotFound", "Repository not found")
        token = authorization.removeprefix("Bearer ") if authorization else None
        refusal = refusal_of(repository, token, for_files="file" in request)
        if refusal:
            return refusal
        snapshot = repository.find(request.get("revision", "main"))
        if snapshot is None:
            return refuse(404, "RevisionNotFound", "Revision not found")
        commit, folder = snapshot
        if "file" in request:
            return self._resolve(
                request["name"], repository, commit, folder / request["file"], folder
            )
        return list_files(repository, commit, folder, request)

    def _xet_token(self) -> Answer:
        headers = {
            "X-Xet-Cas-Url": self.xet_url,
            "X-Xet-Access-Token": "xet-secret",
            "X-Xet-Token-Expiration": str(int(time.time()) + 3600),
        }
        return Answer(200, headers, b"{}")

    def _resolve(
        self, name: str, repository: Repository, commit: str, file: Path, folder: Path
    ) -> Answer:
        """Return a file, or a redirect to the CDN."""
        if not file.is_file():
            return refuse(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit)
        path = file.relative_to(folder).as_posix()
        lfs = repository.on_cdn(path)
        etag = etag_of(file, lfs=lfs)
        headers = {"X-Repo-Commit": commit, **self._accept_ranges()}
        if not lfs:
            return Answer(200, headers | {"ETag": f'"{etag}"'}, file, path)
        headers["Location"] = self.cdn_url + self._sign(file, f"/{etag}/{quote(path)}")
        headers["X-Linked-Etag"] = f'"{etag}"'
        headers["X-Linked-Size"] = str(file.stat().st_size)
        if etag in self._xet_hashes:
            # The client caches the token by this URL, so the URL must differ between stores.
            query = quote(self.xet_url, safe="")
            token = f"{self.url}/api/models/{name}/xet-read-token/{commit}?{query}"
            headers["X-Xet-Hash"] = self._xet_hashes[etag]
            headers["Link"] = f'<{token}>; rel="xet-auth"'
        # The body has another length than the file.
        return Answer(302, headers, f"Found: {headers['Location']}".encode())

    def _sign(self, file: Path, path: str) -> str:
        expires = time.time() + self.cdn_seconds
        target = f"{path}?Expires={expires:.0f}&Signature={uuid.uuid4().hex}"
        with self._changed:
            self._signed[target] = Signed(file, expires, self.cdn_uses)
        return target

    # --- the CDN ----------------------------------------------------------------------------------

    def respond_cdn(self, target: str, authorization: str | None) -> Answer:
        """Respond like S3 or CloudFront: signed URLs only, and no Authorization header."""
        if authorization is not None:
            message = b"<Error><Message>Only one auth mechanism allowed</Message></Error>"
            return Answer(400, {}, message)
        with self._changed:
            signed = self._signed.get(target)
            if signed is None or signed.expires <= time.time() or signed.uses == 0:
                return Answer(403, {}, b"<Error><Message>Request has expired</Message></Error>")
            if signed.uses is not None:
                signed.uses -= 1
        # As on the real CDN, the ETag looks like that of the Hub, but differs.
        etag = hashlib.sha256(etag_of(signed.file, lfs=True).encode()).hexdigest()
        headers = {
            "ETag": f'"{etag}"',
            "Content-Disposition": f'inline; filename="{signed.file.name}";',
            **self._accept_ranges(),
        }
        match = SIGNED.fullmatch(urlsplit(target).path)
        return Answer(200, headers, signed.file, unquote(match["file"]) if match else "")

    def _accept_ranges(self) -> dict[str, str]:
        return {"Accept-Ranges": "bytes"} if self.ranges else {}


def refusal_of(repository: Repository, token: str | None, *, for_files: bool) -> Answer | None:
    """Return the refusal of a token; None if it has access. Gated file lists are public."""
    if token in repository.readers:
        return None
    if repository.private:
        return refuse(404 if token else 401, "RepoNotFound", "Repository not found")
    if repository.disabled:
        return refuse(403, "", DISABLED)
    if repository.gated and for_files:
        return refuse(403 if token else 401, "GatedRepo", "Access to this model is restricted")
    return None


def list_files(
    repository: Repository, commit: str, folder: Path, request: Mapping[str, str]
) -> Answer:
    """Return the files of a repository or folder, always recursively, like the API of the Hub.

    `/api/models/<name>[/revision/<revision>]`, or `.../tree/<revision>[/<folder>]`.
    """
    document: object
    if request.get("endpoint") == "tree":
        below = request["below"] + "/" if "below" in request else ""
        entries = {path: file for path, file in files(folder).items() if path.startswith(below)}
        if below and not entries:
            return refuse(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit)
        document = [
            {
                "type": "file",
                "path": path,
                "size": file.stat().st_size,
                "oid": etag_of(file, lfs=False),
            }
            for path, file in entries.items()
        ]
    else:
        document = {
            "id": request["name"],
            "sha": commit,
            "private": repository.private,
            "gated": "manual" if repository.gated else False,
            "disabled": repository.disabled,
            "tags": [],
            "siblings": [{"rfilename": path} for path in files(folder)],
        }
    headers = {"Content-Type": "application/json", "X-Repo-Commit": commit}
    return Answer(200, headers, json.dumps(document).encode())


class Server(ThreadingHTTPServer):
    """One of the two servers."""

    request_queue_size = 128  # clients open many connections at once

    def __init__(
        self,
        hub: Hub,
        respond: Callable[[str, str | None], Answer],
        pattern: re.Pattern[str],
        prefix: str,
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = hub
        self.respond = respond
        self.pattern = pattern
        self.prefix = prefix
        # The CDN has another host name, since some releases of the client ignore the port.
        self.url = f"http://{'localhost' if prefix else '127.0.0.1'}:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def key(self, method: str, target: str) -> str:
        path = urlsplit(target).path
        match = self.pattern.fullmatch(path)
        return f"{self.prefix}{method} {unquote(match['file'] if match else path.strip('/'))}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that disconnect."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class Handler(BaseHTTPRequestHandler):
    """A connection of a client, with one or more requests."""

    server: Server
    protocol_version = "HTTP/1.1"
    # headers and body are two writes; with Nagle's algorithm, each response waits for an ACK
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.server.hub
        content_range = self.headers.get("Range")
        method = self.command
        if self.command == "GET" and content_range is not None:
            method = "RANGE"
        key = self.server.key(method, self.path)
        authorization = self.headers.get("Authorization")
        with ExitStack() as progress:
            exchange = progress.enter_context(hub.in_progress(self.server.url, key, authorization))
            answer = self.server.respond(self.path, authorization)
            if method == "RANGE" and content_range is not None and hub.ranges and answer.file:
                answer = answer.part(content_range)
            callback = hub.after.pop(key, None)
            if callback is not None:
                callback()
            transfer = Transfer(self, answer.disturbed(exchange.fault), exchange, progress)
            if not transfer.run():
                self.close_connection = True
        if exchange.fault.kind == "reset":
            self.reset(exchange.released)

    def reset(self, released: threading.Event) -> None:
        """Close with RST instead of FIN, after all sent bytes arrived, which RST would discard."""
        while any(fcntl.ioctl(self.connection, termios.TIOCOUTQ, bytes(4))):
            if released.wait(0.001):
                break
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()  # an open file would keep the socket open
        self.connection.close()


class Transfer:
    """Sends a response, as far as its fault permits."""

    def __init__(
        self, handler: Handler, answer: Answer, exchange: Exchange, progress: ExitStack
    ) -> None:
        self.handler = handler
        self.answer = answer
        self.exchange = exchange
        self.progress = progress
        self.fault = exchange.fault
        self.is_chunked = "Transfer-Encoding" in answer.headers
        self.stop = answer.stop if handler.command == "GET" else answer.first

    def run(self) -> bool:
        """Send the response; return whether it was sent to the end."""
        if self.fault.after is None and self.ends_here():
            return False
        self.send_headers()
        middle = min(self.answer.first + (self.fault.after or 0), self.stop)
        for first, chunk in self.answer.read(self.answer.first, middle):
            self.write(first, chunk)
        if self.fault.after is not None and self.ends_here():
            return False
        is_slow = self.fault.kind == "slow"
        for first, chunk in self.answer.read(middle, self.stop, SLOW_CHUNK if is_slow else CHUNK):
            self.write(first, chunk)
            if is_slow and self.exchange.released.wait(self.fault.seconds or 0.01):
                return False
        if self.is_chunked and self.handler.command == "GET":
            self.handler.wfile.write(b"0\r\n\r\n")
        return True

    def ends_here(self) -> bool:
        """Return whether the fault ends the response; a stall ends it when the Hub is reset."""
        if self.fault.kind == "stall":
            return self.exchange.released.wait(self.fault.seconds)
        return self.fault.kind in ("reset", "close")

    def send_headers(self) -> None:
        self.handler.send_response(self.answer.status)
        for name, value in self.answer.headers.items():
            self.handler.send_header(name, value)
        if self.answer.first == self.stop:
            self.progress.close()
        self.handler.end_headers()

    def write(self, first: int, chunk: bytes) -> None:
        # Count before sending: once the client has the last byte, it is counted, and the request is
        # no longer in progress.
        if first + len(chunk) == self.stop:
            self.progress.close()
        if self.answer.file:
            hub = self.handler.server.hub
            hub.count_sent(self.exchange.sent, self.answer.file, len(chunk))
        if self.is_chunked:
            chunk = b"%x\r\n%b\r\n" % (len(chunk), chunk)
        self.handler.wfile.write(chunk)

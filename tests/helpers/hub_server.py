"""A HuggingFace Hub on loopback, for the real `huggingface_hub` client.

Two servers, as in the real world: the Hub, which knows repositories and who may read them, and the
CDN, another origin, which serves large files to whoever has a signed address, and must never be
shown a token. Both obey `Hub.faults`.

What `Hub.store_by_xet` has stored, the Hub says to have in its Xet store, too, as it says of all
its large files today: the real `hf_xet` then fetches it from a store on disk.
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
"""The client knows a disabled repository by this text."""

RESOLVE = re.compile(
    r"/(?:datasets/)?(?P<name>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)"
)
API = re.compile(
    r"/api/models/(?P<name>[^/]+(?:/[^/]+)?)"
    r"(?:/(?P<what>revision|tree)/(?P<revision>[^/]+)(?:/(?P<below>.+))?)?"
)
XET_TOKEN = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)/xet-read-token/[0-9a-f]{40}")
SIGNED = re.compile(r"/(?P<etag>[^/]+)/(?P<file>.+)")


@dataclass
class Signed:
    """What a signed address of the CDN gives, until when and how often."""

    file: Path
    expires: float
    uses: int | None


@dataclass
class Exchange:
    """What a request under way needs of the test that made it, even when the Hub is reset."""

    fault: Fault
    released: threading.Event
    sent: Counter[str]


class Hub:
    """The servers. What is set on it, `repositories` above all, may be changed while they run.

    Requests are known by keys: "HEAD config.json", "GET config.json", "RANGE config.json" for a GET
    with a Range header, the same after "CDN " at the CDN, and "GET api/models/..." for other paths.

    Attributes:
        repositories: by Hub id.
        faults: each request meets the first that fits it; those that are used up leave.
        after: by key: run once, before the client can ask again.
        ranges: whether a Range header is obeyed.
        cdn_seconds: how long an address signed from now on is good for,
        cdn_uses: and how many requests.
        requests: how many there were, by key.
        sent: bytes of the bodies, by file, at both addresses together.
        authorizations: address (`url` or `cdn_url`) and Authorization header.
        most_at_once: the most requests in progress at the same time at one of the addresses: never
            more than the client has open, and where answers are quick perhaps fewer, since a
            request is over just before its last bytes leave.
        xet_url: of the Xet store.
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
        """Forget everything.

        Requests that are still being answered are let go, and no longer count.
        """
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
        self.most_at_once = 0
        self.xet_url = ""
        self._busy: Counter[str] = Counter()
        self._signed: dict[str, Signed] = {}
        self._xet_hashes: dict[str, str] = {}  # by etag

    def wait_for_requests(self, key: str, count: int, seconds: float = 60) -> None:
        """Wait until so many requests have come."""
        with self._changed:
            came = self._changed.wait_for(lambda: self.requests[key] >= count, seconds)
        assert came, self.requests

    def store_by_xet(self, store: Path, *paths: Path) -> None:
        """Put files into a Xet store on disk, by `hf_xet` itself.

        From now on the Hub says that it has them there.
        """
        import hf_xet

        store.mkdir(parents=True, exist_ok=True)
        self.xet_url = f"local://{store}"
        with hf_xet.XetSession().new_upload_commit(
            self.xet_url, "token", int(time.time()) + 3600
        ) as commit:
            uploads = [commit.start_upload_file(str(path)) for path in paths]
        for path, upload in zip(paths, uploads, strict=True):
            self._xet_hashes[etag_of(path, lfs=True)] = upload.result().xet_info.hash

    def expire(self) -> None:
        """From now on the CDN refuses all addresses that were signed so far."""
        self._signed.clear()

    @contextmanager
    def answering(self, address: str, key: str, authorization: str | None) -> Iterator[Exchange]:
        """Count a request while it is answered, and say what is to go wrong with it."""
        busy = self._busy
        with self._changed:
            self.requests[key] += 1
            busy[address] += 1
            self.most_at_once = max(self.most_at_once, busy[address])
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
        """Answer as the Hub does."""
        path = urlsplit(target).path
        if XET_TOKEN.fullmatch(path):
            return self._xet_token()
        match = RESOLVE.fullmatch(path) or API.fullmatch(path)
        if match is None:
            return refuse(404, "", "Not found")
        asked = {
            name: unquote(value) for name, value in match.groupdict().items() if value is not None
        }
        repository = self.repositories.get(asked["name"])
        if repository is None:
            return refuse(404, "RepoNotFound", "Repository not found")
        token = authorization.removeprefix("Bearer ") if authorization else None
        refusal = refusal_of(repository, token, for_files="file" in asked)
        if refusal:
            return refusal
        place = repository.find(asked.get("revision", "main"))
        if place is None:
            return refuse(404, "RevisionNotFound", "Revision not found")
        commit, folder = place
        if "file" in asked:
            return self._resolve(asked["name"], repository, commit, folder / asked["file"], folder)
        return list_files(repository, commit, folder, asked)

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
        """A file, or where the CDN has it."""
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
            # The client keeps what is told there, by this address: another store has another.
            store = quote(self.xet_url, safe="")
            token = f"{self.url}/api/models/{name}/xet-read-token/{commit}?{store}"
            headers["X-Xet-Hash"] = self._xet_hashes[etag]
            headers["Link"] = f'<{token}>; rel="xet-auth"'
        # With a body, whose length is not the file's.
        return Answer(302, headers, f"Found: {headers['Location']}".encode())

    def _sign(self, file: Path, path: str) -> str:
        expires = time.time() + self.cdn_seconds
        target = f"{path}?Expires={expires:.0f}&Signature={uuid.uuid4().hex}"
        with self._changed:
            self._signed[target] = Signed(file, expires, self.cdn_uses)
        return target

    # --- the CDN ----------------------------------------------------------------------------------

    def respond_cdn(self, target: str, authorization: str | None) -> Answer:
        """Answer as S3 or CloudFront does.

        To whoever has a signed address, and nothing else to show.
        """
        if authorization is not None:
            message = b"<Error><Message>Only one auth mechanism allowed</Message></Error>"
            return Answer(400, {}, message)
        with self._changed:
            signed = self._signed.get(target)
            if signed is None or signed.expires <= time.time() or signed.uses == 0:
                return Answer(403, {}, b"<Error><Message>Request has expired</Message></Error>")
            if signed.uses is not None:
                signed.uses -= 1
        # It has an ETag, which looks like the Hub's, but on the real CDN too is another one.
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
    """Why a token does not open it. Of a gated repository everybody may see what it holds."""
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
    repository: Repository, commit: str, folder: Path, asked: Mapping[str, str]
) -> Answer:
    """The API's answer: what a repository holds, or a folder of it, always with subfolders.

    `/api/models/<name>[/revision/<revision>]`, or `.../tree/<revision>[/<folder>]`.
    """
    document: object
    if asked.get("what") == "tree":
        below = asked["below"] + "/" if "below" in asked else ""
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
            "id": asked["name"],
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
    """One of the two addresses."""

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
        # The CDN has another name, too: not all releases of the client look at the port to tell one
        # host from another.
        self.url = f"http://{'localhost' if prefix else '127.0.0.1'}:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def key(self, method: str, target: str) -> str:
        path = urlsplit(target).path
        match = self.pattern.fullmatch(path)
        return f"{self.prefix}{method} {unquote(match['file'] if match else path.strip('/'))}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away in the middle is no error of ours."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class Handler(BaseHTTPRequestHandler):
    """One connection of a client, which may carry many requests."""

    server: Server
    protocol_version = "HTTP/1.1"
    # headers and body are two writes: else each answer waits for the client's ACK
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
            exchange = progress.enter_context(hub.answering(self.server.url, key, authorization))
            answer = self.server.respond(self.path, authorization)
            if method == "RANGE" and content_range is not None and hub.ranges and answer.file:
                answer = answer.part(content_range)
            then = hub.after.pop(key, None)
            if then is not None:
                then()
            transfer = Transfer(self, answer.disturbed(exchange.fault), exchange, progress)
            if not transfer.run():
                self.close_connection = True
        if exchange.fault.kind == "reset":
            self.reset(exchange.released)

    def reset(self, released: threading.Event) -> None:
        """Close with RST in place of FIN, after all that was sent has arrived.

        RST throws away what is on its way.
        """
        while any(fcntl.ioctl(self.connection, termios.TIOCOUTQ, bytes(4))):
            if released.wait(0.001):
                break
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()  # which would hold the socket open
        self.connection.close()


class Transfer:
    """Sends an answer, as far as the fault lets it."""

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
        """Send it; False where that was not to the end."""
        if self.fault.after is None and self.ends_here():
            return False
        self.send_headers()
        middle = min(self.answer.first + (self.fault.after or 0), self.stop)
        for first, piece in self.answer.read(self.answer.first, middle):
            self.write(first, piece)
        if self.fault.after is not None and self.ends_here():
            return False
        is_slow = self.fault.kind == "slow"
        for first, piece in self.answer.read(middle, self.stop, SLOW_CHUNK if is_slow else CHUNK):
            self.write(first, piece)
            if is_slow and self.exchange.released.wait(self.fault.seconds or 0.01):
                return False
        if self.is_chunked and self.handler.command == "GET":
            self.handler.wfile.write(b"0\r\n\r\n")
        return True

    def ends_here(self) -> bool:
        """Whether the fault ends it; a stall is waited for, and ends it where the test is over."""
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

    def write(self, first: int, piece: bytes) -> None:
        # Counted first: whoever has the last byte finds it counted, and the request no longer in
        # progress.
        if first + len(piece) == self.stop:
            self.progress.close()
        if self.answer.file:
            hub = self.handler.server.hub
            hub.count_sent(self.exchange.sent, self.answer.file, len(piece))
        if self.is_chunked:
            piece = b"%x\r\n%b\r\n" % (len(piece), piece)
        self.handler.wfile.write(piece)

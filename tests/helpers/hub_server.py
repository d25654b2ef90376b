"""A HuggingFace Hub on loopback, for the real `huggingface_hub` client.

Repositories are folders of this machine.

Two servers, as in the real world: the Hub, which knows repositories and who may read them, and the
CDN, another origin, which serves large files to whoever has a signed address, and must never be
shown a token. Both obey `Hub.faults`.

What `Hub.store_by_xet` has stored, the Hub says to have in its Xet store, too, as it says of all
its large files today:
the real `hf_xet` then fetches it from a store on disk.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import io
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
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote, urlsplit

CHUNK, SLOW_CHUNK = 1 << 18, 1 << 12
HASHED = (
    64 << 20
)  # larger files, sparse ones of many GB among them, get an ETag that nobody has to compute
DISABLED = (
    "Access to this resource is disabled."  # the client knows a disabled repository by this text
)
LOGIN = b"<!DOCTYPE html><html><title>Welcome to the airport</title><form>Accept the terms to go on</form></html>"

RESOLVE = re.compile(
    r"/(?:datasets/)?(?P<name>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)"
)
API = re.compile(
    r"/api/models/(?P<name>[^/]+(?:/[^/]+)?)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+)(?:/(?P<below>.+))?)?"
)
XET_TOKEN = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)/xet-read-token/[0-9a-f]{40}")
SIGNED = re.compile(r"/(?P<etag>[^/]+)/(?P<file>.+)")

Kind = Literal[
    "none",
    "status",  # the answer is `status`
    "html",  # 200 and a login page, as from a captive portal
    "reset",  # the connection is reset (RST); `after=None`: before the headers
    "close",  # the connection is closed in good order; `after=None`: before the headers
    # nothing comes for `seconds`, or, without, until the Hub is reset; `after=None`: before the
    # headers
    "stall",
    "slow",  # from `after` on in pieces of SLOW_CHUNK bytes, `seconds` apart
    "short",  # announces and sends `after` bytes only; without, half of them
    "long",  # announces and sends `after` more bytes than were asked for; without, one more
    "other range",  # 206, and a range `after` bytes further; without, one byte
    "other size",  # the file is said to be `after` bytes larger; without, one byte
    "wrong bytes",  # the body's byte number `after` has its bits flipped; without, the first
    "gzip",  # Content-Encoding: gzip
    "no length",  # Transfer-Encoding: chunked
    "other etag",
    "no etag",
    "no commit",
]


@dataclass(frozen=True)
class Fault:
    """What goes wrong with the next `times` requests, or for ever, whose key is `request` or matches it as a glob."""

    kind: Kind
    request: str = "*"
    times: int | None = 1
    after: int | None = None
    seconds: float | None = None
    status: int = 500
    headers: Mapping[str, str] = field(
        default_factory=dict
    )  # instead of, or beside, those of the answer


@dataclass
class Repository:
    """A model repository: `main` and `tags` are its first commit, until `push` moves `main`."""

    folder: Path
    gated: bool = False
    private: bool = False
    disabled: bool = False
    readers: tuple[str, ...] = ()  # tokens that open it where it is gated or private
    tags: tuple[str, ...] = ("v1",)
    # a glob: files that the CDN serves, as git-lfs files on the real Hub; "" for none
    cdn: str = "*.safetensors"

    def __post_init__(self) -> None:
        self._commits = [self.folder]
        self._refs = dict.fromkeys(("main", *self.tags), 0)

    def push(self, folder: Path) -> None:
        """Moves `main` to another folder.

        Tags stay, and the old folder is still served under its commit.
        """
        self.folder = folder
        self._commits.append(folder)
        self._refs["main"] = len(self._commits) - 1

    @property
    def commit(self) -> str:
        """The commit of `main`: forty hexadecimal digits that change with the contents."""
        return self._commit(self._refs["main"])

    def _commit(self, number: int) -> str:
        digest = hashlib.sha1(b"%d" % number, usedforsecurity=False)
        for path, file in files(self._commits[number]).items():
            digest.update(f"{path} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
        return digest.hexdigest()

    def find(self, revision: str) -> tuple[str, Path] | None:
        """The commit and the folder of a branch, tag or commit."""
        for number, folder in enumerate(self._commits):
            commit = self._commit(number)
            if self._refs.get(revision) == number or revision == commit:
                return commit, folder
        return None

    def refusal(self, token: str | None, *, for_files: bool) -> Answer | None:
        """Why the token does not open it. Of a gated repository everybody may see what it holds."""
        if token in self.readers:
            return None
        if self.private:
            return refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        if self.disabled:
            return refuse(403, "", DISABLED)
        if self.gated and for_files:
            return refuse(403 if token else 401, "GatedRepo", "Access to this model is restricted")
        return None

    def on_cdn(self, path: str) -> bool:
        return fnmatchcase(path, self.cdn)


def files(folder: Path) -> dict[str, Path]:
    """All files below a folder, by their paths in the repository."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def etag_of(file: Path, *, lfs: bool) -> str:
    """As the Hub's: SHA-256 of the contents of a git-lfs file, and what git calls the blob for others."""
    stat = file.stat()
    return _etag(file, stat.st_size, stat.st_mtime_ns, stat.st_ino, lfs)


@cache
def _etag(file: Path, size: int, mtime_ns: int, inode: int, lfs: bool) -> str:
    if size > HASHED:
        return (
            hashlib.sha1(f"{file.name} {size}".encode(), usedforsecurity=False).hexdigest()
            + "-large"
        )
    with file.open("rb") as opened:
        if lfs:
            return hashlib.file_digest(opened, hashlib.sha256).hexdigest()
        blob = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        return hashlib.file_digest(opened, lambda: blob).hexdigest()


@dataclass
class Answer:
    """A response: of `body`, the bytes from `first` to `stop` are sent."""

    status: int
    headers: dict[str, str]
    body: Path | bytes = b""
    file: str = ""  # whose bytes these are; messages have no file

    def __post_init__(self) -> None:
        self.size = len(self.body) if isinstance(self.body, bytes) else self.body.stat().st_size
        self.first, self.stop, self.wrong = 0, self.size, -1

    def send(self, first: int, stop: int) -> None:
        """Sends this part of the body only."""
        self.first, self.stop = first, stop
        if self.status == 206:
            self.headers["Content-Range"] = f"bytes {first}-{stop - 1}/{self.size}"

    def part(self, asked: str) -> Answer:
        """What a Range header asks for.

        One that cannot be understood asks for everything, as in RFC 9110.
        """
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked)
        if (
            not match
            or match[0] == "bytes=-"
            or (match[1] and match[2] and int(match[1]) > int(match[2]))
        ):
            return self
        first = int(match[1]) if match[1] else max(self.size - int(match[2]), 0)
        stop = min(int(match[2]) + 1, self.size) if match[1] and match[2] else self.size
        if first >= self.size:
            return Answer(416, {"Content-Range": f"bytes */{self.size}"}, b"Range not satisfiable")
        self.status = 206
        self.send(first, stop)
        return self

    def read(self, first: int, stop: int, chunk: int = CHUNK) -> Iterator[tuple[int, bytes]]:
        """The bytes of the body, zeros beyond its end, in pieces that say where they are from."""
        with (
            io.BytesIO(self.body)
            if isinstance(self.body, bytes)
            else self.body.open("rb") as opened
        ):
            opened.seek(first)
            for start in range(first, stop, chunk):
                length, wrong = min(chunk, stop - start), self.wrong - start
                piece = opened.read(length).ljust(length, b"\0")
                if 0 <= wrong < length:
                    piece = piece[:wrong] + bytes([piece[wrong] ^ 0xFF]) + piece[wrong + 1 :]
                yield start, piece

    def disturbed(self, fault: Fault) -> Answer:
        """The answer as the fault leaves it, for the faults of which the headers tell."""
        answer, more = self, fault.after or 1
        match fault.kind:
            case "status":
                answer = Answer(fault.status, {}, b"A fault of the test")
            case "html":
                answer = Answer(200, {"Content-Type": "text/html; charset=utf-8"}, LOGIN)
            case "short":
                length = (self.stop - self.first) // 2 if fault.after is None else fault.after
                self.send(self.first, self.first + length)
            case "long":
                self.send(self.first, self.stop + more)
            case "other range":
                self.status = 206
                self.send(self.first + more, self.stop + more)
            case "other size":
                self.size += more
                self.send(self.first, self.stop)
                if "X-Linked-Size" in self.headers:
                    self.headers["X-Linked-Size"] = str(int(self.headers["X-Linked-Size"]) + more)
            case "wrong bytes":
                self.wrong = self.first + (fault.after or 0)
            case "gzip":
                self.body = gzip.compress(
                    b"".join(piece for _, piece in self.read(self.first, self.stop))
                )
                self.first, self.stop = (
                    0,
                    len(self.body),
                )  # while Content-Range, if any, is of what was compressed
                self.headers["Content-Encoding"] = "gzip"
            case "other etag":
                self.headers |= dict.fromkeys(
                    {"ETag", "X-Linked-Etag"} & self.headers.keys(), f'"{"0" * 40}"'
                )
            case "no etag":
                self.headers = {
                    name: value
                    for name, value in self.headers.items()
                    if "etag" not in name.lower()
                }
            case "no commit":
                self.headers.pop("X-Repo-Commit", None)
        if fault.kind == "no length":
            answer.headers["Transfer-Encoding"] = "chunked"
        else:
            answer.headers["Content-Length"] = str(answer.stop - answer.first)
        answer.headers |= fault.headers
        return answer


def refuse(status: int, code: str, message: str, **headers: str) -> Answer:
    """An error as the Hub reports it: `code` decides which exception the client raises."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()} | {
        "X-Error-Message": message
    }
    return Answer(status, headers | ({"X-Error-Code": code} if code else {}), message.encode())


@dataclass
class Signed:
    """What a signed address of the CDN gives, until when and how often."""

    file: Path
    expires: float
    uses: int | None


@dataclass
class Exchange:
    """What a request under way needs of the test that made it, even when the Hub is reset meanwhile."""

    fault: Fault
    released: threading.Event
    sent: Counter[str]


class Hub:
    """The servers. What is set on it, `repositories` above all, may be changed while they run.

    Requests are known by keys: "HEAD config.json", "GET config.json", "RANGE config.json" for a GET
    with a Range header, the same after "CDN " at the CDN, and "GET api/models/..." for other paths.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.released = threading.Event()
        self.reset()
        self._hub, self._cdn = (
            Server(self, self.respond, RESOLVE, ""),
            Server(self, self.respond_cdn, SIGNED, "CDN "),
        )
        self.url, self.cdn_url = self._hub.url, self._cdn.url

    def reset(self) -> None:
        """Forgets everything.

        Requests that are still being answered are let go, and no longer count.
        """
        self.released.set()
        self.released = threading.Event()
        self.repositories: dict[str, Repository] = {}
        self.faults: list[
            Fault
        ] = []  # each request meets the first that fits it; those that are used up leave
        self.after: dict[
            str, Callable[[], object]
        ] = {}  # by key: run once, before the client can ask again
        self.ranges = True  # whether a Range header is obeyed
        self.cdn_seconds = 3600.0  # how long an address signed from now on is good for,
        self.cdn_uses: int | None = None  # and how many requests
        self.requests: Counter[str] = Counter()
        self.sent: Counter[str] = (
            Counter()
        )  # bytes of the bodies, by file, at both addresses together
        self.authorizations: list[
            tuple[str, str]
        ] = []  # address (`url` or `cdn_url`) and Authorization header
        # The most requests in progress at the same time at one of the addresses: never more than
        # the client has open, and where answers are quick perhaps fewer, since a request is over
        # just before its last bytes leave.
        self.most_at_once = 0
        self._busy: Counter[str] = Counter()
        self._signed: dict[str, Signed] = {}
        self._xet: dict[str, str] = {}  # Xet's hash of a file, by its etag
        self.xet_url = ""  # of the Xet store

    def store_by_xet(self, store: Path, *paths: Path) -> None:
        """Puts files into a Xet store on disk, by `hf_xet` itself.

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
            self._xet[etag_of(path, lfs=True)] = upload.result().xet_info.hash

    def expire(self) -> None:
        """From now on the CDN refuses all addresses that were signed so far."""
        self._signed.clear()

    @contextmanager
    def answering(self, address: str, key: str, authorization: str | None) -> Iterator[Exchange]:
        """Counts a request while it is answered, and tells what is to go wrong with it."""
        fault, busy = Fault("none"), self._busy
        with self._lock:
            self.requests[key] += 1
            busy[address] += 1
            self.most_at_once = max(self.most_at_once, busy[address])
            if authorization is not None:
                self.authorizations.append((address, authorization))
            for i, candidate in enumerate(self.faults):
                if fnmatchcase(key, candidate.request):
                    fault = candidate
                    if fault.times is not None:
                        self.faults[i : i + 1] = (
                            [replace(fault, times=fault.times - 1)] if fault.times > 1 else []
                        )
                    break
        try:
            yield Exchange(fault, self.released, self.sent)
        finally:
            with self._lock:
                busy[address] -= 1

    def count_sent(self, sent: Counter[str], file: str, count: int) -> None:
        with self._lock:
            sent[file] += count

    def respond(self, target: str, authorization: str | None) -> Answer:
        """Answers as the Hub does."""
        path = urlsplit(target).path
        if XET_TOKEN.fullmatch(path):
            expires = str(int(time.time()) + 3600)
            how = {
                "Cas-Url": self.xet_url,
                "Access-Token": "xet-secret",
                "Token-Expiration": expires,
            }
            return Answer(200, {f"X-Xet-{name}": value for name, value in how.items()}, b"{}")
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
        refusal = repository.refusal(token, for_files="file" in asked)
        if refusal:
            return refusal
        found = repository.find(asked.get("revision", "main"))
        if found is None:
            return refuse(404, "RevisionNotFound", "Revision not found")
        commit, folder = found
        if "file" in asked:
            return self._resolve(asked["name"], repository, commit, folder, asked["file"])
        return _list(repository, commit, folder, asked)

    def _resolve(
        self, name: str, repository: Repository, commit: str, folder: Path, path: str
    ) -> Answer:
        """A file, or where the CDN has it."""
        file = folder / path
        if not file.is_file():
            return refuse(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit)
        lfs = repository.on_cdn(path)
        etag, headers = etag_of(file, lfs=lfs), {"X-Repo-Commit": commit} | self._accept_ranges()
        if not lfs:
            return Answer(200, headers | {"ETag": f'"{etag}"'}, file, path)
        expires = time.time() + self.cdn_seconds
        target = f"/{etag}/{quote(path)}?Expires={expires:.0f}&Signature={uuid.uuid4().hex}"
        with self._lock:
            self._signed[target] = Signed(file, expires, self.cdn_uses)
        linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(file.stat().st_size)}
        if etag in self._xet:
            # The client keeps what is told there, by this address: another store has another.
            token = f"{self.url}/api/models/{name}/xet-read-token/{commit}?{quote(self.xet_url, safe='')}"
            linked |= {"X-Xet-Hash": self._xet[etag], "Link": f'<{token}>; rel="xet-auth"'}
        # With a body, whose length is not the file's.
        return Answer(
            302, headers | linked | {"Location": self.cdn_url + target}, f"Found: {target}".encode()
        )

    def respond_cdn(self, target: str, authorization: str | None) -> Answer:
        """Answers as S3 or CloudFront does.

        To whoever has a signed address, and nothing else to show.
        """
        if authorization is not None:
            return Answer(
                400, {}, b"<Error><Message>Only one auth mechanism allowed</Message></Error>"
            )
        with self._lock:
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
        }
        match = SIGNED.fullmatch(urlsplit(target).path)
        return Answer(
            200,
            headers | self._accept_ranges(),
            signed.file,
            unquote(match["file"]) if match else "",
        )

    def _accept_ranges(self) -> dict[str, str]:
        return {"Accept-Ranges": "bytes"} if self.ranges else {}


def _list(repository: Repository, commit: str, folder: Path, asked: Mapping[str, str]) -> Answer:
    """`/api/models/<name>[/revision/<revision>]`, or `.../tree/<revision>[/<folder>]`, always with subfolders."""
    found: object
    if asked.get("what") == "tree":
        below = asked["below"] + "/" if "below" in asked else ""
        found = [
            {
                "type": "file",
                "path": path,
                "size": file.stat().st_size,
                "oid": etag_of(file, lfs=False),
            }
            for path, file in files(folder).items()
            if path.startswith(below)
        ]
        if below and not found:
            return refuse(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit)
    else:
        found = {
            "id": asked["name"],
            "sha": commit,
            "private": repository.private,
            "gated": "manual" if repository.gated else False,
            "disabled": repository.disabled,
            "tags": [],
            "siblings": [{"rfilename": path} for path in files(folder)],
        }
    return Answer(
        200,
        {"Content-Type": "application/json", "X-Repo-Commit": commit},
        json.dumps(found).encode(),
    )


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
        self.hub, self.respond, self.pattern, self.prefix = hub, respond, pattern, prefix
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
    disable_nagle_algorithm = (
        True  # headers and body are two writes: without, each answer waits for the client's ACK
    )

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, hub, asked = self.server, self.server.hub, self.headers.get("Range")
        method = "RANGE" if self.command == "GET" and asked is not None else self.command
        key, authorization = server.key(method, self.path), self.headers.get("Authorization")
        with ExitStack() as progress:
            exchange = progress.enter_context(hub.answering(server.url, key, authorization))
            answer = server.respond(self.path, authorization)
            if method == "RANGE" and asked is not None and hub.ranges and answer.file:
                answer = answer.part(asked)
            if then := hub.after.pop(key, None):
                then()
            if not self.transfer(answer.disturbed(exchange.fault), exchange, progress):
                self.close_connection = True
        if exchange.fault.kind == "reset":
            self.reset(exchange.released)

    def transfer(self, answer: Answer, exchange: Exchange, progress: ExitStack) -> bool:
        """Sends the answer, as far as the fault lets it; False where that was not to the end."""
        fault, released = exchange.fault, exchange.released
        chunked, slow = "Transfer-Encoding" in answer.headers, fault.kind == "slow"
        stop = answer.stop if self.command == "GET" else answer.first
        middle = min(answer.first + (fault.after or 0), stop)

        def ends_here() -> bool:
            if fault.kind == "stall":
                return released.wait(fault.seconds)  # if released, then the test is over
            return fault.kind in ("reset", "close")

        def write(first: int, piece: bytes) -> None:
            # Counted first: whoever has the last byte finds it counted, and the request no longer
            # in progress.
            if first + len(piece) == stop:
                progress.close()
            if answer.file:
                self.server.hub.count_sent(exchange.sent, answer.file, len(piece))
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)

        if fault.after is None and ends_here():
            return False
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.first == stop:
            progress.close()
        self.end_headers()
        for first, piece in answer.read(answer.first, middle):
            write(first, piece)
        if fault.after is not None and ends_here():
            return False
        for first, piece in answer.read(middle, stop, SLOW_CHUNK if slow else CHUNK):
            write(first, piece)
            if slow and released.wait(fault.seconds or 0.01):
                return False
        if chunked and self.command == "GET":
            self.wfile.write(b"0\r\n\r\n")
        return True

    def reset(self, released: threading.Event) -> None:
        """Closes with RST in place of FIN, after all that was sent has arrived.

        RST throws away what is on its way.
        """
        while any(fcntl.ioctl(self.connection, termios.TIOCOUTQ, bytes(4))) and not released.wait(
            0.001
        ):
            pass
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()  # which would hold the socket open
        self.connection.close()

"""A HuggingFace Hub on loopback, for the real `huggingface_hub` client: repositories are folders of this machine."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    folder: Path
    gated: bool = False
    revisions: tuple[str, ...] = ("main", "v1")

    @property
    def commit(self) -> str:
        """Forty hexadecimal digits that change with the contents."""
        digest = hashlib.sha1(usedforsecurity=False)
        for path in sorted(self.folder.iterdir()):
            digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
        return digest.hexdigest()


@dataclass
class Hub:
    """The server. `repositories` may be changed while it runs; `requests` counts by method and file, where RANGE is a
    GET of a part, and `sent` counts the bytes of a file that were sent. `broken` answers with errors of its own;
    `breaks_off` names the request, as `requests` does, whose connection breaks in the middle.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    broken: bool = False
    breaks_off: str = ""

    def __post_init__(self) -> None:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer()

            def do_GET(self) -> None:
                self.answer()

            def log_message(self, *args: Any) -> None:  # noqa: ANN401
                pass

            def answer(self) -> None:
                if hub.breaks_off == f"{self.command} {self.path.rsplit('/', 1)[-1]}":
                    self.connection.close()
                    return
                part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                method = "RANGE" if part else self.command
                status, headers, found = hub.respond(urlsplit(self.path).path, method)
                body = found.read_bytes() if isinstance(found, Path) else found
                if part and status == 200:
                    first, whole = int(part[1]), len(body)
                    body = body[first : int(part[2]) + 1]
                    status, headers["Content-Range"] = 206, f"bytes {first}-{first + len(body) - 1}/{whole}"
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    hub.sent[self.path.rsplit("/", 1)[-1]] += len(body)
                    self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def respond(self, path: str, method: str) -> tuple[int, dict[str, str], bytes | Path]:
        """Answers as the Hub does: status, headers, body."""
        if self.broken:
            return 501, {}, b""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            if name not in self.repositories:
                return 404, {"X-Error-Code": "RepoNotFound"}, b""
            files = sorted(self.repositories[name].folder.iterdir())
            tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0"} for f in files]
            return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
        if len(parts) < 5 or parts[2] != "resolve":
            return 200, {}, b""
        name, revision, filename = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        self.requests[f"{method} {filename}"] += 1
        if name not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        repository = self.repositories[name]
        if repository.gated:
            return 403, {"X-Error-Code": "GatedRepo", "X-Repo-Commit": repository.commit}, b""
        if revision not in (*repository.revisions, repository.commit):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        file = repository.folder / filename
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repository.commit}, b""
        etag = hashlib.sha256(file.read_bytes()).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": repository.commit}, file

"""One repository in the cache of the Hub's client.

What it has, what it knows to be absent, and how a file gets in.

The layout is the client's own (https://huggingface.co/docs/huggingface_hub/guides/manage-cache):
`refs/<branch>` holds a commit, `snapshots/<commit>/<file>` is a link to `blobs/<etag>`, or the file
itself where there are no links, and `.no_exist/<commit>/<file>` says that there is no such file. A
blob may be a link in turn, into a store that all repositories share; what is there belongs to all
of them, and is never touched here.

The folder `.siglip_port` beside them is ours, and goes with the repository: towers (see
`siglip_port.hub.partial_download`), and, by commit, the headers and the receipts of files.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from siglip_port.checkpoint.formats import SUFFIXES

BLOCK = 16 * 1024 * 1024
"""Bytes of a whole file that are hashed at once, and noted in its receipt."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Receipt:
    """What a whole file was when it was found to be as the Hub says.

    Attributes:
        etag: the Hub's identifier of the contents.
        block: how many bytes are hashed at once.
        checksums: SHA-256 of each of these blocks.
    """

    etag: str
    block: int
    checksums: tuple[str, ...]


class RepositoryCache:
    """The folder of a repository in the Hub's cache.

    Args:
        root: the cache; `~` is the user's folder.
        name: the Hub id.

    Attributes:
        folder: of the repository.
        own: the part of it that is ours.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.folder = root.expanduser() / f"models--{name.replace('/', '--')}"
        self.own = self.folder / ".siglip_port"

    def commit_of(self, revision: str) -> str | None:
        """Returns the commit that a branch or tag had when it was last asked for."""
        with contextlib.suppress(OSError, ValueError):
            commit = self._ref(revision).read_text(encoding="ascii").strip()
            return commit if _COMMIT.fullmatch(commit) else None
        return None

    def find(self, commit: str, filename: str) -> Path | None:
        """Returns where a whole file lies."""
        path = self._snapshot(commit, filename)
        try:
            return path if path.is_file() else None
        except OSError:  # a link to itself, say
            return None

    def knows_absent(self, commit: str, filename: str) -> bool:
        """Whether the commit has no such file, as far as the cache knows."""
        with contextlib.suppress(OSError):
            return (self.folder / ".no_exist" / commit / filename).is_file()
        return False

    def knows(self, commit: str, filename: str) -> bool:
        """Whether the Hub need not be asked for the file: it is here, or known to be absent."""
        return self.find(commit, filename) is not None or self.knows_absent(commit, filename)

    def has_weights(self, commit: str) -> bool:
        """Whether there are weights of the commit.

        Whole files, or a tower that was fetched alone.
        """
        whole = any(
            path.suffix in SUFFIXES for path in self._entries(self.folder / "snapshots" / commit)
        )
        headers = any(path.suffix == ".header" for path in self._entries(self.own / commit))
        return whole or (headers and any(self.own.glob("*-tower-*.safetensors")))

    def note_commit(self, revision: str, commit: str) -> None:
        """Notes what a branch or tag is, where the cache can be written."""
        if revision != commit and self.commit_of(revision) != commit:
            with contextlib.suppress(OSError, ValueError):
                _write(self._ref(revision), commit.encode())

    def note_absent(self, commit: str, filename: str) -> None:
        """Notes that the commit has no such file, where the cache can be written."""
        with contextlib.suppress(OSError):
            path = self.folder / ".no_exist" / commit / filename
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def blob(self, etag: str) -> Path:
        """Returns where the bytes are kept that the Hub calls by this identifier."""
        plain = (
            etag
            if re.fullmatch(r"\w[\w.-]{0,99}", etag)
            else hashlib.sha256(etag.encode()).hexdigest() + "-etag"
        )
        return self.folder / "blobs" / plain

    def etag_of(self, commit: str, filename: str) -> str | None:
        """Returns the Hub's identifier of a file.

        Told by its receipt, or by the name of the blob that it links to.
        """
        path = self._snapshot(commit, filename)
        with contextlib.suppress(OSError):
            target = path.readlink()
            return target.name if target.parent.name == "blobs" else None
        receipt = self.receipt(commit, filename)
        return None if receipt is None else receipt.etag

    def receipt(self, commit: str, filename: str) -> Receipt | None:
        """Returns what was noted of a whole file; None where nothing was, or it cannot be read."""
        try:
            document: Any = json.loads(self._receipt(commit, filename).read_bytes())
            receipt = Receipt(document["etag"], document["block"], tuple(document["checksums"]))
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return receipt if receipt.block == BLOCK and isinstance(receipt.etag, str) else None

    def note_receipt(self, commit: str, filename: str, receipt: Receipt) -> None:
        """Notes what a whole file is, where the cache can be written."""
        with contextlib.suppress(OSError):
            _write(self._receipt(commit, filename), json.dumps(asdict(receipt)).encode())

    def put(self, commit: str, filename: str, etag: str, temporary: Path) -> Path:
        """Moves a whole file into the cache, in place of what was there under its name.

        Args:
            commit: of the repository.
            filename: in the repository.
            etag: the Hub's identifier of its contents, which have been compared with it.
            temporary: the file, in the repository's own folder.

        Raises:
            OSError: the cache cannot be written.
        """
        blob = self.blob(etag)
        blob.parent.mkdir(parents=True, exist_ok=True)
        temporary.replace(blob)
        path = self.link(commit, filename, etag)
        if not path.is_symlink():
            blob.unlink()  # of which it is a copy
        return path

    def link(self, commit: str, filename: str, etag: str) -> Path:
        """Makes a blob the file of a commit: by a link, or, where there are none, by a copy.

        Raises:
            OSError: the cache cannot be written.
        """
        from huggingface_hub import constants

        path, blob = self._snapshot(commit, filename), self.blob(etag)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = _beside(path)
        try:
            if getattr(
                constants, "HF_HUB_DISABLE_SYMLINKS", False
            ):  # not known to the client before 1.0.1
                raise NotImplementedError
            unfinished.symlink_to(os.path.relpath(blob, path.parent))
        except (OSError, NotImplementedError):
            _copy(blob, unfinished)
        try:
            unfinished.replace(path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
        return path

    def set_aside(self, commit: str, filename: str, etag: str) -> list[Path]:
        """Moves files out of the way that stand where one is to be put, and are not what they should be.

        They stay in our own folder: they may be somebody's. Links are left where they are, and
        replaced.

        Args:
            commit: of the repository.
            filename: in the repository.
            etag: the Hub's identifier of the contents that should be there.

        Returns:
            Where they are now.
        """
        moved = []
        for path in (self.blob(etag), self._snapshot(commit, filename)):
            if path.is_file() and not path.is_symlink():
                aside = self.own / f"{path.name}.damaged"
                path.replace(aside)
                moved.append(aside)
        return moved

    def commits(self) -> set[str]:
        """Returns the commits of which the cache has files, or which a branch or tag is."""
        found = {path.name for path in self._entries(self.folder / "snapshots")}
        for path in (self.folder / "refs").rglob("*"):
            with contextlib.suppress(OSError, ValueError):
                found.add(path.read_text(encoding="ascii").strip())
        return found

    def own_commits(self) -> Iterator[Path]:
        """Yields our own folders of commits."""
        for path in self._entries(self.own):
            if _COMMIT.fullmatch(path.name):
                yield path

    def header_place(self, commit: str, filename: str) -> Path:
        """Returns where the header of a weights file is kept."""
        return self.own / commit / f"{filename}.header"

    def _ref(self, revision: str) -> Path:
        if ".." in revision.split("/"):
            raise ValueError("a name that leads elsewhere")
        return self.folder / "refs" / revision.lstrip("/")

    def _receipt(self, commit: str, filename: str) -> Path:
        return self.own / commit / f"{filename}.receipt"

    def _snapshot(self, commit: str, filename: str) -> Path:
        return self.folder / "snapshots" / commit / filename

    @staticmethod
    def _entries(folder: Path) -> list[Path]:
        with contextlib.suppress(OSError):
            return list(folder.iterdir())
        return []


def checksums(path: Path, spans: Iterable[tuple[int, int]]) -> list[str]:
    """Returns the SHA-256 of parts of a file, with all cores.

    Args:
        path: of the file.
        spans: first byte and number of bytes of each part.

    Raises:
        OSError: it cannot be read.
    """

    def checksum(span: tuple[int, int]) -> str:
        with path.open("rb") as file:
            file.seek(span[0])
            return hashlib.sha256(file.read(span[1])).hexdigest()

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(checksum, spans))


def verified(path: Path, etag: str) -> Receipt | None:
    """Compares a whole file with the Hub's identifier of it.

    That is the SHA-256 of large files; of others git's own hash, or, from some proxies, SHA-1.
    There are proxies whose identifier is no hash at all, and tells nothing of the file.

    Args:
        path: of the file.
        etag: the Hub's identifier.

    Returns:
        What it is; None where it is not what it should be.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with ThreadPoolExecutor(
        1
    ) as pool:  # beside the hash of the whole, which one core can take at a time
        blocks = pool.submit(checksums, path, [(first, BLOCK) for first in range(0, size, BLOCK)])
        right = _is(path, size, etag)
    return Receipt(etag, BLOCK, tuple(blocks.result())) if right else None


def _is(path: Path, size: int, etag: str) -> bool:
    with path.open("rb") as file:
        if _SHA256.fullmatch(etag):
            return hashlib.file_digest(file, "sha256").hexdigest() == etag
        if not _COMMIT.fullmatch(etag):
            return True
        git, plain = (
            hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False),
            hashlib.sha1(usedforsecurity=False),
        )
        while chunk := file.read(1 << 20):
            git.update(chunk)
            plain.update(chunk)
        return etag in (git.hexdigest(), plain.hexdigest())


def is_still(path: Path, receipt: Receipt, spans: Iterable[tuple[int, int]]) -> bool:
    """Whether parts of a whole file are what they were.

    Args:
        path: of the file.
        receipt: what was noted of it.
        spans: first byte, and one after the last, of each part.

    Raises:
        OSError: it cannot be read.
    """
    numbers = {
        n
        for first, stop in spans
        for n in range(first // BLOCK, (max(stop, first + 1) - 1) // BLOCK + 1)
    }
    if not numbers or max(numbers) >= len(receipt.checksums):
        return False
    wanted = sorted(numbers)
    return checksums(path, [(n * BLOCK, BLOCK) for n in wanted]) == [
        receipt.checksums[n] for n in wanted
    ]


def _copy(blob: Path, path: Path) -> None:
    """Without a second time the bytes, where the file system can give a file two names."""
    try:
        path.hardlink_to(blob)
    except OSError:
        shutil.copyfile(blob, path)


_counter = itertools.count()


def _beside(path: Path) -> Path:
    """A name for what is not finished, which no other process or thread takes."""
    return path.with_name(
        f".{path.name}.{os.getpid()}-{threading.get_ident()}-{next(_counter)}.siglip_port"
    )


def _write(path: Path, content: bytes) -> None:
    """Writes a small file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _beside(path)
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)

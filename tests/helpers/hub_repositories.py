"""Repositories of a Hub on loopback: local folders."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

MAX_HASHED_BYTES = 64 << 20
"""Larger files, such as sparse files of many GB, get an ETag that is not a hash."""


@dataclass
class Repository:
    """A model repository: `main` and `tags` are its first commit, until `push` moves `main`.

    Attributes:
        folder: Folder of `main`.
        gated: Whether only `readers` can download its files.
        private: Whether it exists only for `readers`.
        disabled: Whether it is disabled.
        readers: Tokens with access to a gated or private repository.
        tags: Tags of the first commit.
        cdn: Glob of the files that the CDN serves, as LFS files on the real Hub; "" for none.
    """

    folder: Path
    gated: bool = False
    private: bool = False
    disabled: bool = False
    readers: tuple[str, ...] = ()
    tags: tuple[str, ...] = ("v1",)
    cdn: str = "*.safetensors"

    def __post_init__(self) -> None:
        self._commits = [self.folder]
        self._refs = dict.fromkeys(("main", *self.tags), 0)

    def push(self, folder: Path) -> None:
        """Move `main` to another folder; tags and the old commit are still served."""
        self.folder = folder
        self._commits.append(folder)
        self._refs["main"] = len(self._commits) - 1

    @property
    def commit(self) -> str:
        """The commit of `main`, which changes with the contents."""
        return self._commit(self._refs["main"])

    def _commit(self, number: int) -> str:
        digest = hashlib.sha1(b"%d" % number, usedforsecurity=False)
        for path, file in files(self._commits[number]).items():
            digest.update(f"{path} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
        return digest.hexdigest()

    def find(self, revision: str) -> tuple[str, Path] | None:
        """Return commit and folder of a branch, tag or commit; None if it does not exist."""
        for number, folder in enumerate(self._commits):
            commit = self._commit(number)
            if self._refs.get(revision) == number or revision == commit:
                return commit, folder
        return None

    def on_cdn(self, path: str) -> bool:
        return fnmatchcase(path, self.cdn)


def files(folder: Path) -> dict[str, Path]:
    """Return all files below a folder, by their paths in the repository."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path for path in paths}


def etag_of(file: Path, *, lfs: bool) -> str:
    """Return the ETag of the Hub: the SHA-256 of LFS files, the git blob hash of others."""
    stat = file.stat()
    return _etag(file, stat.st_size, stat.st_mtime_ns, stat.st_ino, lfs)


@cache
def _etag(file: Path, size: int, mtime_ns: int, inode: int, lfs: bool) -> str:
    if size > MAX_HASHED_BYTES:
        description = f"{file.name} {size}".encode()
        return hashlib.sha1(description, usedforsecurity=False).hexdigest() + "-large"
    with file.open("rb") as opened:
        if lfs:
            return hashlib.file_digest(opened, hashlib.sha256).hexdigest()
        blob = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        return hashlib.file_digest(opened, lambda: blob).hexdigest()

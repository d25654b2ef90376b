"""A repository in the cache of `huggingface_hub`.

The layout is that of `huggingface_hub`:
https://huggingface.co/docs/huggingface_hub/guides/manage-cache. `refs/<branch>` contains a commit,
`snapshots/<commit>/<file>` is a symlink to `blobs/<etag>`, or the file itself without symlinks, and
`.no_exist/<commit>/<file>` marks a file that does not exist. A blob may be a symlink into a store
that all repositories share, which this package never writes to.

The folder `.siglip_port` next to them contains the partial downloads of this package (vision
encoders, see `siglip_port.hub.partial_download`), and, by commit, headers and receipts of files. It
is deleted along with the repository.
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
from dataclasses import asdict, dataclass
from pathlib import Path

from siglip_port.checkpoint.formats import (
    SUFFIXES,
    Header,
    UnreadableFileError,
    parse_header,
    read_header,
)
from siglip_port.hub.integrity import BLOCK_BYTES, Receipt

COMMIT = re.compile(r"[0-9a-f]{40}")

VISION_FILES = "*.safetensors"
"""Glob of the partial downloads in `.siglip_port`."""

_SAFE_FILENAME = re.compile(r"\w[\w.-]{0,99}")


@dataclass(frozen=True)
class CachedHeader:
    """The header of a weights file that is not cached itself.

    Attributes:
        header: Header of the whole file.
        etag: ETag of the whole file.
    """

    header: Header
    etag: str


class RepositoryCache:
    """The folder of a repository in the Hub's cache.

    Args:
        root: Cache folder.
        name: Hub id.

    Attributes:
        folder: Folder of the repository.
        own_folder: Subfolder of this package, `.siglip_port`.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.folder = root / f"models--{name.replace('/', '--')}"
        self.own_folder = self.folder / ".siglip_port"

    # --- commits ----------------------------------------------------------------------------------

    def commit_of(self, revision: str) -> str | None:
        """Return the cached commit of a branch or tag; None if there is none."""
        with contextlib.suppress(OSError, ValueError):
            commit = self._ref(revision).read_text(encoding="ascii").strip()
            return commit if COMMIT.fullmatch(commit) else None
        return None

    def set_commit(self, revision: str, commit: str) -> None:
        """Save the commit of a branch or tag, if the cache is writable."""
        if revision == commit or self.commit_of(revision) == commit:
            return
        with contextlib.suppress(OSError, ValueError):
            write_file(self._ref(revision), commit.encode())

    def commits(self) -> set[str]:
        """Return the commits with cached files or with a cached branch or tag."""
        commits = {path.name for path in list_folder(self.folder / "snapshots")}
        for path in (self.folder / "refs").rglob("*"):
            with contextlib.suppress(OSError, ValueError):
                commits.add(path.read_text(encoding="ascii").strip())
        return commits

    # --- files ------------------------------------------------------------------------------------

    def find(self, commit: str, filename: str) -> Path | None:
        """Return the path of a whole file; None if it is not cached."""
        path = self.snapshot(commit, filename)
        try:
            return path if path.is_file() else None
        except OSError:  # such as a symlink loop
            return None

    def is_absent(self, commit: str, filename: str) -> bool:
        """Return whether the cache records that the commit has no such file."""
        with contextlib.suppress(OSError):
            return (self.folder / ".no_exist" / commit / filename).is_file()
        return False

    def set_absent(self, commit: str, filename: str) -> None:
        """Record that the commit has no such file, if the cache is writable."""
        with contextlib.suppress(OSError):
            path = self.folder / ".no_exist" / commit / filename
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def can_answer(self, commit: str, filename: str) -> bool:
        """Return whether the file is cached or known to be absent."""
        return self.find(commit, filename) is not None or self.is_absent(commit, filename)

    def has_weights(self, commit: str) -> bool:
        """Return whether weights of the commit are cached, whole or partial."""
        if any(name.endswith(SUFFIXES) for name in self.files(commit)):
            return True
        has_header = any((self.own_folder / commit).rglob("*.header"))
        return has_header and any(self.own_folder.glob(VISION_FILES))

    def files(self, commit: str) -> list[str]:
        """Return the names of the cached whole files of a commit."""
        if not COMMIT.fullmatch(commit):
            return []
        folder = self.folder / "snapshots" / commit
        paths = [path for path in folder.rglob("*") if not path.is_dir()]
        return sorted(path.relative_to(folder).as_posix() for path in paths)

    def snapshot(self, commit: str, filename: str) -> Path:
        """Return the path of a file of a commit, cached or not."""
        return self.folder / "snapshots" / commit / filename

    def blob(self, etag: str) -> Path:
        """Return the path of the blob with this ETag, cached or not."""
        name = etag
        if not _SAFE_FILENAME.fullmatch(etag):
            name = hashlib.sha256(etag.encode()).hexdigest() + "-etag"
        return self.folder / "blobs" / name

    # --- metadata ---------------------------------------------------------------------------------

    def etag_of(self, commit: str, filename: str) -> str | None:
        """Return the ETag of a cached file: the name of its blob, or that in its receipt."""
        path = self.snapshot(commit, filename)
        with contextlib.suppress(OSError):
            target = path.readlink()
            return target.name if target.parent.name == "blobs" else None
        receipt = self.receipt(commit, filename)
        return None if receipt is None else receipt.etag

    def receipt(self, commit: str, filename: str) -> Receipt | None:
        """Return the receipt of a whole file; None if it does not exist or is invalid."""
        path = self.own_folder / commit / f"{filename}.receipt"
        try:
            document = json.loads(path.read_bytes())
            receipt = Receipt(document["etag"], document["block"], tuple(document["checksums"]))
        except (OSError, ValueError, TypeError, KeyError):
            return None
        is_valid = receipt.block == BLOCK_BYTES and isinstance(receipt.etag, str)
        return receipt if is_valid else None

    def save_receipt(self, commit: str, filename: str, receipt: Receipt) -> None:
        """Save the receipt of a whole file, if the cache is writable."""
        path = self.own_folder / commit / f"{filename}.receipt"
        with contextlib.suppress(OSError):
            write_file(path, json.dumps(asdict(receipt)).encode())

    def header(self, commit: str, filename: str) -> CachedHeader | None:
        """Return the cached header of a weights file; None if it does not exist or is damaged."""
        return read_cached_header(self.own_folder / commit / f"{filename}.header")

    def save_header(self, commit: str, filename: str, header: CachedHeader, content: bytes) -> None:
        """Cache the header of a weights file, if the cache is writable.

        Args:
            commit: Commit of the repository.
            filename: Name in the repository.
            header: Header of the file.
            content: JSON bytes of the header.
        """
        description = {
            "etag": header.etag,
            "size": header.header.size,
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        path = self.own_folder / commit / f"{filename}.header"
        with contextlib.suppress(OSError):
            write_file(path, json.dumps(description).encode() + b"\n" + content)

    # --- writing ----------------------------------------------------------------------------------

    def add(self, commit: str, filename: str, etag: str, staged: Path) -> Path:
        """Move a whole file into the cache, replacing an existing one.

        Args:
            commit: Commit of the repository.
            filename: Name in the repository.
            etag: ETag that the contents were compared with.
            staged: Staged file, on the same file system.

        Raises:
            OSError: The cache cannot be written.
        """
        blob = self.blob(etag)
        blob.parent.mkdir(parents=True, exist_ok=True)
        staged.replace(blob)
        path = self.link(commit, filename, etag)
        if not path.is_symlink():
            blob.unlink()  # without symlinks, the snapshot is a copy
        return path

    def link(self, commit: str, filename: str, etag: str) -> Path:
        """Link a blob as the file of a commit; without symlinks, copy it.

        Raises:
            OSError: The cache cannot be written.
        """
        from huggingface_hub import constants

        path = self.snapshot(commit, filename)
        blob = self.blob(etag)
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = staging_path(path)
        try:
            # new in huggingface_hub 1.0.1
            if getattr(constants, "HF_HUB_DISABLE_SYMLINKS", False):
                raise NotImplementedError
            staged.symlink_to(os.path.relpath(blob, path.parent))
        except (OSError, NotImplementedError):
            copy_file(blob, staged)
        try:
            staged.replace(path)
        except OSError:
            staged.unlink(missing_ok=True)
            raise
        return path

    def set_aside(self, commit: str, filename: str, etag: str) -> list[Path]:
        """Rename existing files that a download is about to replace.

        They do not match the ETag, but may be useful to the user, so they are moved to
        `.siglip_port/*.damaged`. Symlinks are not moved.

        Args:
            commit: Commit of the repository.
            filename: Name in the repository.
            etag: ETag of the download.

        Returns:
            The new paths.
        """
        moved = []
        for path in (self.blob(etag), self.snapshot(commit, filename)):
            if path.is_file() and not path.is_symlink():
                backup = self.own_folder / f"{path.name}.damaged"
                path.replace(backup)
                moved.append(backup)
        return moved

    def prune(self, commit: str, vision_file: Path) -> None:
        """Remove partial downloads of commits that were deleted, for example by `hf cache rm`.

        Args:
            commit: Commit that is being loaded.
            vision_file: Partial download of this commit, which is not removed.
        """
        commits = self.commits() | {commit}
        etags: set[str] = set()
        for folder in list_folder(self.own_folder):
            if not COMMIT.fullmatch(folder.name):
                continue
            if folder.name not in commits:
                shutil.rmtree(folder, ignore_errors=True)
                continue
            headers = [read_cached_header(path) for path in folder.rglob("*.header")]
            etags.update(header.etag for header in headers if header is not None)
        for path in set(self.own_folder.glob(VISION_FILES)) - {vision_file}:
            with contextlib.suppress(OSError, ValueError, KeyError, UnreadableFileError):
                sources = json.loads(read_header(path).metadata["files"])
                if not etags.issuperset(sources.values()):
                    path.unlink(missing_ok=True)
                    path.with_suffix(".lock").unlink(missing_ok=True)

    def _ref(self, revision: str) -> Path:
        if ".." in revision.split("/"):
            raise ValueError(f"invalid revision {revision!r}")
        return self.folder / "refs" / revision.lstrip("/")


def read_cached_header(path: Path) -> CachedHeader | None:
    """Read a file of `save_header`; None if it does not exist or is damaged."""
    try:
        first_line, _, content = path.read_bytes().partition(b"\n")
        description = json.loads(first_line)
        if hashlib.sha256(content).hexdigest() != description["sha256"]:
            return None
        header = parse_header(content, description["size"])
        return CachedHeader(header, str(description["etag"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def list_folder(folder: Path) -> list[Path]:
    """Return the entries of a folder; empty if it cannot be read."""
    with contextlib.suppress(OSError):
        return list(folder.iterdir())
    return []


def copy_file(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it if the file system has no hard links."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def write_file(path: Path, content: bytes) -> None:
    """Write a small file atomically, and create its folder.

    Raises:
        OSError: The file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = staging_path(path)
    try:
        staged.write_bytes(content)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


_counter = itertools.count()


def staging_path(path: Path) -> Path:
    """Return a temporary path next to `path`, unique across processes and threads."""
    number = next(_counter)
    return path.with_name(
        f".{path.name}.{os.getpid()}-{threading.get_ident()}-{number}.siglip_port"
    )

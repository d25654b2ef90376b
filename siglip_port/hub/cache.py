"""One repository in the cache of the Hub's client.

What it has, what it knows to be absent, and how a file gets in.

The layout is the client's own (https://huggingface.co/docs/huggingface_hub/guides/manage-cache):
`refs/<branch>` holds a commit, `snapshots/<commit>/<file>` is a link to `blobs/<etag>`, or the file
itself where there are no links, and `.no_exist/<commit>/<file>` says that there is no such file. A
blob may be a link in turn, into a store that all repositories share; what is there belongs to all
of them, and is never touched here.

The folder `.siglip_port` beside them is ours, and goes with the repository: vision encoders that
were fetched alone (see `siglip_port.hub.partial_download`), and, by commit, the headers and the
receipts of files.
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

VISION_FILES = "*-tower-*.safetensors"
"""Names of the files that hold a vision encoder that was fetched alone."""

_SAFE_FILENAME = re.compile(r"\w[\w.-]{0,99}")


@dataclass(frozen=True)
class CachedHeader:
    """The header of a weights file that is not here itself.

    Attributes:
        header: of the file.
        etag: the Hub's identifier of the file's contents.
    """

    header: Header
    etag: str


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

    # --- commits ----------------------------------------------------------------------------------

    def commit_of(self, revision: str) -> str | None:
        """Return the commit that a branch or tag had when it was last asked for."""
        with contextlib.suppress(OSError, ValueError):
            commit = self._ref(revision).read_text(encoding="ascii").strip()
            return commit if COMMIT.fullmatch(commit) else None
        return None

    def set_commit(self, revision: str, commit: str) -> None:
        """Note what a branch or tag is, where the cache can be written."""
        if revision == commit or self.commit_of(revision) == commit:
            return
        with contextlib.suppress(OSError, ValueError):
            write_file(self._ref(revision), commit.encode())

    def commits(self) -> set[str]:
        """Return the commits of which the cache has files, or which a branch or tag is."""
        commits = {path.name for path in list_folder(self.folder / "snapshots")}
        for path in (self.folder / "refs").rglob("*"):
            with contextlib.suppress(OSError, ValueError):
                commits.add(path.read_text(encoding="ascii").strip())
        return commits

    # --- files ------------------------------------------------------------------------------------

    def find(self, commit: str, filename: str) -> Path | None:
        """Return where a whole file lies."""
        path = self.snapshot(commit, filename)
        try:
            return path if path.is_file() else None
        except OSError:  # a link to itself, say
            return None

    def is_absent(self, commit: str, filename: str) -> bool:
        """Whether the commit has no such file, as far as the cache knows."""
        with contextlib.suppress(OSError):
            return (self.folder / ".no_exist" / commit / filename).is_file()
        return False

    def set_absent(self, commit: str, filename: str) -> None:
        """Note that the commit has no such file, where the cache can be written."""
        with contextlib.suppress(OSError):
            path = self.folder / ".no_exist" / commit / filename
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def can_answer(self, commit: str, filename: str) -> bool:
        """Whether the Hub need not be asked for the file: it is here, or known to be absent."""
        return self.find(commit, filename) is not None or self.is_absent(commit, filename)

    def has_weights(self, commit: str) -> bool:
        """Whether there are weights of the commit.

        Whole files, or a vision encoder that was fetched alone.
        """
        for path in list_folder(self.folder / "snapshots" / commit):
            if path.suffix in SUFFIXES:
                return True
        has_header = any(path.suffix == ".header" for path in list_folder(self.own / commit))
        return has_header and any(self.own.glob(VISION_FILES))

    def snapshot(self, commit: str, filename: str) -> Path:
        """Return the place of a file of a commit."""
        return self.folder / "snapshots" / commit / filename

    def blob(self, etag: str) -> Path:
        """Return the place of the bytes that the Hub calls by this identifier."""
        name = etag
        if not _SAFE_FILENAME.fullmatch(etag):
            name = hashlib.sha256(etag.encode()).hexdigest() + "-etag"
        return self.folder / "blobs" / name

    # --- what files are ---------------------------------------------------------------------------

    def etag_of(self, commit: str, filename: str) -> str | None:
        """Return the Hub's identifier of a file.

        By its receipt, or by the name of the blob that it links to.
        """
        path = self.snapshot(commit, filename)
        with contextlib.suppress(OSError):
            target = path.readlink()
            return target.name if target.parent.name == "blobs" else None
        receipt = self.receipt(commit, filename)
        return None if receipt is None else receipt.etag

    def receipt(self, commit: str, filename: str) -> Receipt | None:
        """Return what was noted of a whole file; None where nothing was, or it cannot be read."""
        path = self.own / commit / f"{filename}.receipt"
        try:
            document = json.loads(path.read_bytes())
            receipt = Receipt(document["etag"], document["block"], tuple(document["checksums"]))
        except (OSError, ValueError, TypeError, KeyError):
            return None
        is_valid = receipt.block == BLOCK_BYTES and isinstance(receipt.etag, str)
        return receipt if is_valid else None

    def save_receipt(self, commit: str, filename: str, receipt: Receipt) -> None:
        """Note what a whole file is, where the cache can be written."""
        path = self.own / commit / f"{filename}.receipt"
        with contextlib.suppress(OSError):
            write_file(path, json.dumps(asdict(receipt)).encode())

    def header(self, commit: str, filename: str) -> CachedHeader | None:
        """Return the header of a weights file; None where it is not here, or damaged."""
        return read_cached_header(self.own / commit / f"{filename}.header")

    def save_header(self, commit: str, filename: str, header: CachedHeader, content: bytes) -> None:
        """Keep the header of a weights file. Where that fails, the Hub is simply asked again.

        Args:
            commit: of the repository.
            filename: in the repository.
            header: of the file.
            content: its JSON.
        """
        description = {
            "etag": header.etag,
            "size": header.header.size,
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        path = self.own / commit / f"{filename}.header"
        with contextlib.suppress(OSError):
            write_file(path, json.dumps(description).encode() + b"\n" + content)

    # --- writing ----------------------------------------------------------------------------------

    def add(self, commit: str, filename: str, etag: str, staged: Path) -> Path:
        """Move a whole file into the cache, in place of what was there under its name.

        Args:
            commit: of the repository.
            filename: in the repository.
            etag: the Hub's identifier of its contents, which have been compared with it.
            staged: the file, in the repository's own folder.

        Raises:
            OSError: the cache cannot be written.
        """
        blob = self.blob(etag)
        blob.parent.mkdir(parents=True, exist_ok=True)
        staged.replace(blob)
        path = self.link(commit, filename, etag)
        if not path.is_symlink():
            blob.unlink()  # of which it is a copy
        return path

    def link(self, commit: str, filename: str, etag: str) -> Path:
        """Make a blob the file of a commit: by a link, or, where there are none, by a copy.

        Raises:
            OSError: the cache cannot be written.
        """
        from huggingface_hub import constants

        path = self.snapshot(commit, filename)
        blob = self.blob(etag)
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = staging_path(path)
        try:
            # not known to the client before 1.0.1
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
        """Move files out of the way that stand where one is to be put.

        They are not what they should be, but stay in our own folder: they may be somebody's. Links
        are left where they are, and replaced.

        Args:
            commit: of the repository.
            filename: in the repository.
            etag: the Hub's identifier of the contents that should be there.

        Returns:
            Where they are now.
        """
        moved = []
        for path in (self.blob(etag), self.snapshot(commit, filename)):
            if path.is_file() and not path.is_symlink():
                aside = self.own / f"{path.name}.damaged"
                path.replace(aside)
                moved.append(aside)
        return moved

    def prune(self, commit: str, vision_file: Path) -> None:
        """Remove what is ours of commits that the cache has no more, as after `hf cache rm`.

        Args:
            commit: that is being loaded.
            vision_file: its own vision encoder, which stays.
        """
        commits = self.commits() | {commit}
        etags: set[str] = set()
        for folder in list_folder(self.own):
            if not COMMIT.fullmatch(folder.name):
                continue
            if folder.name not in commits:
                shutil.rmtree(folder, ignore_errors=True)
                continue
            headers = [read_cached_header(path) for path in folder.rglob("*.header")]
            etags.update(header.etag for header in headers if header is not None)
        for path in set(self.own.glob(VISION_FILES)) - {vision_file}:
            with contextlib.suppress(OSError, ValueError, KeyError, UnreadableFileError):
                sources = json.loads(read_header(path).metadata["files"])
                if not etags.issuperset(sources.values()):
                    path.unlink(missing_ok=True)
                    path.with_suffix(".lock").unlink(missing_ok=True)

    def _ref(self, revision: str) -> Path:
        if ".." in revision.split("/"):
            raise ValueError("a name that leads elsewhere")
        return self.folder / "refs" / revision.lstrip("/")


def read_cached_header(path: Path) -> CachedHeader | None:
    """Read what `save_header` has written; None where there is nothing, or it is damaged."""
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
    """Return what is in a folder; nothing where there is none, or it cannot be read."""
    with contextlib.suppress(OSError):
        return list(folder.iterdir())
    return []


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, without a second time the bytes where the file system can give it two names."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def write_file(path: Path, content: bytes) -> None:
    """Write a small file in one step; its folder is made.

    Raises:
        OSError: it cannot be written.
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
    """Return a name for what is not finished, which no other process or thread takes."""
    number = next(_counter)
    return path.with_name(
        f".{path.name}.{os.getpid()}-{threading.get_ident()}-{number}.siglip_port"
    )

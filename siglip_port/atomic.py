"""Write files atomically: an error or interruption leaves the old file or the new one, complete."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

STAGING_PREFIX = ".siglip_port-"
"""Prefix of staging folders. A killed process leaves its staging folder behind."""


@contextmanager
def staging_dir(folder: Path) -> Iterator[Path]:
    """Create a staging folder inside `folder`; it is removed at the end.

    Staging folders of killed processes are removed, too, unless another process is writing to
    `folder`.

    Args:
        folder: Target folder, on the same file system, so files are moved atomically. Created if it
            does not exist, and removed again after an error.

    Raises:
        OSError: The folder is not writable.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            shared_lock(folder),
            # A successful write must not fail in the cleanup; the next write cleans up.
            tempfile.TemporaryDirectory(
                dir=folder, prefix=STAGING_PREFIX, ignore_cleanup_errors=True
            ) as staging,
        ):
            yield Path(staging)
    except BaseException:
        for parent in missing:
            with contextlib.suppress(OSError):  # not empty: another process uses it
                parent.rmdir()
        raise


@contextmanager
def shared_lock(folder: Path) -> Iterator[None]:
    """Hold a shared lock on a folder while writing to it.

    If no other process holds the lock, leftover staging folders are removed. The lock is on the
    folder itself and ends with the process. Without locks (Windows, some network file systems),
    leftovers are not removed.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for leftover in folder.glob(f"{STAGING_PREFIX}*"):
                shutil.rmtree(leftover, ignore_errors=True)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def commit_files(files: Sequence[Path], folder: Path) -> None:
    """Move staged files to their folder; after an error or interruption, restore the old files.

    Old and new files can be mixed only if the process is killed between two moves, or if an error
    occurs on a file system without hard links.

    Args:
        files: Files in a folder of `staging_dir`.
        folder: Target folder; the names stay the same.

    Raises:
        OSError: The files cannot be moved, or the disk is full, which some file systems report
            only at this point.
    """
    with transaction(files[0].parent, folder) as changes:
        for file in files:
            changes.move(file.name)


@contextmanager
def transaction(staging: Path, folder: Path) -> Iterator[Transaction]:
    """Change files in a folder; after an error or interruption, restore the old files.

    Args:
        staging: Folder of the new files, in a folder of `staging_dir`. Also holds the old files
            until the end.
        folder: Target folder.

    Yields:
        The transaction, whose methods change the folder.

    Raises:
        OSError: A file cannot be moved, or the disk is full, which some file systems report only at
            this point.
    """
    for file in staging.rglob("*"):
        if file.is_file():
            # without fsync, a power failure after the move may lose the contents
            with file.open("r+b") as stream:
                os.fsync(stream.fileno())
    changes = Transaction(staging, folder)
    try:
        yield changes
    except BaseException:
        changes.undo()
        raise


class Transaction:
    """Changes to the files in a folder: see `transaction`.

    Args:
        staging: Folder of the new files, and of the old ones until the end.
        folder: Target folder.
    """

    def __init__(self, staging: Path, folder: Path) -> None:
        self.staging = staging
        self.folder = folder
        self._new: list[Path] = []
        self._old: list[str] = []

    def move(self, name: str) -> None:
        """Move a staged file into the folder. Readers see the old file or the new one.

        Args:
            name: Path relative to the staging folder and to the target folder.
        """
        target = self.folder / name
        if not target.parent.exists():
            self._new.append(target.parent)
            target.parent.mkdir()
        if os.path.lexists(target):
            self._old.append(name)
            with contextlib.suppress(OSError):  # a file system without hard links
                os.link(target, self._backup(name))
        else:
            self._new.append(target)
        (self.staging / name).replace(target)

    def remove(self, name: str) -> None:
        """Remove a file from the folder; it need not exist.

        Args:
            name: Path relative to the target folder.
        """
        if os.path.lexists(self.folder / name):
            self._old.append(name)
            (self.folder / name).replace(self._backup(name))

    def undo(self) -> None:
        """Remove the new files and restore the old ones, as far as possible."""
        for path in reversed(self._new):
            with contextlib.suppress(OSError):
                if path.is_dir():
                    path.rmdir()
                else:
                    path.unlink()
        for name in reversed(self._old):
            with contextlib.suppress(OSError):  # no backup: the file was not replaced yet
                self._backup(name).replace(self.folder / name)

    def _backup(self, name: str) -> Path:
        """Return the path of the backup of a replaced or removed file."""
        return self.staging / f"{name}.old"


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically.

    Args:
        path: Path of the file; its folder must exist.
        text: Contents, written as UTF-8.

    Raises:
        OSError: The file cannot be written.
    """
    path = path.resolve()
    staged = path.with_name(f".{path.name}.unfinished")
    try:
        staged.write_text(text, encoding="utf-8")
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)

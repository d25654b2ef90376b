"""Files that are replaced as a whole.

Whatever ends the writing, the old ones are there, or the new ones.
"""

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
"""Begins the names of the folders that hold what is not finished.

A process that is killed leaves its own behind.
"""


@contextmanager
def staging_dir(folder: Path) -> Iterator[Path]:
    """Make a folder in another, for what is not finished.

    It is gone afterwards, with all that is still in it. So is what killed processes have left
    behind there, unless somebody else is writing there.

    Args:
        folder: made if it does not exist, and removed again if what is done in it fails. Files can
            be moved as one step to places in it, and on the same file system.

    Raises:
        OSError: it cannot be written to.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            shared_lock(folder),
            # What cannot be removed is no reason to call a failure what has succeeded: the next
            # will remove it.
            tempfile.TemporaryDirectory(
                dir=folder, prefix=STAGING_PREFIX, ignore_cleanup_errors=True
            ) as staging,
        ):
            yield Path(staging)
    except BaseException:
        for parent in missing:
            with contextlib.suppress(OSError):  # not empty: somebody else uses it
                parent.rmdir()
        raise


@contextmanager
def shared_lock(folder: Path) -> Iterator[None]:
    """Tell others that somebody writes into a folder.

    Whoever finds it free removes what has been left behind there. The lock is on the folder itself
    and ends with the process, however that ends. Where there are no such locks, as on Windows and
    some network file systems, nothing is removed.
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
    """Move files to their places: each as one step, and if a step fails or is interrupted, none.

    Only a process that is killed between two steps leaves some of each kind; and a file system
    without hard links, on which what has been replaced cannot be put back.

    Args:
        files: in a folder of `staging_dir`.
        folder: where to, under their own names.

    Raises:
        OSError: they cannot be moved there, or, as some file systems tell only now, there was no
            room for them.
    """
    for file in files:
        # else a power cut after the move may leave a file without its contents
        with file.open("r+b") as opened:
            os.fsync(opened.fileno())
    new_names = {file.name for file in files if not os.path.lexists(folder / file.name)}
    try:
        for file in files:
            with contextlib.suppress(OSError):
                os.link(folder / file.name, backup_path(file))
            file.replace(folder / file.name)
    except BaseException:
        for file in files:
            with contextlib.suppress(OSError):
                if file.name in new_names:
                    (folder / file.name).unlink()
                else:
                    backup_path(file).replace(folder / file.name)
        raise


def backup_path(file: Path) -> Path:
    """Return where the file that a staged one replaces stays until all are moved."""
    return file.with_name(f"{file.name}.old")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Args:
        path: of the file; its folder must exist, and nothing else is written to it.
        text: its contents, in UTF-8.

    Raises:
        OSError: it cannot be written.
    """
    path = path.resolve()
    staged = path.with_name(f".{path.name}.unfinished")
    try:
        staged.write_text(text, encoding="utf-8")
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)

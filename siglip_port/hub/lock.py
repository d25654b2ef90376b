"""Lock on a file that is being written; locks of idle processes are ignored."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

LOCK_IDLE_SECONDS = 10.0
"""After this time without a write, the lock of another process is ignored, in seconds."""

LOCK_POLL_SECONDS = 1.0
"""Interval at which the other process is checked for progress, in seconds."""


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Lock a file that is being written, unless an idle process holds the lock.

    Writing without the lock is safe: processes that write the same file write the same bytes to
    the same offsets.

    Args:
        path: Path of the finished file.
    """
    with contextlib.ExitStack() as stack:
        acquire_lock(path, stack)
        yield


def acquire_lock(path: Path, stack: contextlib.ExitStack) -> None:
    """Acquire the lock of a file, or stop waiting for it.

    Args:
        path: Path of the finished file.
        stack: Stack that holds the lock.
    """
    from filelock import Timeout
    from huggingface_hub.utils import WeakFileLock

    lock = path.with_suffix(".lock")
    incomplete = path.with_suffix(".incomplete")
    before = modification_time(incomplete)
    since = time.monotonic()
    is_first_wait = True
    while True:
        try:
            stack.enter_context(WeakFileLock(lock, timeout=LOCK_POLL_SECONDS))
            return
        except Timeout:
            if is_first_wait:
                log.warning("another process is downloading %s; waiting for it", path.name)
            is_first_wait = False
        now = modification_time(incomplete)
        if now != before:
            before = now
            since = time.monotonic()
        elif time.monotonic() - since > LOCK_IDLE_SECONDS:
            log.warning("%s is held by an idle process; continuing without the lock", lock)
            return


def modification_time(path: Path) -> int:
    """Return the modification time of a file, in nanoseconds; 0 if it does not exist."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0

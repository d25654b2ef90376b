"""A lock on a file that is made, which no idle process holds for ever."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

LOCK_IDLE_SECONDS = 10.0
"""Another process that holds a lock and writes nothing for so long is not waited for."""

LOCK_POLL_SECONDS = 1.0
"""Between looks at what the other process has written."""


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Wait until no other process or thread makes a file; but not for one that does nothing.

    Without the lock it is made as well: processes that make the same file write the same bytes to
    the same places.

    Args:
        path: of the file, which is put together beside it.
    """
    with contextlib.ExitStack() as stack:
        acquire_lock(path, stack)
        yield


def acquire_lock(path: Path, stack: contextlib.ExitStack) -> None:
    """Enter the lock of a file, or give up on it.

    Args:
        path: of the file.
        stack: holds the lock.
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
                log.warning(
                    "another process fetches %s: waiting for it, as long as it does", path.name
                )
            is_first_wait = False
        now = modification_time(incomplete)
        if now != before:
            before = now
            since = time.monotonic()
        elif time.monotonic() - since > LOCK_IDLE_SECONDS:
            log.warning("another process holds %s and does nothing: going on without", lock)
            return


def modification_time(path: Path) -> int:
    """Return when a file was written to last, in nanoseconds; 0 where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0

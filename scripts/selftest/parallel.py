"""Work on many mutants, on all cores."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

PR_SET_PDEATHSIG = 1

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")

job: tuple[Callable[[Any], Any], Sequence[Any]]
"""In a process of `each`: what it does, and with which items."""


def each(
    work: Callable[[Item], Outcome], items: Sequence[Item], processes: int = 1
) -> Iterator[Outcome]:
    """Yield what `work` makes of each item, in their order.

    Args:
        work: returns plain data.
        items: what it is called with.
        processes: how many to do this in. They are forked from this one, so that they have all that
            it has, functions without a name and changes made for a test included; only an item's
            number goes in, and plain data out.
    """
    if processes == 1:
        yield from map(work, items)
        return
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, fork, initializer=begin, initargs=(work, items)) as pool:
        yield from pool.map(work_on, range(len(items)))


def begin(work: Callable[[Any], Any], items: Sequence[Any]) -> None:
    """Prepare a process: it leaves Ctrl-C to its parent, and ends with it, however that ends."""
    global job
    job = (work, items)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def work_on(number: int) -> Any:  # noqa: ANN401
    """Do the work on one item, in a process of `each`."""
    work, items = job
    return work(items[number])


def count_processes(device: str) -> int:
    """Return in how many processes to work: one a core, up to 8.

    One alone where forking is not safe: torch's devices, and much of macOS, do not survive it.
    """
    if sys.platform != "linux" or device != "cpu":
        return 1
    return min(len(os.sched_getaffinity(0)), 8)

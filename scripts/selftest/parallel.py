"""Parallel processing of mutants in forked processes."""

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
"""In a worker process of `each`: the function and its items."""


def each(
    work: Callable[[Item], Outcome], items: Sequence[Item], processes: int = 1
) -> Iterator[Outcome]:
    """Yield `work(item)` for each item, in order.

    Args:
        work: Function that returns picklable data.
        items: Arguments of the function.
        processes: Number of processes. They are forked, so lambdas and monkeypatches work; only the
            index of an item is sent to them.
    """
    if processes == 1:
        yield from map(work, items)
        return
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, fork, initializer=begin, initargs=(work, items)) as pool:
        yield from pool.map(work_on, range(len(items)))


def begin(work: Callable[[Any], Any], items: Sequence[Any]) -> None:
    """Initialize a worker: ignore Ctrl-C, and exit with the parent process."""
    global job
    job = (work, items)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def work_on(number: int) -> Any:  # noqa: ANN401
    """Process one item in a worker."""
    work, items = job
    return work(items[number])


def count_processes(device: str) -> int:
    """Return the number of processes: one per core, at most 8.

    One where forking is unsafe: on other devices than the CPU, and on macOS.
    """
    if sys.platform != "linux" or device != "cpu":
        return 1
    return min(len(os.sched_getaffinity(0)), 8)

"""Progress on the terminal, by rich; none where stderr is no terminal, or rich is not installed."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

REFRESH_SECONDS = 0.2
"""What changes more often is not drawn each time."""

Item = TypeVar("Item")


def track(items: Iterator[Item], description: str, total: int = 0) -> Iterator[Item]:
    """Pass items on, and show how many of them have passed.

    Args:
        items: what is worked through.
        description: of the work.
        total: how many items there are; 0 where that is not known.
    """
    progress = new_progress()
    if progress is None:
        yield from items
        return
    with progress:
        task = progress.add_task(description, total=total or None)
        progress.refresh()
        for item in items:
            progress.update(task, advance=1, refresh=True)
            yield item


@contextlib.contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """Show one line of text, which is cut to the width of the terminal.

    Yields:
        A function that replaces the text, at most every `REFRESH_SECONDS`.
    """
    progress = new_status()
    if progress is None:
        yield lambda text: None
        return
    task = progress.add_task("", total=None)
    last_update = 0.0

    def show(text: str) -> None:
        nonlocal last_update
        if time.monotonic() > last_update + REFRESH_SECONDS:
            last_update = time.monotonic()
            progress.update(task, description=text, refresh=True)

    with progress:
        yield show


def new_progress() -> Progress | None:
    """A display of a description, a count, and the seconds since the beginning."""
    if not has_display():
        return None
    from rich.progress import MofNCompleteColumn, TextColumn, TimeElapsedColumn

    description = TextColumn("{task.description}", markup=False)
    return on_stderr(description, MofNCompleteColumn(), TimeElapsedColumn())


def new_status() -> Progress | None:
    """A display of a description alone."""
    if not has_display():
        return None
    from rich.progress import TextColumn
    from rich.table import Column

    column = Column(no_wrap=True, overflow="crop")
    return on_stderr(TextColumn("{task.description}", markup=False, table_column=column))


def has_display() -> bool:
    """Whether there is a terminal, and rich to draw on it."""
    return sys.stderr.isatty() and find_spec("rich") is not None


def on_stderr(*columns: ProgressColumn) -> Progress:
    """A display on stderr that vanishes in the end.

    It is drawn by who updates it: a thread of its own would be lost in processes that are forked.
    What is printed to stdout, which may be a file, goes there.
    """
    from rich.console import Console
    from rich.progress import Progress

    return Progress(
        *columns,
        console=Console(stderr=True, highlight=False),
        transient=True,
        auto_refresh=False,
        redirect_stdout=False,
    )

"""Progress display on stderr; none unless stderr is a terminal and rich is installed."""

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
"""Minimum interval between two updates of the status line."""

Item = TypeVar("Item")


def track(items: Iterator[Item], description: str, total: int = 0) -> Iterator[Item]:
    """Yield the items of an iterator and show how many were consumed.

    Args:
        items: Items to iterate over.
        description: Description of the work.
        total: Number of items; 0 if unknown.
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
    """Show one line of text, cropped to the width of the terminal.

    Yields:
        A function that replaces the text, at most once per `REFRESH_SECONDS`.
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
    """Return a display of description, count and elapsed time; None without a terminal."""
    if not has_display():
        return None
    from rich.progress import MofNCompleteColumn, TextColumn, TimeElapsedColumn

    description = TextColumn("{task.description}", markup=False)
    return on_stderr(description, MofNCompleteColumn(), TimeElapsedColumn())


def new_status() -> Progress | None:
    """Return a display of a description; None without a terminal."""
    if not has_display():
        return None
    from rich.progress import TextColumn
    from rich.table import Column

    column = Column(no_wrap=True, overflow="crop")
    return on_stderr(TextColumn("{task.description}", markup=False, table_column=column))


def has_display() -> bool:
    """Return whether stderr is a terminal and rich is installed."""
    return sys.stderr.isatty() and find_spec("rich") is not None


def on_stderr(*columns: ProgressColumn) -> Progress:
    """Return a display on stderr that is erased at the end.

    Callers refresh it, since a refresh thread would not survive a fork. Stdout, which may be a
    file, is not redirected.
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

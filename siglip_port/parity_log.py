"""Log of comparisons, for the pytest plugin; imports nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

Json = dict[str, Any]

active: list[Json] | None = None
"""Reports of the comparisons since `recorded` began; None outside of it."""


@contextlib.contextmanager
def recorded() -> Iterator[list[Json]]:
    """Record the comparisons of `assert_parity` within a context."""
    global active
    previous = active
    active = []
    try:
        yield active
    finally:
        active = previous


def add(make_report: Callable[[], Json]) -> None:
    """Add a report, if comparisons are recorded."""
    if active is not None:
        active.append(make_report())

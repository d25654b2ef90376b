"""Sweeps: the full sweep is marked slow, the default run takes a sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import pytest

T = TypeVar("T")

sweep = pytest.mark.parametrize(
    "is_full",
    [pytest.param(False, id="sample"), pytest.param(True, id="full", marks=pytest.mark.slow)],
)
"""Parametrizes a test with the argument `is_full`."""


def sample(items: Sequence[T], step: int, offset: int = 0) -> list[T]:
    """Return every `step`-th item, starting at `offset`."""
    return list(items[offset % step :: step])


def sample_ends(items: Sequence[T], step: int) -> list[T]:
    """Return the first, the last, and every `step`-th item between them."""
    return [*items[:-1:step], *items[-1:]]

"""Sweeps: all of them is a test marked slow, the default run takes a sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import pytest

T = TypeVar("T")

sweep = pytest.mark.parametrize(
    "is_full",
    [pytest.param(False, id="sample"), pytest.param(True, id="full", marks=pytest.mark.slow)],
)
"""Makes two tests of one that has the argument `is_full`."""


def sample(items: Sequence[T], step: int, offset: int = 0) -> list[T]:
    """Every `step`-th item, from `offset` on. Tests of all offsets take all items between them."""
    return list(items[offset % step :: step])


def sample_ends(items: Sequence[T], step: int) -> list[T]:
    """The first, the last, and every `step`-th item between them."""
    return [*items[:-1:step], *items[-1:]]

"""Numbers as texts, for the page."""

from __future__ import annotations

import math
from collections.abc import Mapping


def format_value(value: object) -> str:
    """A value of a report as text.

    Near 1 are cosines, whose last digits are the point. Of other numbers, the first digits are.
    """
    if isinstance(value, float):
        return f"{value:.12g}" if 0.9 < value < 1.1 else f"{value:.2g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {format_value(item)}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(format_value, value)) or "none"
    return "none" if value is None else str(value)


def format_cosine(distance: float) -> str:
    """A cosine, given 1 - cosine."""
    return f"1 - {distance:.1e}" if 0 < distance < 1e-3 else f"{1 - distance:.6g}"


def format_times(times: float) -> str:
    """How many times as large something is."""
    return f"{times:,.0f}" if times >= 100 else f"{times:.3g}"


def to_float(value: float | str) -> float:
    """A number of a report, in which NaN and infinity are texts; NaN counts as infinite."""
    number = float(value)
    return math.inf if math.isnan(number) else number

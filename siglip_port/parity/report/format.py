"""Format numbers for the HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping


def format_value(value: object) -> str:
    """Format a value of a report.

    Numbers near 1 are cosines and get 12 digits, all others 2.
    """
    if isinstance(value, float):
        return f"{value:.12g}" if 0.9 < value < 1.1 else f"{value:.2g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {format_value(item)}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(format_value, value)) or "none"
    return "none" if value is None else str(value)


def format_cosine(distance: float) -> str:
    """Format a cosine, given 1 - cosine."""
    return f"1 - {distance:.1e}" if 0 < distance < 1e-3 else f"{1 - distance:.6g}"


def format_factor(factor: float) -> str:
    """Format a factor such as error / bound."""
    return f"{factor:,.0f}" if factor >= 100 else f"{factor:.3g}"


def to_float(value: float | str) -> float:
    """Convert a number of a report, where NaN and infinity are strings; NaN becomes infinity."""
    number = float(value)
    return math.inf if math.isnan(number) else number

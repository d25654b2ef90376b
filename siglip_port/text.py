"""Formatting: folded parameter names, byte counts and plain-text tables."""

from __future__ import annotations

import re
from collections.abc import Iterable

BYTE_UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))
"""Decimal byte units, largest first."""


def fold_blocks(names: Iterable[str]) -> list[str]:
    """Fold names that differ only in the block index: `layers.{0...11}.mlp.fc1.bias`.

    Only an integer between two dots is a block index: `fc1` and `layer_norm1` are unchanged.
    """
    folded: dict[tuple[str, ...], list[int]] = {}
    for name in names:
        parts = re.split(r"(?<=\.)(\d{1,9})(?=\.)", name, maxsplit=1)
        numbers = folded.setdefault(tuple(parts[::2]), [])
        numbers.extend(int(number) for number in parts[1:2])
    return [format_ranges(numbers).join(parts) for parts, numbers in folded.items()]


def format_ranges(numbers: Iterable[int]) -> str:
    """Format `[0, 1, 2, 5]` as `{0...2,5}`, and a single number as itself."""
    unique = sorted(set(numbers))
    runs: list[list[int]] = []
    for number in unique:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}...{run[-1]}" for run in runs)
    return f"{{{text}}}" if len(unique) > 1 else text


def format_bytes(size: int) -> str:
    """Format a byte count with a decimal unit: `371.5 MB`, `402 B`."""
    for unit, name in BYTE_UNITS:
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} B"


def format_table(rows: Iterable[list[str]]) -> list[str]:
    """Align rows of equal length in columns; return one line per row."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append(" | ".join(cells).rstrip())
    return lines

"""Errors of checkpoints that cannot be loaded or written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from siglip_port.text import fold_blocks

if TYPE_CHECKING:
    from siglip_port.checkpoint.key_rules import Layout

MAX_NAMES_SHOWN = 40  # per problem; the 27 folded names of a whole encoder fit

Problem = tuple[str, list[str]]
"""A description and the names of the affected tensors."""


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded or written.

    The message says what was expected, what was found, and what to do.
    """


class HubUnreachableError(CheckpointError):
    """A file is not cached, and the Hub is unreachable or downloads are disabled."""


class MultipleEncodersError(CheckpointError):
    """A checkpoint contains several vision encoders, or one that matches several layouts.

    Attributes:
        encoders: Layout and prefix of each.
    """

    def __init__(self, message: str, encoders: list[tuple[Layout, str]]) -> None:
        super().__init__(message)
        self.encoders = encoders


def describe_problems(title: str, problems: Iterable[Problem]) -> str:
    """Format all problems as one message, with tensor names folded by block."""
    lines = [f"{title} does not match its configuration"]
    for problem, names in problems:
        lines.append(f"  {problem} ({len(names)}):")
        folded = fold_blocks(sorted(names))
        lines += [f"    {name}" for name in folded[:MAX_NAMES_SHOWN]]
        if len(folded) > MAX_NAMES_SHOWN:
            lines.append(f"    ... and {len(folded) - MAX_NAMES_SHOWN} more")
    return "\n".join(lines)

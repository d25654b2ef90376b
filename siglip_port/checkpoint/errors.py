"""Why a checkpoint cannot be loaded or written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from siglip_port.text import fold_blocks

if TYPE_CHECKING:
    from siglip_port.checkpoint.key_rules import Layout

MAX_NAMES_SHOWN = 40  # of one kind of problem; the 27 rows of a whole encoder fit

Problem = tuple[str, list[str]]
"""What is wrong, and the names of the tensors with which it is."""


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded.

    The message says what was expected, what was found, and what to do.
    """


class HubUnreachableError(CheckpointError):
    """A file is not cached, and the Hub could not be reached, or was not to be asked."""


class MultipleEncodersError(CheckpointError):
    """A file holds more than one vision encoder, or one that matches several layouts.

    Attributes:
        encoders: layout and prefix of each.
    """

    def __init__(self, message: str, towers: list[tuple[Layout, str]]) -> None:
        super().__init__(message)
        self.towers = towers


def describe_problems(title: str, problems: Iterable[Problem]) -> str:
    """Write one message for all that is wrong: what, how many, and their names, folded by block."""
    lines = [f"{title} does not hold the encoder that its configuration describes"]
    for problem, names in problems:
        lines.append(f"  {problem} ({len(names)}):")
        folded = fold_blocks(sorted(names))
        lines += [f"    {name}" for name in folded[:MAX_NAMES_SHOWN]]
        if len(folded) > MAX_NAMES_SHOWN:
            lines.append(f"    ... and {len(folded) - MAX_NAMES_SHOWN} more")
    return "\n".join(lines)

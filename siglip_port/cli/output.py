"""Output of commands: tables, JSON, labeled lines and error messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from siglip_port.cli.exit_codes import FAILURE

TABLE_WIDTH = 100_000
"""Columns: wide enough that rich neither cuts nor wraps cells; the terminal wraps lines."""

LABEL_WIDTH = 9
"""Columns of the labels that `print_labeled` prints."""


class CommandError(Exception):
    """A command cannot do its work.

    Attributes:
        code: Exit code.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def fail(message: str, code: int = FAILURE) -> NoReturn:
    """End the command with an exit code and a message on stderr.

    Raises:
        CommandError: Always; `siglip_port.cli.app` prints it.
    """
    raise CommandError(message, code)


def print_json(content: Mapping[str, Any]) -> None:
    """Print a JSON object."""
    typer.echo(json.dumps(content, indent=2))


def print_labeled(label: str, lines: list[str]) -> None:
    """Print lines in a column, with a label to the left of the first."""
    for line in lines:
        typer.echo(f"{label:{LABEL_WIDTH}}{line}")
        label = ""


def plain_table(*columns: str) -> Table:
    """Return a table without borders."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def print_table(table: Table) -> None:
    """Print a table without trailing spaces."""
    console = Console(width=TABLE_WIDTH, markup=False, highlight=False)
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        typer.echo(line.rstrip())

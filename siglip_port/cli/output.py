"""How commands print: tables, JSON, and the sentence that ends them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

TABLE_WIDTH = 100_000
"""Columns: nothing is cut off or broken; a narrower terminal wraps by itself."""

LABEL_WIDTH = 9
"""Columns of the labels before what a command prints."""


def fail(sentence: str, code: int) -> NoReturn:
    """Print a sentence to stderr, and end with an exit code."""
    typer.echo(sentence, err=True)
    raise typer.Exit(code)


def print_json(content: Mapping[str, Any]) -> None:
    """Print a JSON object."""
    typer.echo(json.dumps(content, indent=2))


def print_labeled(label: str, lines: list[str]) -> None:
    """Print lines beside a label, which stands before the first of them."""
    for line in lines:
        typer.echo(f"{label:{LABEL_WIDTH}}{line}")
        label = ""


def plain_table(*columns: str) -> Table:
    """A table without borders."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def print_table(table: Table) -> None:
    """Print a table, without the spaces that fill its last column."""
    console = Console(width=TABLE_WIDTH, markup=False, highlight=False)
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        typer.echo(line.rstrip())

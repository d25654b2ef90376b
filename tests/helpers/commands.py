"""Runs the command line in this process."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from siglip_port.cli.commands import app


def run(*arguments: object, code: int = 0) -> Any:  # noqa: ANN401 (typer does not name what its runner returns)
    """Runs a command in this process; any exception but an exit is raised."""
    result = CliRunner().invoke(
        app, [str(argument) for argument in arguments], catch_exceptions=False
    )
    assert result.exit_code == code, result.output
    return result

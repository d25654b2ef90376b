"""Runs the command line in this process."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from siglip_port.cli.app import app


def run(*arguments: object, code: int = 0) -> Any:  # noqa: ANN401 (typer does not name its type)
    """Run a command in this process; any exception but an exit is raised."""
    result = CliRunner().invoke(
        app, [str(argument) for argument in arguments], catch_exceptions=False
    )
    assert result.exit_code == code, result.output
    return result


def inspect(*arguments: object, code: int = 0) -> dict[str, Any]:
    """What `inspect --json` prints."""
    inspection: dict[str, Any] = json.loads(run("inspect", *arguments, "--json", code=code).stdout)
    return inspection


def stored_entry(inspection: dict[str, Any], stored: str) -> dict[str, Any]:
    """The entry of a stored tensor, or of tensors that are folded into one name."""
    (entry,) = (entry for entry in inspection["entries"] if entry["stored"] == stored)
    return dict(entry)

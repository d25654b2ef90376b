"""Run commands of the CLI in this process."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from siglip_port.cli.app import app


def run(*arguments: object, code: int = 0) -> Any:  # noqa: ANN401 (typer does not name its type)
    """Run a command and check its exit code; exceptions other than an exit are raised."""
    result = CliRunner().invoke(
        app, [str(argument) for argument in arguments], catch_exceptions=False
    )
    assert result.exit_code == code, result.output
    return result


def inspect(*arguments: object, code: int = 0) -> dict[str, Any]:
    """Run `inspect --json` and return the parsed output."""
    inspection: dict[str, Any] = json.loads(run("inspect", *arguments, "--json", code=code).stdout)
    return inspection


def stored_entry(inspection: dict[str, Any], stored: str) -> dict[str, Any]:
    """Return the entry of a stored tensor, or of several that share a name pattern."""
    (entry,) = (entry for entry in inspection["entries"] if entry["stored"] == stored)
    return dict(entry)

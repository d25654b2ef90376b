"""The entry point of the command `siglip-port`.

The commands are in `siglip_port.cli.commands`, and need an extra.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line.

    Exits with code 2 and a sentence where what it needs is not installed.
    """
    try:
        from siglip_port.cli.commands import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(
            f"siglip-port needs {error.name}, which is not installed: install siglip-port[cli]",
            file=sys.stderr,
        )
        sys.exit(2)
    app()

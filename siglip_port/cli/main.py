"""The entry point of `siglip-port`; imports nothing outside the standard library."""

from __future__ import annotations

import sys

from siglip_port.cli import exit_codes
from siglip_port.extras import MissingExtraError, require


def main() -> None:
    """Run the command line; exit with code 2 if the extra `cli` is not installed."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["verify"]:  # the one command that does not need the extra
        from siglip_port.cli import verify

        sys.exit(verify.main(arguments[1:]))
    try:
        require("typer", "rich")
    except MissingExtraError as error:
        print(error, file=sys.stderr)
        sys.exit(exit_codes.USAGE_ERROR)
    from siglip_port.cli.app import app

    app()

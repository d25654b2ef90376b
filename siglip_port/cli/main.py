"""The entry point of the command `siglip-port`: it needs nothing but the standard library."""

from __future__ import annotations

import sys

from siglip_port.extras import MissingExtraError, require


def main() -> None:
    """Run the command line.

    Exit with code 2 and a sentence where what it needs is not installed.
    """
    arguments = sys.argv[1:]
    if arguments[:1] == ["verify"]:  # the one command that does without the extra
        from siglip_port.cli import verify

        sys.exit(verify.main(arguments[1:]))
    try:
        require("typer", "rich")
    except MissingExtraError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    from siglip_port.cli.app import app

    app()

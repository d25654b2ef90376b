"""The command line, `siglip-port`."""

from siglip_port.cli.main import main

__all__ = ["main"]

"""Places on this machine where nobody answers."""

from __future__ import annotations

import socket


def silent_port() -> int:
    """A port at which nobody listens."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port: int = closed.getsockname()[1]
        return port

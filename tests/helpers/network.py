"""Places on this machine where nobody answers, and how the Hub's client is sent there."""

from __future__ import annotations

import socket

import pytest


def silent_port() -> int:
    """A port at which nobody listens."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port: int = closed.getsockname()[1]
        return port


def url_template(url: str) -> str:
    """How the Hub's client makes addresses of files at another server."""
    return f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"


def point_client_at(url: str, patch: pytest.MonkeyPatch) -> None:
    """Have the Hub's client, and the port, ask another server for files."""
    from huggingface_hub import constants

    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url_template(url))

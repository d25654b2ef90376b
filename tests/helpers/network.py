"""Ports without a server, and other endpoints for the Hub's client."""

from __future__ import annotations

import socket

import pytest


def silent_port() -> int:
    """Return a port without a listener."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port: int = closed.getsockname()[1]
        return port


def url_template(url: str) -> str:
    """Return the URL template of files on another server."""
    return f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"


def point_client_at(url: str, patch: pytest.MonkeyPatch) -> None:
    """Make `huggingface_hub` and `siglip_port` request files from another server."""
    from huggingface_hub import constants

    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url_template(url))

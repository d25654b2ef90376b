"""Fixtures of the Hub tests: small chunks, short timeouts, kinds of repositories."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from siglip_port.hub import chunked_download
from tests.helpers.checkpoints import edit_tensors
from tests.helpers.hub_cache import NAME, TEXT_MODEL_BYTES
from tests.helpers.hub_server import Hub, Repository

TOKEN = "hf_" + "Secret" * 5


@pytest.fixture
def token() -> str:
    """A token that can read the repository of `private_folder`."""
    return TOKEN


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunk size in bytes, so small that even a small encoder takes many requests."""
    monkeypatch.setattr(chunked_download, "CHUNK_BYTES", 4096)
    return 4096


@pytest.fixture
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants  # after `pytest_configure` has set its variables

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between attempts are short, also those of the client."""
    sleep = time.sleep
    wait = threading.Event.wait

    def wait_shortly(event: threading.Event, timeout: float | None = None) -> bool:
        return wait(event, None if timeout is None else min(timeout, 0.01))

    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    monkeypatch.setattr(threading.Event, "wait", wait_shortly)


@pytest.fixture(params=[False, True], ids=["links", "no links"])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cache with and without symlinks."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", request.param, raising=False)


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Connections and name lookups fail."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket")

    with monkeypatch.context() as patch:
        for name in ("connect", "connect_ex", "bind", "sendto"):
            patch.setattr(socket.socket, name, refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        yield


@pytest.fixture
def vision_folder(hub: Hub, encoder_copy: Path) -> Path:
    """Folder of a repository with only a vision encoder."""
    hub.repositories[NAME] = Repository(encoder_copy)
    return encoder_copy


@pytest.fixture(params=["transformers", "open_clip"])
def private_folder(
    request: pytest.FixtureRequest, hub: Hub, encoder_copy: Path, token: str
) -> Path:
    """Folder of a private repository with a whole model."""
    text_model = torch.ones(TEXT_MODEL_BYTES // 4)
    edit_tensors(encoder_copy, lambda t: {**t, "text_model.embeddings.weight": text_model})
    if request.param == "open_clip":
        (encoder_copy / "config.json").rename(encoder_copy / "open_clip_config.json")
        (encoder_copy / "model.safetensors").rename(encoder_copy / "open_clip_model.safetensors")
    hub.repositories[NAME] = Repository(encoder_copy, private=True, readers=(token,))
    return encoder_copy

"""Repositories in the Xet store, by the real `hf_xet` and a store on disk.

`huggingface_hub` caches Xet downloads in a store that all repositories share, under the Xet hash.
Files of other programs in that store are used, and never modified.
"""

from __future__ import annotations

import logging
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, hf_hub_download

from siglip_port import CheckpointError, HubUnreachableError, SigLipVisionModel
from siglip_port.hub import xet
from tests.helpers.checkpoints import edit_tensors
from tests.helpers.hub_answers import Kind
from tests.helpers.hub_cache import NAME, TEXT_MODEL_BYTES, assert_same, own_files
from tests.helpers.hub_server import Fault, Hub, Repository

load = SigLipVisionModel.from_hf

COPY = "other/copy"
"""Another repository with the same weights."""

WEIGHTS = "model.safetensors"

HAS_STORE = hasattr(constants, "HF_HUB_DISABLE_SHARED_BLOBS")  # new in huggingface_hub 1.32
needs_store = pytest.mark.skipif(
    not HAS_STORE, reason="this release of huggingface_hub has no shared store"
)


@pytest.fixture(params=["encoder", "whole model"])
def folder(request: pytest.FixtureRequest, hub: Hub, encoder_copy: Path, tmp_path: Path) -> Path:
    """Folder of a repository with only a vision encoder, or with a whole model."""
    if request.param == "whole model":
        text_model = torch.ones(TEXT_MODEL_BYTES // 4)
        edit_tensors(encoder_copy, lambda t: {**t, "text_model.embeddings.weight": text_model})
    hub.repositories |= {NAME: Repository(encoder_copy), COPY: Repository(encoder_copy)}
    hub.store_by_xet(tmp_path / "xet", encoder_copy / WEIGHTS)
    return encoder_copy


def download(cache: Path, name: str = NAME) -> Path:
    """Download the weights as other programs do."""
    return Path(hf_hub_download(name, WEIGHTS, cache_dir=cache))


def shared_blobs(cache: Path) -> list[Path]:
    """Files in the store that all repositories share."""
    return [path for path in (cache / "blobs").rglob("*") if len(path.name) == 64]


VARIABLES = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_SHARED_BLOBS", "HF_HUB_DISABLE_SYMLINKS")


@pytest.fixture(params=["none", *VARIABLES])
def variable(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a variable that is set for the client, or `none`."""
    if request.param != "none":
        monkeypatch.setattr(constants, request.param, True, raising=False)
    return str(request.param)


@pytest.mark.usefixtures("variable")
@pytest.mark.parametrize("vision_only", [True, False])
def test_load(vision_only: bool, hub: Hub, folder: Path, cache: Path) -> None:
    options: dict[str, Any] = {"cache_dir": cache, "vision_only": vision_only}
    assert_same(load(NAME, **options), folder)
    hub.requests.clear()
    assert_same(load(NAME, **options), folder)
    assert hub.requests == {"HEAD config.json": 1}
    assert_same(load(NAME, **options, local_files_only=True), folder)


@pytest.mark.parametrize("vision_only", [True, False])
def test_file_of_other_program_is_used(
    variable: str, vision_only: bool, hub: Hub, folder: Path, cache: Path
) -> None:
    path = download(cache)
    assert bool(shared_blobs(cache)) == (variable == "none" and HAS_STORE)
    before = path.read_bytes()
    hub.sent.clear()
    for offline in (False, True):
        model = load(NAME, cache_dir=cache, vision_only=vision_only, local_files_only=offline)
        assert_same(model, folder)
    assert not hub.sent[WEIGHTS]
    assert path.read_bytes() == before


@needs_store
@pytest.mark.parametrize("vision_only", [True, False])
def test_damaged_shared_blob(
    vision_only: bool, hub: Hub, folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The file is downloaded again; the shared blob is not modified."""
    path = download(cache)
    copy = download(cache, COPY)
    (blob,) = shared_blobs(cache)
    assert path.resolve() == copy.resolve() == blob
    content = bytearray(blob.read_bytes())
    content[content.index(b"}}") + 5000] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(content)
    with pytest.raises(HubUnreachableError):  # no config.json yet
        load(NAME, cache_dir=cache, local_files_only=True)
    assert_same(load(NAME, cache_dir=cache, vision_only=vision_only), folder)
    assert f"{path}: damaged or modified after it was downloaded" in caplog.text
    assert copy.read_bytes() == blob.read_bytes() == content
    if vision_only and own_files(cache):
        message = "damaged, and downloads are disabled by local_files_only=True"
        with pytest.raises(CheckpointError, match=message):
            load(NAME, cache_dir=cache, local_files_only=True)
    else:
        assert_same(load(NAME, cache_dir=cache, local_files_only=True), folder)


def test_wrong_bytes_are_not_shared(hub: Hub, folder: Path, cache: Path) -> None:
    copy = download(cache, COPY)
    hub.faults = [Fault("wrong bytes", f"CDN * {WEIGHTS}", times=None, after=1000)]
    with pytest.raises(CheckpointError, match=r"model.safetensors was corrupted in transit"):
        load(NAME, cache_dir=cache, vision_only=False)
    assert copy.read_bytes() == (folder / WEIGHTS).read_bytes()
    assert shared_blobs(cache) == ([copy.resolve()] if HAS_STORE else [])


@pytest.mark.parametrize("kind", ["reset", "status"])
def test_xet_replaces_failing_cdn(
    kind: Kind, hub: Hub, folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.faults = [Fault(kind, "CDN *", times=None, status=403)]
    assert_same(load(NAME, cache_dir=cache), folder)
    assert "trying hf_xet" in caplog.text
    assert not hub.sent[WEIGHTS]
    assert_same(load(NAME, cache_dir=cache, local_files_only=True), folder)
    assert not list(cache.rglob("*.xet"))


@pytest.fixture(params=["silent", "closed"])
def dead_store(
    request: pytest.FixtureRequest, hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """A Xet store that does not respond or cannot be reached."""
    monkeypatch.setattr(xet, "CLIENT_IDLE_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if request.param == "closed":
            server.close()
            port = 9
        hub.xet_url = f"http://127.0.0.1:{port}"
        yield


@pytest.mark.usefixtures("dead_store")
def test_dead_store(hub: Hub, folder: Path, cache: Path) -> None:
    """The load does not wait for the store."""
    assert_same(load(NAME, cache_dir=cache), folder)  # the CDN suffices
    shutil.rmtree(cache)
    hub.faults = [Fault("reset", "CDN *", times=None)]
    message = r"no connection to localhost .*; the Xet store \(cas-server.* failed as well"
    with pytest.raises(HubUnreachableError, match=message):
        load(NAME, cache_dir=cache)


def test_xet_disabled(
    hub: Hub,
    folder: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub.faults = [Fault("reset", "CDN *", times=None)]
    with pytest.raises(HubUnreachableError, match="no connection to localhost"):
        load(NAME, cache_dir=cache)
    assert "hf_xet" not in caplog.text

"""Repositories in the Hub's Xet store, as the published ones are.

The real `hf_xet`, and a store on disk.

The Hub's client keeps what it fetches by Xet in a store that all repositories of a cache share,
where each file is called by Xet's own hash. What other programs have put there is used, and never
touched.
"""

from __future__ import annotations

import logging
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, hf_hub_download

from siglip_port import CheckpointError, HubUnreachableError, SigLipVisionModel
from siglip_port.hub import xet
from tests.helpers.checkpoints import edit_tensors
from tests.helpers.hub_cache import NAME, assert_same, kept
from tests.helpers.hub_server import Fault, Hub, Repository

load = SigLipVisionModel.from_hf

OTHER = "other/copy"  # the same bytes in another repository
WEIGHTS = "model.safetensors"

HAS_STORE = hasattr(constants, "HF_HUB_DISABLE_SHARED_BLOBS")  # the client has, since 1.32
needs_store = pytest.mark.skipif(
    not HAS_STORE, reason="this release of huggingface_hub has no shared store"
)


@pytest.fixture(params=["tower", "whole model"])
def folder(request: pytest.FixtureRequest, hub: Hub, copied: Path, tmp_path: Path) -> Path:
    """The folder of the repository that the Hub serves.

    A tower alone, or with what is beside it in a whole model.
    """
    folder = copied
    if request.param == "whole model":
        edit_tensors(folder, lambda t: {**t, "text_model.embeddings.weight": torch.ones(75_000)})
    hub.repositories |= {NAME: Repository(folder), OTHER: Repository(folder)}
    hub.store_by_xet(tmp_path / "xet", folder / WEIGHTS)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def by_the_client(cache: Path, name: str = NAME) -> Path:
    """Fetches the weights as other programs do."""
    return Path(hf_hub_download(name, WEIGHTS, cache_dir=cache))


def shared(cache: Path) -> list[Path]:
    """What is in the store that all repositories share."""
    return [path for path in (cache / "blobs").rglob("*") if len(path.name) == 64]


HOW: dict[str, dict[str, bool]] = {
    "as it is": {},
    "HF_HUB_DISABLE_XET": {"HF_HUB_DISABLE_XET": True},
    "HF_HUB_DISABLE_SHARED_BLOBS": {"HF_HUB_DISABLE_SHARED_BLOBS": True},
    "HF_HUB_DISABLE_SYMLINKS": {"HF_HUB_DISABLE_SYMLINKS": True},
}


@pytest.fixture(params=HOW)
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the client is set up."""
    for name, value in HOW[request.param].items():
        monkeypatch.setattr(constants, name, value, raising=False)
    return str(request.param)


@pytest.mark.parametrize("vision_only", [True, False])
def test_it_loads_and_loads_again(
    how: str, vision_only: bool, hub: Hub, folder: Path, cache: Path
) -> None:
    arguments: dict[str, Any] = {"cache_dir": cache, "vision_only": vision_only}
    assert_same(load(NAME, **arguments), folder)
    hub.requests.clear()
    assert_same(load(NAME, **arguments), folder)
    assert hub.requests == {"HEAD config.json": 1}
    assert_same(load(NAME, **arguments, local_files_only=True), folder)


@pytest.mark.parametrize("vision_only", [True, False])
def test_what_another_program_has_fetched_is_used(
    how: str, vision_only: bool, hub: Hub, folder: Path, cache: Path
) -> None:
    path = by_the_client(cache)
    assert bool(shared(cache)) == (how == "as it is" and HAS_STORE)
    before = path.read_bytes()
    hub.sent.clear()
    for offline in (False, True):
        model = load(NAME, cache_dir=cache, vision_only=vision_only, local_files_only=offline)
        assert_same(model, folder)
    assert not hub.sent[WEIGHTS]
    assert path.read_bytes() == before


@needs_store
@pytest.mark.parametrize("vision_only", [True, False])
def test_what_is_damaged_is_fetched_again_and_what_others_have_stays(
    vision_only: bool, hub: Hub, folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine, theirs = by_the_client(cache), by_the_client(cache, OTHER)
    (blob,) = shared(cache)
    assert mine.resolve() == theirs.resolve() == blob
    content = bytearray(blob.read_bytes())
    content[content.index(b"}}") + 5000] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(content)
    with pytest.raises(HubUnreachableError):  # no config.json yet
        load(NAME, cache_dir=cache, local_files_only=True)
    assert_same(load(NAME, cache_dir=cache, vision_only=vision_only), folder)
    assert f"{mine} is damaged, or was changed, since it was fetched from the Hub" in caplog.text
    assert theirs.read_bytes() == blob.read_bytes() == content
    if vision_only and kept(cache):
        with pytest.raises(
            CheckpointError, match="is damaged; it is fetched again when the Hub may be asked"
        ):
            load(NAME, cache_dir=cache, local_files_only=True)
    else:
        assert_same(load(NAME, cache_dir=cache, local_files_only=True), folder)


def test_bytes_that_are_wrong_on_their_way_harm_nobody(hub: Hub, folder: Path, cache: Path) -> None:
    theirs = by_the_client(cache, OTHER)
    hub.faults = [Fault("wrong bytes", f"CDN * {WEIGHTS}", times=None, after=1000)]
    with pytest.raises(CheckpointError, match="did not arrive as it left"):
        load(NAME, cache_dir=cache, vision_only=False)
    assert theirs.read_bytes() == (folder / WEIGHTS).read_bytes()
    assert shared(cache) == ([theirs.resolve()] if HAS_STORE else [])


@pytest.mark.parametrize("kind", ["reset", "status"])
def test_where_the_other_host_gives_nothing_xet_is_tried(
    kind: Any,  # noqa: ANN401
    hub: Hub,
    folder: Path,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    hub.faults = [Fault(kind, "CDN *", times=None, status=403)]
    assert_same(load(NAME, cache_dir=cache), folder)
    assert "trying hf_xet" in caplog.text
    assert not hub.sent[WEIGHTS]
    assert_same(load(NAME, cache_dir=cache, local_files_only=True), folder)
    assert not list(cache.rglob("*.xet"))


@pytest.mark.parametrize("silent", [True, False])
def test_a_xet_store_that_is_dead_is_not_waited_for(
    silent: bool, hub: Hub, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xet, "CLIENT_IDLE_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        if not silent:
            server.close()
        hub.xet_url = f"http://127.0.0.1:{server.getsockname()[1] if silent else 9}"
        assert_same(load(NAME, cache_dir=cache), folder)  # which needs none
        shutil.rmtree(cache)
        hub.faults = [Fault("reset", "CDN *", times=None)]
        with pytest.raises(
            HubUnreachableError,
            match=r"no connection to localhost .*; and the Xet store \(cas-server",
        ):
            load(NAME, cache_dir=cache)


def test_where_xet_is_off_it_is_not_tried(
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

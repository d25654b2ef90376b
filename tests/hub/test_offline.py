"""Loads without the Hub: from the cache, or an error that names the missing file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, hf_hub_download

from siglip_port import CheckpointError, HubUnreachableError, SigLipVisionModel
from siglip_port.checkpoint.inspect import inspect_checkpoint
from siglip_port.hub import HubOptions, find_source
from tests.helpers.checkpoints import SMALL, shard
from tests.helpers.hub_cache import NAME, assert_same
from tests.helpers.hub_server import Fault, Hub

load = SigLipVisionModel.from_hf


@pytest.mark.parametrize("vision_only", [True, False])
@pytest.mark.parametrize("setting", ["local_files_only", "HF_HUB_OFFLINE", "commit"])
def test_no_socket_is_opened(
    setting: str,
    vision_only: bool,
    hub: Hub,
    folder: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    commit = hub.repositories[NAME].commit
    load(NAME, cache_dir=cache, vision_only=vision_only)
    request.getfixturevalue("no_sockets")
    options: dict[str, Any] = {"cache_dir": cache}
    if setting == "HF_HUB_OFFLINE":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif setting == "local_files_only":
        options["local_files_only"] = True
    else:
        options["revision"] = commit
    model = load(NAME, **options)
    assert_same(model, folder)
    assert model.provenance is not None
    assert model.provenance.commit == commit
    assert inspect_checkpoint(find_source(NAME, HubOptions(**options))).problem is None


@pytest.mark.parametrize("in_shards", [False, True], ids=["one file", "shards"])
def test_cached_files_load(hub: Hub, vision_folder: Path, cache: Path, in_shards: bool) -> None:
    if in_shards:
        shard(vision_folder)
    load(NAME, cache_dir=cache)
    hub.requests.clear()
    assert load(NAME, cache_dir=cache, local_files_only=True).config == SMALL
    assert not hub.requests


def test_config_not_cached(hub: Hub, vision_folder: Path, cache: Path) -> None:
    message = (
        f"^{NAME}: config.json is not in the local cache, and downloads are disabled by "
        r"local_files_only=True; load it once online, or pass a local path"
    )
    with pytest.raises(HubUnreachableError, match=message):
        load(NAME, cache_dir=cache, local_files_only=True)


def test_absent_weights_are_remembered(hub: Hub, vision_folder: Path, cache: Path) -> None:
    (vision_folder / "model.safetensors").rename(vision_folder / "elsewhere")
    with pytest.raises(CheckpointError):
        load(NAME, cache_dir=cache)  # caches config.json alone
    with pytest.raises(CheckpointError, match=r"contains neither model.safetensors nor"):
        load(NAME, cache_dir=cache, local_files_only=True)


def test_weights_not_cached(hub: Hub, vision_folder: Path, cache: Path) -> None:
    hf_hub_download(NAME, "config.json", cache_dir=cache)
    message = f"^{NAME}: model.safetensors is not in the local cache, and downloads are disabled"
    with pytest.raises(HubUnreachableError, match=message):
        load(NAME, cache_dir=cache, local_files_only=True)


def test_open_clip_repository(hub: Hub, vision_folder: Path, cache: Path) -> None:
    """It has no config.json; the cache may or may not record that."""
    (vision_folder / "config.json").rename(vision_folder / "open_clip_config.json")
    weights = vision_folder / "model.safetensors"
    weights.rename(vision_folder / "open_clip_model.safetensors")
    assert load(NAME, cache_dir=cache).config == SMALL
    hub.faults = [Fault("status", status=501, times=None)]
    assert load(NAME, cache_dir=cache, local_files_only=True).config == SMALL
    for marker in cache.rglob(".no_exist"):
        shutil.rmtree(marker)
    assert load(NAME, cache_dir=cache, local_files_only=True).config == SMALL


def test_local_path_sends_no_request(hub: Hub, vision_folder: Path) -> None:
    load(vision_folder)
    load(vision_folder / "model.safetensors", revision="main")
    assert not hub.requests

"""Loads by the real `huggingface_hub` client from a Hub on loopback."""

from __future__ import annotations

from pathlib import Path

import pytest

from siglip_port import CheckpointError, SigLipVisionModel
from tests.helpers.checkpoints import shard
from tests.helpers.hub_cache import NAME, assert_same
from tests.helpers.hub_server import Hub

load = SigLipVisionModel.from_hf


def test_load(hub: Hub, vision_folder: Path, cache: Path) -> None:
    commit = hub.repositories[NAME].commit
    model = load(NAME, cache_dir=cache)
    assert_same(model, vision_folder)
    assert model.provenance is not None
    assert model.provenance.commit == commit
    assert str(model.provenance).startswith(f"source   {NAME} at commit {commit}\n")


def test_one_head_request_per_file(hub: Hub, vision_folder: Path, cache: Path) -> None:
    load(NAME, cache_dir=cache)
    heads = {key: count for key, count in hub.requests.items() if key.startswith("HEAD")}
    assert heads == {
        "HEAD config.json": 1,
        "HEAD model.safetensors": 1,
        "HEAD processor_config.json": 1,
        "HEAD preprocessor_config.json": 1,
    }


def test_pickled_weights_are_refused(hub: Hub, vision_folder: Path, cache: Path) -> None:
    (vision_folder / "model.safetensors").rename(vision_folder / "pytorch_model.bin")
    message = r"found: .*config.json, .*pytorch_model.bin.*; pickled weights .* not supported"
    with pytest.raises(CheckpointError, match=message):
        load(NAME, cache_dir=cache)
    assert hub.requests["GET pytorch_model.bin"] == 0
    message = r"google/siglip-small@v1 contains neither"
    with pytest.raises(CheckpointError, match=message):
        load(NAME, cache_dir=cache, revision="v1")


def test_neither_config_nor_weights(hub: Hub, vision_folder: Path, cache: Path) -> None:
    (vision_folder / "model.safetensors").rename(vision_folder / "pytorch_model.bin")
    (vision_folder / "config.json").unlink()
    message = r"contains neither .* found: .*pytorch_model.bin.*; pickled"
    with pytest.raises(CheckpointError, match=message):
        load(NAME, cache_dir=cache)


def test_missing_shard(hub: Hub, folder: Path, cache: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    message = r"has no file model-00002-of-00003.safetensors; unreadable tensors"
    with pytest.raises(CheckpointError, match=message):
        load(NAME, cache_dir=cache)

"""`subfolder=`: all files are those of a folder of the repository or local folder."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from siglip_port import CheckpointError, SigLipVisionModel
from siglip_port.checkpoint.inspect import inspect_checkpoint
from siglip_port.hub import HubOptions, find_source
from tests.helpers.checkpoints import SMALL, edit_tensors, shard
from tests.helpers.hub_cache import HEADER_BYTES, NAME, assert_same, encoder_bytes, own_files
from tests.helpers.hub_server import Fault, Hub, Repository

load = SigLipVisionModel.from_hf

SUBFOLDER = "parts/image_encoder"

PREPROCESSOR = {
    "image_processor_type": "SiglipImageProcessor",
    "image_mean": [0.1, 0.2, 0.3],
    "size": {"height": 16, "width": 16},
}


@pytest.fixture
def local(whole_model: Path, tmp_path: Path) -> Path:
    """A folder like a pipeline of diffusers, with the model in `SUBFOLDER`."""
    root = tmp_path / "pipeline"
    shutil.copytree(whole_model, root / SUBFOLDER)
    (root / SUBFOLDER / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    (root / "parts" / "feature_extractor").mkdir()
    (root / "parts" / "feature_extractor" / "preprocessor_config.json").write_text("{}")
    (root / "model_index.json").write_text("{}")
    (root / "vae").mkdir()
    (root / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"other")
    return root


@pytest.fixture
def served(hub: Hub, local: Path) -> Path:
    """`local`, served by the Hub."""
    hub.repositories[NAME] = Repository(local)
    return local


def assert_loaded(model: SigLipVisionModel, root: Path) -> None:
    assert_same(model, root / SUBFOLDER)
    assert model.preprocessor_config["image_mean"] == PREPROCESSOR["image_mean"]


# --- local folders --------------------------------------------------------------------------------


@pytest.mark.parametrize("subfolder", [SUBFOLDER, f"./{SUBFOLDER}/", "parts//image_encoder"])
def test_local(subfolder: str, local: Path) -> None:
    model = load(local, subfolder=subfolder)
    assert_loaded(model, local)
    assert model.provenance is not None
    assert str(model.provenance).startswith(f"source   {local}/{SUBFOLDER}\n")
    assert_loaded(load(model.provenance.source), local)


def test_other_files_are_not_read(local: Path) -> None:
    """Files at the root do not replace missing files of the subfolder."""
    for path in (local / SUBFOLDER).iterdir():
        shutil.copy(path, local / path.name)
    (local / SUBFOLDER / "config.json").unlink()
    with pytest.raises(CheckpointError, match=f"{SUBFOLDER} has no config.json, and the tensor"):
        load(local, subfolder=SUBFOLDER)
    assert load(local).config == SMALL


@pytest.mark.parametrize(
    ("subfolder", "message"),
    [
        ("", r"subfolder must be the relative path of a folder, .*, got ''; omit subfolder= for"),
        (".", r"subfolder must be the relative path of a folder, .*, got '\.'; omit"),
        ("../pipeline", r"subfolder must be .*, with forward slashes and without '\.\.', got"),
        ("parts/../vae", r"subfolder must be .* without '\.\.', got 'parts/\.\./vae'"),
        ("/etc", "subfolder must be the relative path of a folder, .*, got '/etc'"),
        ("parts\\image_encoder", "subfolder must be .* with forward slashes"),
        ("a\0b", "subfolder must be the relative path of a folder"),
        (3, "subfolder must be the relative path of a folder, .*, got int"),
        (Path("vae"), "subfolder must be the relative path of a folder, .*, got PosixPath"),
    ],
)
@pytest.mark.parametrize("on_hub", [False, True])
def test_invalid_subfolder(
    on_hub: bool, subfolder: str, message: str, hub: Hub, local: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(NAME if on_hub else local, subfolder=subfolder)
    assert not hub.requests


def test_absent_local_subfolder(local: Path) -> None:
    message = (
        f"{local} has no folder 'image_encoder'; weights are in its folder {SUBFOLDER}: pass "
        f"subfolder='{SUBFOLDER}'"
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        load(local, subfolder="image_encoder")
    file = local / SUBFOLDER / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"is a file, which has no folder 'x'; pass the"):
        load(file, subfolder="x")
    with pytest.raises(CheckpointError, match="has no folder 'x'; omit subfolder= if the weights"):
        load(local / SUBFOLDER, subfolder="x")


def test_root_without_weights_names_subfolders(local: Path) -> None:
    message = f"contains neither .*; weights are in its folder {SUBFOLDER}: pass subfolder="
    with pytest.raises(CheckpointError, match=message):
        load(local)
    shutil.copytree(local / SUBFOLDER, local / "second")
    message = f"weights are in its folders {SUBFOLDER}, second: pass one of them as subfolder=$"
    with pytest.raises(CheckpointError, match=message):
        load(local)
    with pytest.raises(CheckpointError, match=f"; weights are in its folders {SUBFOLDER}, second"):
        load(local, subfolder="vae")


def test_root_with_other_weights_names_subfolders(local: Path) -> None:
    """The root contains another model, such as a language model."""
    shutil.copytree(local / SUBFOLDER, local, dirs_exist_ok=True)
    edit_tensors(local, lambda tensors: {"model.norm.weight": torch.ones(3)})
    message = f"contains no SigLIP vision encoder .*; weights are in its folder {SUBFOLDER}: pass"
    with pytest.raises(CheckpointError, match=message):
        load(local)


def test_sibling(local: Path) -> None:
    """The image processor of a pipeline is in a folder beside the encoder."""
    expected = local / "parts" / "feature_extractor" / "preprocessor_config.json"
    source = find_source(local, subfolder=SUBFOLDER)
    assert source.get_sibling("feature_extractor", "preprocessor_config.json") == expected
    assert source.get_sibling("feature_extractor", "config.json") is None
    source = find_source(local / SUBFOLDER)
    assert source.get_sibling("feature_extractor", "preprocessor_config.json") == expected


# --- the Hub --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("links")
@pytest.mark.parametrize("vision_only", [True, False])
@pytest.mark.parametrize("in_shards", [False, True], ids=["one file", "shards"])
def test_hub(
    in_shards: bool,
    vision_only: bool,
    hub: Hub,
    served: Path,
    cache: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if in_shards:
        shard(served / SUBFOLDER)
    options: dict[str, Any] = {
        "subfolder": SUBFOLDER,
        "vision_only": vision_only,
        "cache_dir": cache,
    }
    model = load(NAME, **options)
    assert_loaded(model, served)
    assert model.provenance is not None
    commit = hub.repositories[NAME].commit
    source = f"hf://{NAME}/{SUBFOLDER}"
    assert str(model.provenance).startswith(f"source   {source} at commit {commit}\n")
    assert model.provenance.origin == f"{NAME}@{commit}"
    assert len(own_files(cache)) == vision_only
    assert "HEAD config.json" not in hub.requests  # nothing at the root

    hub.requests.clear()
    assert_loaded(load(NAME, **options), served)  # from the cache
    assert set(hub.requests) == {f"HEAD {SUBFOLDER}/config.json"}

    request.getfixturevalue("no_sockets")
    assert_loaded(load(NAME, **options, local_files_only=True), served)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_loaded(load(NAME, **options), served)
    assert_loaded(load(source, cache_dir=cache), served)


def test_only_vision_encoder_is_downloaded(hub: Hub, served: Path, cache: Path) -> None:
    load(NAME, subfolder=SUBFOLDER, cache_dir=cache)
    read = encoder_bytes(served / SUBFOLDER)
    assert hub.sent[f"{SUBFOLDER}/model.safetensors"] == HEADER_BYTES + read


def test_xet(
    hub: Hub, served: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.store_by_xet(tmp_path / "xet", served / SUBFOLDER / "model.safetensors")
    hub.faults = [Fault("reset", "CDN *", times=None)]
    assert_loaded(load(NAME, subfolder=SUBFOLDER, cache_dir=cache), served)
    assert "trying hf_xet" in caplog.text
    assert_loaded(load(NAME, subfolder=SUBFOLDER, cache_dir=cache, local_files_only=True), served)


def test_no_ranges(hub: Hub, served: Path, cache: Path) -> None:
    hub.ranges = False
    assert_loaded(load(NAME, subfolder=SUBFOLDER, cache_dir=cache), served)


def test_hub_unreachable_uses_cache(
    hub: Hub, served: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(NAME, subfolder=SUBFOLDER, cache_dir=cache)
    hub.faults = [Fault("status", "*", times=None, status=503)]
    assert_loaded(load(NAME, subfolder=SUBFOLDER, cache_dir=cache), served)
    assert "using the cached commit" in caplog.text


def test_two_subfolders_of_a_repository(hub: Hub, served: Path, cache: Path) -> None:
    """Each keeps its own partial download and configuration."""
    shutil.copytree(served / SUBFOLDER, served / "second")
    edit_tensors(served / "second", lambda t: {name: t[name] + 1 for name in t})
    for _ in range(2):
        assert_same(load(NAME, subfolder=SUBFOLDER, cache_dir=cache), served / SUBFOLDER)
        assert_same(load(NAME, subfolder="second", cache_dir=cache), served / "second")
    assert len(own_files(cache)) == 2
    for subfolder in (SUBFOLDER, "second"):
        model = load(NAME, subfolder=subfolder, cache_dir=cache, local_files_only=True)
        assert_same(model, served / subfolder)


def test_weights_file_in_subfolder(hub: Hub, served: Path, cache: Path) -> None:
    (served / SUBFOLDER / "model.safetensors").rename(served / SUBFOLDER / "a.safetensors")
    address = f"https://huggingface.co/{NAME}/blob/main/{SUBFOLDER}/a.safetensors"
    model = load(address, cache_dir=cache)
    assert model.config == SMALL
    assert model.preprocessor_config["image_mean"] == PREPROCESSOR["image_mean"]
    assert model.provenance is not None
    assert model.provenance.source == f"hf://{NAME}/{SUBFOLDER}/a.safetensors"
    assert load(model.provenance.source, cache_dir=cache).config == SMALL


def test_read_only_cache(
    hub: Hub, served: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Configurations are read from temporary copies."""
    cache.touch()  # a file in place of the folder
    source = find_source(NAME, HubOptions(cache_dir=cache), SUBFOLDER)
    path = source.get("config.json")
    assert path is not None
    assert path.read_bytes() == (served / SUBFOLDER / "config.json").read_bytes()
    assert f"{SUBFOLDER}/config.json cannot be cached" in caplog.text


def test_absent_hub_subfolder(hub: Hub, served: Path, cache: Path) -> None:
    message = (
        f"{NAME} has no folder 'image_encoder'; weights are in its folder {SUBFOLDER}: pass "
        f"subfolder='{SUBFOLDER}'"
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        load(NAME, subfolder="image_encoder", cache_dir=cache)
    with pytest.raises(CheckpointError, match=rf"^{NAME}@v1 has no folder 'x'; weights are in"):
        load(NAME, subfolder="x", cache_dir=cache, revision="v1")


def test_hub_root_without_weights_names_subfolder(hub: Hub, served: Path, cache: Path) -> None:
    message = f"{NAME} contains neither .*; weights are in its folder {SUBFOLDER}: pass subfolder="
    with pytest.raises(CheckpointError, match=message):
        load(NAME, cache_dir=cache)


def test_subfolder_not_cached(hub: Hub, served: Path, cache: Path) -> None:
    load(NAME, subfolder=SUBFOLDER, cache_dir=cache)
    message = f"{NAME}: other/config.json is not in the local cache, and downloads are disabled"
    with pytest.raises(CheckpointError, match=message):
        load(NAME, subfolder="other", cache_dir=cache, local_files_only=True)


def test_sibling_on_hub(hub: Hub, served: Path, cache: Path) -> None:
    source = find_source(NAME, HubOptions(cache_dir=cache), SUBFOLDER)
    path = source.get_sibling("feature_extractor", "preprocessor_config.json")
    assert path is not None
    assert path.read_text() == "{}"
    assert source.get_sibling("absent", "preprocessor_config.json") is None
    root = find_source(NAME, HubOptions(cache_dir=cache))
    assert root.get_sibling("parts", "config.json") is None


def test_inspect(hub: Hub, served: Path, cache: Path) -> None:
    result = inspect_checkpoint(find_source(NAME, HubOptions(cache_dir=cache), SUBFOLDER))
    assert result.problem is None
    assert result.source == f"hf://{NAME}/{SUBFOLDER}"
    assert result.files == ("model.safetensors",)

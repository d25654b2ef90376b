"""A load reads one commit, regardless of concurrent pushes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from siglip_port import CheckpointError, SigLipVisionModel
from siglip_port.checkpoint import reader
from siglip_port.checkpoint.json_files import read_config
from siglip_port.checkpoint.source import Source
from tests.helpers.checkpoints import edit_tensors
from tests.helpers.hub_cache import HEADER_BYTES, NAME, WEIGHTS, assert_same, own_files
from tests.helpers.hub_server import Hub

load = SigLipVisionModel.from_hf


@pytest.fixture
def new_folder(folder: Path, tmp_path: Path) -> Path:
    """A copy of the repository with other weights, not yet pushed."""
    new_folder = Path(shutil.copytree(folder, tmp_path / "pushed"))
    edit_tensors(new_folder, lambda t: {name: tensor + 1 for name, tensor in t.items()})
    return new_folder


def commit_of(model: SigLipVisionModel) -> str | None:
    assert model.provenance is not None
    return model.provenance.commit


def test_branch_tag_and_commit(hub: Hub, vision_folder: Path, cache: Path) -> None:
    commit = hub.repositories[NAME].commit
    for revision in ("main", "v1", commit):
        assert commit_of(load(NAME, revision=revision, cache_dir=cache)) == commit
    with pytest.raises(
        CheckpointError,
        match=rf"^{NAME}@v9: no such revision on the Hub \(HTTP 404: .*\); pass an existing branch",
    ):
        load(NAME, revision="v9", cache_dir=cache)


def test_pinned_to_commit_of_first_file(
    hub: Hub, vision_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are requested from the commit of config.json, which no longer exists; not `main`."""
    read = read_config

    def then_push(source: Source) -> object:
        config = read(source)
        edit_tensors(vision_folder, lambda t: t)
        return config

    monkeypatch.setattr(reader, "read_config", then_push)
    with pytest.raises(CheckpointError, match="no such revision"):
        load(NAME, cache_dir=cache)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("moment", ["HEAD config.json", "HEAD model.safetensors", WEIGHTS])
def test_push_between_requests(
    moment: str, hub: Hub, folder: Path, cache: Path, new_folder: Path
) -> None:
    first = hub.repositories[NAME].commit
    hub.after[moment] = lambda: hub.repositories[NAME].push(new_folder)
    model = load(NAME, cache_dir=cache)
    assert_same(model, folder if commit_of(model) == first else new_folder)
    assert_same(load(NAME, cache_dir=cache), new_folder)


def test_push_between_metadata_and_file(
    hub: Hub, folder: Path, cache: Path, new_folder: Path
) -> None:
    """The metadata is that of `main`; the file is requested from the commit of the metadata."""
    config = (folder / "config.json").read_text()
    assert "1e-06" in config
    (new_folder / "config.json").write_text(config.replace("1e-06", "1e-05"))
    first = hub.repositories[NAME].commit
    hub.after["HEAD config.json"] = lambda: hub.repositories[NAME].push(new_folder)
    model = load(NAME, cache_dir=cache)
    assert commit_of(model) == first
    assert hub.repositories[NAME].commit != first
    assert hub.requests["GET config.json"] == 1
    assert_same(model, folder)


def test_push_of_other_files(hub: Hub, folder: Path, cache: Path, tmp_path: Path) -> None:
    """If the weights are unchanged, only their header is downloaded."""
    load(NAME, cache_dir=cache)
    first = hub.repositories[NAME].commit
    new_folder = Path(shutil.copytree(folder, tmp_path / "pushed"))
    (new_folder / "README.md").write_text("new")
    hub.repositories[NAME].push(new_folder)
    hub.sent.clear()
    assert commit_of(load(NAME, cache_dir=cache)) == hub.repositories[NAME].commit != first
    assert hub.sent["model.safetensors"] == HEADER_BYTES
    assert len(own_files(cache)) == 1
    for revision in (first, "v1"):
        assert commit_of(load(NAME, cache_dir=cache, revision=revision)) == first


def test_origin_is_saved(hub: Hub, folder: Path, cache: Path, tmp_path: Path) -> None:
    """Saved checkpoints record the commit."""
    model = load(NAME, cache_dir=cache)
    origin = f"{NAME}@{hub.repositories[NAME].commit}"
    assert model.provenance is not None
    assert model.provenance.origin == origin
    model.save_hf(tmp_path / "hf")
    model.save_timm(tmp_path / "timm")
    load(tmp_path / "hf").save_hf(tmp_path / "again")
    for name in ("hf", "timm", "again"):
        provenance = load(tmp_path / name).provenance
        assert provenance is not None
        assert provenance.origin == origin
        assert str(provenance).startswith(f"source   {tmp_path / name}, saved from {origin}\n")
    edit_tensors(tmp_path / "hf", lambda t: t)  # written by another program
    provenance = load(tmp_path / "hf").provenance
    assert provenance is not None
    assert provenance.origin is None

"""Saving over another checkpoint: every reader sees one of the two, and nothing is mixed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import SiglipVisionModel

from siglip_port import CheckpointError, SigLipVisionModel
from siglip_port.checkpoint.extract import extract_model
from siglip_port.checkpoint.source import CONFIG, INDEX, WEIGHTS
from tests.helpers.checkpoints import SAVED_FILES
from tests.helpers.interrupted_changes import StopError, stop_at
from tests.helpers.models import random_model

Write = Callable[[SigLipVisionModel, Path], object]

WRITERS = (SigLipVisionModel.save_hf, SigLipVisionModel.save_timm, extract_model)

SHARD = "model-00001-of-00002.safetensors"


def write_shards(folder: Path, seed: int = 1) -> None:
    """Save another model in shards, as transformers does."""
    random_model(seed=seed).save_hf(folder)
    SiglipVisionModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="10KB")
    for name in (*SAVED_FILES, WEIGHTS):
        if name != CONFIG:
            (folder / name).unlink(missing_ok=True)


def load_by_index(folder: Path) -> dict[str, Tensor]:
    """Read a folder as vLLM does: the index if there is one, else every `*.safetensors` file."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if (folder / INDEX).exists():
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= load_file(folder / name)
    return tensors


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def is_same(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    if tensors.keys() != expected.keys():
        return False
    return all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("write", WRITERS)
def test_old_shards_are_removed(write: Write, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write_shards(folder)
    old = load_by_index(folder)
    shards = [path.name for path in folder.glob("*.safetensors")]
    assert len(shards) > 2
    (folder / "notes.txt").write_text("mine")
    model = random_model()
    write(model, folder)
    write(model, tmp_path / "new")
    assert read_files(folder) == {**read_files(tmp_path / "new"), "notes.txt": b"mine"}
    new = load_by_index(folder)
    assert is_same(new, load_file(tmp_path / "new" / WEIGHTS))
    assert not is_same(new, old)


def test_index_that_lists_the_weights_file(tmp_path: Path) -> None:
    random_model(seed=1).save_hf(tmp_path)
    names = load_file(tmp_path / WEIGHTS)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, WEIGHTS)}))
    random_model().save_hf(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == SAVED_FILES


@pytest.mark.parametrize(
    "content", ["not json", "{}", '{"weight_map": {"a": "../precious.safetensors"}}']
)
def test_damaged_index(content: str, tmp_path: Path) -> None:
    """The index is removed, but no file that it may list."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "precious.safetensors").write_text("mine")
    (folder / INDEX).write_text(content)
    random_model().save_hf(folder)
    assert sorted(path.name for path in folder.iterdir()) == SAVED_FILES
    assert (tmp_path / "precious.safetensors").read_text() == "mine"
    (folder / INDEX).write_text(content)
    (folder / SHARD).write_text("mine")
    with pytest.raises(CheckpointError, match=f"folder contains {SHARD}, other weights"):
        random_model().save_hf(folder)
    assert (folder / INDEX).read_text() == content
    assert (folder / SHARD).read_text() == "mine"


# --- interrupted saves ----------------------------------------------------------------------------


@pytest.mark.parametrize("killed", [False, True], ids=["error", "killed"])
@pytest.mark.parametrize("write", WRITERS)
def test_interrupted_save_over_shards(
    write: Write, killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model()
    write(model, tmp_path / "new")
    new_files = read_files(tmp_path / "new")
    new = load_by_index(tmp_path / "new")
    states = []
    for number in range(100):
        folder = tmp_path / f"{number}"
        write_shards(folder)
        old, old_files = load_by_index(folder), read_files(folder)
        with monkeypatch.context() as patch:
            stop_at(patch, number, killed=killed)
            try:
                write(model, folder)
            except StopError:
                states.append(state_of(folder, old, new, old_files[CONFIG]))
            else:
                break
        if not killed:
            assert read_files(folder) == old_files
        write(model, folder)
        assert read_files(folder) == new_files
    assert len(states) > 8
    assert set(states) == ({"old", "new", "refused"} if killed else {"old"})


def state_of(
    folder: Path, old: dict[str, Tensor], new: dict[str, Tensor], old_config: bytes
) -> str:
    """Return what a reader of the index loads from a folder."""
    try:
        tensors = load_by_index(folder)
    except FileNotFoundError:
        assert (folder / INDEX).exists()
        return "refused"
    if is_same(tensors, new):
        return "new"
    assert is_same(tensors, old)
    assert (folder / CONFIG).read_bytes() == old_config
    return "old"


# --- other files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("adapter_config.json", "adapters that transformers would add to the saved weights"),
        ("adapter_model.safetensors", "adapters that transformers would add"),
        (SHARD, "other weights that some libraries would read"),
        ("model.fp16.safetensors", "other weights"),
        ("open_clip_model.safetensors", "other weights"),
        ("open_clip_pytorch_model.bin", "other weights"),
        ("open_clip_config.json", "other weights"),
        ("consolidated.safetensors", "other weights"),
        ("consolidated.safetensors.index.json", "other weights"),
        ("pytorch_model.bin", "other weights"),
        ("pytorch_model-00001-of-00002.bin", "other weights"),
        ("pytorch_model.bin.index.json", "other weights"),
    ],
)
@pytest.mark.parametrize("write", WRITERS)
def test_folder_with_other_weights(write: Write, name: str, reason: str, tmp_path: Path) -> None:
    random_model(seed=1).save_hf(tmp_path)
    (tmp_path / name).write_text("mine")
    before = read_files(tmp_path)
    with pytest.raises(CheckpointError, match=f"contains {name}, {reason}") as error:
        write(random_model(), tmp_path)
    assert "save to another folder, or move them to another folder first" in str(error.value)
    assert read_files(tmp_path) == before
    (tmp_path / name).unlink()
    write(random_model(), tmp_path)


def test_unlisted_shard(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "model-00099-of-00099.safetensors").write_text("mine")
    with pytest.raises(CheckpointError, match=r"contains model-00099-of-00099\.safetensors, other"):
        random_model().save_hf(tmp_path)


@pytest.mark.parametrize("write", WRITERS)
def test_other_files_are_kept(write: Write, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5.safetensors").mkdir()
    names = ["tokenizer.json", "training_args.bin", "optimizer.pt", "README.md", ".gitattributes"]
    for name in names:
        (tmp_path / name).write_text("mine")
    write(random_model(), tmp_path)
    assert all((tmp_path / name).read_text() == "mine" for name in names)
    assert (tmp_path / "checkpoint-5.safetensors").is_dir()


def preprocessing(folder: Path) -> dict[str, Any]:
    return SigLipVisionModel.from_hf(folder).preprocessor_config


def test_old_preprocessing_is_removed(tmp_path: Path) -> None:
    """`processor_config.json` comes first in transformers; timm's values are in `config.json`."""
    model = random_model()
    old = {"image_processor_type": "SiglipImageProcessor", "image_mean": [0.1] * 3, "resample": 1}
    for write in (SigLipVisionModel.save_hf, SigLipVisionModel.save_timm):
        folder = tmp_path / write.__name__
        random_model(seed=1).save_hf(folder)
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": old}))
        assert preprocessing(folder)["image_mean"] == [0.1] * 3
        write(model, folder)
        assert preprocessing(folder) == model.preprocessor_config
        write(model, tmp_path / "new")
    assert read_files(folder) == read_files(tmp_path / "new")

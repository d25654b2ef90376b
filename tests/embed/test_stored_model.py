"""`search` loads the model of the embeddings again, or says that it has to be passed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from siglip_port import CheckpointError, SigLipVisionModel
from siglip_port.embed import EmbedError, embed
from siglip_port.embed.search import embed_query
from siglip_port.parity import randomize
from tests.helpers.checkpoints import SMALL, edit_config, edit_tensors
from tests.helpers.commands import run
from tests.helpers.embedding import OPTIONS, read_settings_file, readable_rows
from tests.helpers.hub_cache import NAME
from tests.helpers.hub_server import Hub, Repository
from tests.helpers.models import random_model

load = SigLipVisionModel.from_hf


@pytest.fixture
def images(photos: Path, finished_run: Path, tmp_path: Path) -> Path:
    """A folder of two readable images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, row in enumerate(readable_rows(finished_run)[:2]):
        shutil.copy(row["path"], folder / f"{number}{Path(row['path']).suffix}")
    return folder


def assert_found(
    output: Path,
    source: Path | None = None,
    layout: str | None = None,
    prefix: str | None = None,
) -> None:
    """Check that the query of a stored image has the stored embedding."""
    row = readable_rows(output)[0]
    query = embed_query(output, row["path"], source=source, layout=layout, prefix=prefix)
    stored = torch.tensor(row["embedding"])
    limit = 1e-5 if query.dtype == torch.float32 else 1e-2
    assert (query.float() - stored).norm() < limit * stored.norm()


def two_encoders(folder: Path) -> None:
    """Store two encoders with different weights in one file, `a.` and `b.`."""
    edit_tensors(
        folder,
        lambda tensors: {
            f"{prefix}.{name}": tensor * (1 + (prefix == "b"))
            for prefix in "ab"
            for name, tensor in tensors.items()
        },
    )


def missing_heads(folder: Path) -> None:
    """Describe another number of heads, which the weights do not contradict."""
    edit_config(folder, num_attention_heads=4)


def other_name(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")


@pytest.mark.parametrize(
    ("edit", "file", "options"),
    [
        (None, "", {}),
        (None, "", {"dtype": torch.bfloat16}),
        (two_encoders, "", {"layout": "huggingface", "prefix": "b.vision_model."}),
        (two_encoders, "", {"prefix": "a.vision_model"}),
        (missing_heads, "", {"config": SMALL}),
        (other_name, "a.safetensors", {}),
    ],
)
def test_model_is_loaded_as_it_was(
    edit: Callable[[Path], None] | None,
    file: str,
    options: dict[str, Any],
    encoder_copy: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Embedded with a relative path, and searched from another folder."""
    if edit is not None:
        edit(encoder_copy)
    monkeypatch.chdir(encoder_copy.parent)
    model = load(Path(encoder_copy.name, file), **options)
    embed([images], tmp_path / "output", model, **OPTIONS)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert_found(tmp_path / "output")
    moved = encoder_copy.rename(tmp_path / "moved")
    message = (
        f"output: the model of the embeddings, {encoder_copy.name}.*, is no longer at "
        f"{encoder_copy}.*; pass the model as source=$"
    )
    with pytest.raises(EmbedError, match=message):
        assert_found(tmp_path / "output")
    place = {name: options[name] for name in ("layout", "prefix") if name in options}
    assert_found(tmp_path / "output", source=moved / file, **place)
    monkeypatch.chdir(tmp_path)
    moved.rename(tmp_path / encoder_copy.name)
    assert_found(tmp_path / "output")  # at the relative path


def test_other_source_needs_its_own_prefix(
    encoder_copy: Path, images: Path, tmp_path: Path
) -> None:
    """An encoder that was saved on its own has another prefix than the stored one."""
    two_encoders(encoder_copy)
    model = load(encoder_copy, prefix="b.vision_model.")
    embed([images], tmp_path / "output", model, **OPTIONS)
    model.save_hf(tmp_path / "saved")
    assert_found(tmp_path / "output", source=tmp_path / "saved")
    with pytest.raises(CheckpointError, match="several vision encoders"):
        assert_found(tmp_path / "output", source=encoder_copy)


def test_naflex_interpolation_is_stored(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    Image.linear_gradient("L").resize((90, 40)).save(images / "wide.png")  # not the model's grid
    original = SigLipVisionModel(replace(SMALL, naflex=True, image_size=64)).eval()
    randomize(original, seed=0)
    original.save_hf(tmp_path / "naflex")
    model = load(tmp_path / "naflex", interpolation="hf")
    embed([images], tmp_path / "output", model, **OPTIONS)
    assert_found(tmp_path / "output")
    path = tmp_path / "output" / "_run.json"
    settings = json.loads(path.read_text())
    del settings["model"]["interpolation"]
    path.write_text(json.dumps(settings))
    with pytest.raises(AssertionError):
        assert_found(tmp_path / "output")


def test_subfolder_on_hub(
    hub: Hub,
    encoder_folder: Path,
    images: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    shutil.copytree(encoder_folder, tmp_path / "served" / "image_encoder")
    hub.repositories[NAME] = Repository(tmp_path / "served")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    model = load(NAME, subfolder="image_encoder")
    embed([images], tmp_path / "output", model, **OPTIONS)
    settings = read_settings_file(tmp_path / "output")
    assert settings["source"] == f"hf://{NAME}/image_encoder"
    assert settings["commit"] == hub.repositories[NAME].commit
    assert "model" not in settings
    assert_found(tmp_path / "output")
    row = readable_rows(tmp_path / "output")[0]
    hub.requests.clear()
    embed_query(tmp_path / "output", row["path"], local_files_only=True)
    assert not hub.requests


def test_model_in_memory(images: Path, tmp_path: Path) -> None:
    model = random_model(seed=0)
    embed([images], tmp_path / "output", model, **OPTIONS)
    message = (
        "output: the model of the embeddings was in memory, not loaded from a checkpoint; save it "
        "with save_hf, and pass the model as {}\n?$"
    )
    with pytest.raises(EmbedError, match=message.format("source=")):
        assert_found(tmp_path / "output")
    printed = run("search", tmp_path / "output", next(images.iterdir()), code=1).stderr
    assert printed.endswith("save it with save_hf, and pass the model as --model\n")
    model.save_hf(tmp_path / "saved")
    assert_found(tmp_path / "output", source=tmp_path / "saved")


def test_changed_after_loading(encoder_folder: Path, images: Path, tmp_path: Path) -> None:
    model = load(encoder_folder)
    randomize(model, seed=1)
    embed([images], tmp_path / "output", model, **OPTIONS)
    with pytest.raises(EmbedError, match=r"with other weights than those of .*; pass the model"):
        assert_found(tmp_path / "output")


def test_model_that_no_longer_loads(encoder_copy: Path, images: Path, tmp_path: Path) -> None:
    embed([images], tmp_path / "output", load(encoder_copy), **OPTIONS)
    (encoder_copy / "config.json").unlink()
    message = "the model of the embeddings cannot be loaded: .* no config.json.*; pass the model as"
    with pytest.raises(EmbedError, match=message):
        assert_found(tmp_path / "output")


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"future": 1}, "unknown arguments in its settings: future"),
        ({"dtype": "float3"}, "invalid model in its settings"),
        ({"config": {"embed_dim": -1}}, "invalid model in its settings"),
        ({"config": 3}, "invalid model in its settings"),
    ],
)
def test_damaged_settings(
    stored: dict[str, Any], message: str, finished_run: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(finished_run, tmp_path / "output"))
    settings = read_settings_file(output)
    (output / "_run.json").write_text(json.dumps({**settings, "model": stored}))
    with pytest.raises(EmbedError, match=message):
        assert_found(output)


def test_settings_without_model(finished_run: Path, tmp_path: Path) -> None:
    """As earlier versions wrote them."""
    output = Path(shutil.copytree(finished_run, tmp_path / "output"))
    settings = read_settings_file(output)
    del settings["model"]
    (output / "_run.json").write_text(json.dumps(settings))
    assert_found(output)

"""Saving: transformers and timm load the files, and a failure leaves the old files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import (
    SiglipVisionModel,
)
from transformers import SiglipVisionModel as ReferenceModel

from siglip_port import CheckpointError, SigLipVisionConfig, SigLipVisionModel, pack
from siglip_port.checkpoint import save_hf, save_timm
from siglip_port.checkpoint.extract import extract_model
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.siglip.reference import hf_config
from siglip_port.parity.stress_weights import randomize
from tests.helpers.checkpoints import (
    ODD,
    SAVED_FILES,
    SHALLOW,
    SMALL,
    MakeCheckpoint,
    edit_config,
    pixels,
)
from tests.helpers.hub_cache import assert_same

load = SigLipVisionModel.from_hf


@pytest.mark.parametrize(
    "config", [ODD, replace(SMALL, pooling_head=False, hidden_act="gelu")], ids=["head", "headless"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_save_and_load(tmp_path: Path, config: SigLipVisionConfig, dtype: torch.dtype) -> None:
    model = SigLipVisionModel(config).to(dtype).eval()
    randomize(model)
    model.save_hf(tmp_path / "new" / "folder")
    loaded = load(tmp_path / "new" / "folder")
    assert loaded.config == config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
        assert loaded.state_dict()[name].dtype == dtype
    reference, info = ReferenceModel.from_pretrained(
        tmp_path / "new" / "folder", output_loading_info=True
    )
    assert not any(info.values())
    assert reference.dtype == dtype
    x = pixels(config).to(dtype)
    torch.testing.assert_close(model(x), reference(x).last_hidden_state)
    with safe_open(tmp_path / "new" / "folder" / "model.safetensors", "pt") as file:
        assert all(name.startswith("vision_model.") for name in file.keys())  # noqa: SIM118
        assert file.metadata().keys() == {"format", "siglip_port_config"}
        assert file.metadata()["format"] == "pt"


def test_overwrite_own_source(checkpoint: MakeCheckpoint) -> None:
    """Saving replaces the file that the weights are mapped from, instead of overwriting it."""
    folder = checkpoint()
    model = load(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_hf(folder)
    for state in (model.state_dict(), load(folder).state_dict()):
        assert all(torch.equal(state[name], before[name]) for name in before)
    assert sorted(path.name for path in folder.iterdir()) == SAVED_FILES


def test_file_in_place_of_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    message = r"cannot be written to .*/file: it is a file; choose another folder$"
    with pytest.raises(CheckpointError, match=message):
        SigLipVisionModel(SMALL).save_hf(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_failed_save(checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("siglip_port.checkpoint.writer.json.dumps", fail)
    with pytest.raises(CheckpointError, match=r"cannot be written to .*no space left on device"):
        SigLipVisionModel(SMALL).save_hf(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_changed_modules(tmp_path: Path) -> None:
    model = SigLipVisionModel(SMALL)
    mlp = model.get_submodule("transformer.encoder.encoder_blocks.0.mlp")
    mlp.fc1 = torch.nn.Linear(24, 40, bias=False)
    model.adapter = torch.nn.Linear(1, 1)
    with pytest.raises(
        CheckpointError,
        match=r"missing tensors \(1\):\n(?s:.*)fc1.bias\n"
        r".*unexpected tensors \(2\):\n    adapter.bias",
    ):
        model.save_hf(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unsavable_tensors(tmp_path: Path) -> None:
    resized, meta, quantized = (SigLipVisionModel(SMALL) for _ in range(3))
    resized.transformer.embeddings.position_embedding = torch.nn.Embedding(9, 24)
    quantized.transformer.post_layernorm.to(torch.float8_e4m3fn)
    meta.to("meta")
    for model, message in [
        (
            resized,
            r"shapes that differ from the configuration \(1\):\n    "
            r"transformer.embeddings.position_embedding.weight",
        ),
        (meta, r"unsupported dtype or device \(68\):"),
        (
            quantized,
            r"unsupported dtype or device \(2\):\n    transformer.post_layernorm.bias",
        ),
    ]:
        with pytest.raises(CheckpointError, match=message):
            model.save_hf(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX only")
def test_file_mode(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        SigLipVisionModel(SMALL).save_hf(tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


@pytest.mark.parametrize("naflex", [False, True], ids=["fixed", "naflex"])
@pytest.mark.parametrize("head", [True, False], ids=["head", "headless"])
@torch.no_grad()
def test_transformers_loads_saved_model(naflex: bool, head: bool, tmp_path: Path) -> None:
    config = replace(SHALLOW, naflex=naflex, pooling_head=head, image_size=42)
    port = SigLipVisionModel(config).double().eval()
    randomize(port)
    port.save_hf(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == SAVED_FILES
    model = transformers.Siglip2VisionModel if naflex else SiglipVisionModel
    reference, info = model.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    x = pixels(config)
    inputs: dict[str, Any] = {**pack(list(x), 7)} if naflex else {"pixel_values": x}
    output = reference.double().eval()(**inputs)
    assert relative_error(port(x), output.last_hidden_state) <= 1e-10
    if head:
        assert relative_error(port.embed(x), output.pooler_output) <= 1e-10
    content = json.loads((tmp_path / "config.json").read_text())
    architecture = set(vars(hf_config(config))) & set(type(hf_config(config)).__annotations__)
    assert {
        name: getattr(hf_config(config), name) for name in architecture
    }.items() <= content.items()
    loaded = load(tmp_path)
    assert loaded.config == config
    assert all(torch.equal(t, port.state_dict()[n]) for n, t in loaded.state_dict().items())


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh"])
@torch.no_grad()
def test_timm_loads_saved_model(act: str, tmp_path: Path) -> None:
    port = SigLipVisionModel(replace(SHALLOW, hidden_act=act, image_size=46)).eval()
    randomize(port)
    port.save_timm(tmp_path)
    reference: Any = timm.create_model(
        f"local-dir:{tmp_path}", pretrained=True, num_classes=0
    ).eval()
    x = pixels(port.config).float()
    assert relative_error(port(x), reference.forward_features(x)) <= 1e-5
    assert relative_error(port.embed(x), reference(x)) <= 1e-5
    # The image size is 46, although the named architecture has 224.
    assert load(tmp_path).config == port.config


def test_timm_other_epsilon(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="layer_norm_eps must be 1e-6 in timm's SigLIP models, got 1e-05"
    ):
        SigLipVisionModel(replace(SHALLOW, layer_norm_eps=1e-5)).save_timm(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_mixed_files(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The two models differ only in the activation, so their shapes are the same."""
    model = SigLipVisionModel.from_hf(checkpoint())
    other = SigLipVisionModel.from_hf(checkpoint(), config=replace(SMALL, hidden_act="gelu"))
    for write in (SigLipVisionModel.save_hf, extract_model):
        folder = tmp_path / f"one {write.__name__}"
        other_folder = tmp_path / f"two {write.__name__}"
        write(model, folder)
        write(other, other_folder)
        assert SigLipVisionModel.from_hf(folder).config.hidden_act == "gelu_pytorch_tanh"
        assert SigLipVisionModel.from_hf(other_folder).config.hidden_act == "gelu"
        shutil.copy(folder / "config.json", other_folder)
        with pytest.raises(
            CheckpointError,
            match="the configuration is not the one that the weights were saved with",
        ):
            SigLipVisionModel.from_hf(other_folder)
        assert SigLipVisionModel.from_hf(other_folder, config=other.config).config == other.config


@pytest.mark.parametrize(
    "changes", [{"attention_dropout": 0.5}, {"vision_use_head": ...}, {"comment": "mine"}]
)
def test_harmless_edits(
    changes: dict[str, Any], checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    SigLipVisionModel.from_hf(checkpoint()).save_hf(tmp_path / "saved")
    edit_config(tmp_path / "saved", **changes)
    assert_same(SigLipVisionModel.from_hf(tmp_path / "saved"), tmp_path / "saved")


def test_save_is_deterministic(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    SigLipVisionModel.from_hf(checkpoint()).save_hf(tmp_path / "first")
    first = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    for i in range(8):  # safetensors writes the metadata in an arbitrary order
        again = tmp_path / f"again {i}"
        SigLipVisionModel.from_hf(checkpoint(name=f"{i}")).save_hf(again)
        assert {path.name: path.read_bytes() for path in again.iterdir()} == first


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def compile_transformer(model: Any) -> None:  # noqa: ANN401 (compiled parts have another type)
    model.transformer = torch.compile(model.transformer)


def wrap_transformer(model: Any) -> None:  # noqa: ANN401 (wrapped parts have another type)
    model.transformer = nn.DataParallel(model.transformer)


def parametrize_layer(model: SigLipVisionModel) -> None:
    parametrize.register_parametrization(model.transformer.post_layernorm, "weight", Doubled())


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (compile_transformer, "has a compiled part; put its _orig_mod back first, or use part.com"),
        (wrap_transformer, "has a wrapped part; put the module inside the wrapper back first"),
        (parametrize_layer, "has a parametrized weight; remove the parametrization first"),
    ],
)
def test_wrapped_part_is_named(
    wrap: Callable[[SigLipVisionModel], None], message: str, tmp_path: Path
) -> None:
    model = SigLipVisionModel(SMALL)
    wrap(model)
    for save in (model.save_hf, model.save_timm):
        with pytest.raises(
            CheckpointError, match=rf"^the model to be saved {message}.*transformer"
        ):
            save(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_wrapped_model_is_named(tmp_path: Path) -> None:
    wrapped: Any = nn.DataParallel(SigLipVisionModel(SMALL))
    for save in (save_hf, save_timm):
        with pytest.raises(CheckpointError, match=r"got DataParallel; pass .*, \.module of a"):
            save(wrapped, tmp_path)
    compiled: Any = torch.compile(wrapped.module)
    compiled.save_hf(tmp_path / "compiled")
    assert load(tmp_path / "compiled").config == SMALL

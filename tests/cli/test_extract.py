"""`siglip-port extract`: written files, verification and failures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers

from siglip_port import SigLipVisionModel
from siglip_port.checkpoint import extract as extraction
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.stress_weights import randomize
from tests.helpers.checkpoints import (
    ODD,
    SAVED_FILES,
    SMALL,
    MakeCheckpoint,
    edit_config,
    edit_tensors,
    pixels,
)
from tests.helpers.commands import inspect, run
from tests.helpers.flax import flax, write_npz
from tests.helpers.hub_server import Hub, Repository
from tests.helpers.other_libraries import timm_encoder
from tests.helpers.vision_language_models import build

PARAMETERS = sum(tensor.numel() for tensor in SigLipVisionModel(SMALL).state_dict().values())

load = SigLipVisionModel.from_hf


def test_extract_for_transformers(whole_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = run("extract", whole_model, out).stdout
    assert sorted(path.name for path in out.iterdir()) == SAVED_FILES
    assert printed.startswith(str(load(whole_model).provenance) + "\n")
    assert f"written  {out / 'README.md'} (" in printed
    assert f"\n         {out / 'config.json'} (" in printed
    assert "tokens [1, 4, 24] and embedding [1, 24] of a random image: bit-identical\n" in printed
    assert out.stat().st_mode == whole_model.stat().st_mode
    reference, info = transformers.SiglipVisionModel.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    whole = transformers.SiglipModel.from_pretrained(whole_model).eval()
    x = pixels(SMALL).float()
    with torch.no_grad():
        output, expected = reference.eval()(x), whole.vision_model(x)
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(output.pooler_output, expected.pooler_output)


def test_extract_for_timm(whole_model: Path, tmp_path: Path) -> None:
    run("extract", whole_model, tmp_path / "out", "--format", "timm")
    reference: Any = timm.create_model(
        f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0
    ).eval()
    x = pixels(SMALL).float()
    with torch.no_grad():
        assert relative_error(load(whole_model).embed(x), reference(x)) <= 1e-5
    assert "layout   timm, no prefix" in run("inspect", tmp_path / "out").stdout


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_extract_dtype(dtype: str, whole_model: Path, tmp_path: Path) -> None:
    run("extract", whole_model, tmp_path / "out", "--dtype", dtype)
    expected = load(whole_model, dtype=getattr(torch, dtype)).state_dict()
    assert all(
        torch.equal(tensor, expected[name])
        for name, tensor in load(tmp_path / "out").state_dict().items()
    )
    size = inspect(tmp_path / "out")["encoder"]["bytes"]
    assert size == PARAMETERS * getattr(torch, dtype).itemsize


@pytest.mark.parametrize("kind", ["timm-gap", "naflex", "npz", "idefics3"])
def test_extract_layouts(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    original = SigLipVisionModel(replace(ODD, naflex=kind == "naflex"))
    randomize(original)
    if kind == "timm-gap":
        timm.models.save_for_hf(
            timm_encoder("vit_base_patch16_siglip_gap_224"), str(source), safe_serialization=True
        )
    elif kind == "idefics3":
        build("idefics3")[0].save_pretrained(source)
    elif kind == "naflex":
        original.save_timm(source)
    else:
        source = source / "a.npz"
        write_npz(
            source, flax(replace(ODD, image_size=42), original.state_dict(), scanned=True), "img/"
        )
    printed = run("extract", source, tmp_path / "out").stdout
    assert ("interpolation='navit' is not stored; pass it to from_hf" in printed) == (
        kind == "idefics3"
    )
    assert (" and embedding [1, 72] of" in printed) == (kind != "idefics3")
    model, extracted = load(source), load(tmp_path / "out")
    assert extracted.config == replace(model.config, interpolation=None)
    assert all(
        torch.equal(tensor, model.state_dict()[name])
        for name, tensor in extracted.state_dict().items()
    )


def test_extract_one_of_several_encoders(two_encoders: Path, tmp_path: Path) -> None:
    run("extract", two_encoders, tmp_path / "out", "--prefix", "b.")
    expected = load(two_encoders, prefix="b.").state_dict()
    assert all(
        torch.equal(tensor, expected[name])
        for name, tensor in load(tmp_path / "out").state_dict().items()
    )


def test_extract_from_hub(hub: Hub, whole_model: Path, hub_cache: Path, tmp_path: Path) -> None:
    hub.repositories["google/a"] = Repository(whole_model)
    printed = run("extract", "google/a", tmp_path / "out", "--revision", "v1").stdout
    assert f"source   google/a at commit {hub.repositories['google/a'].commit}\n" in printed
    hub.requests.clear()
    run("extract", "google/a", tmp_path / "again", "--revision", "v1", "--offline")
    assert not hub.requests


def test_extract_refused_folders(whole_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for folder, message in (
        (out, "is not empty; pass another folder, or --force"),
        (tmp_path / "file", "is a file; pass a folder"),
        (tmp_path / "no" / "where", "does not exist; create it first"),
        (whole_model, "is not empty"),
        (Path("/"), "OUTPUT must be a folder name, got '/'"),
    ):
        assert message in run("extract", whole_model, folder, code=2).stderr
    for source in (whole_model, whole_model / "model.safetensors"):
        assert (
            "contains the source; pass another folder"
            in run("extract", source, whole_model, "--force", code=2).stderr
        )
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_extract_force(whole_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    run("extract", whole_model, out)
    (out / "precious").write_text("mine")
    (out / "model.safetensors").write_text("lost")
    printed = run("extract", whole_model, out, "--force").stdout
    assert "\nskipped" not in printed
    (out / "README.md").write_text("mine")
    printed = run("extract", whole_model, out, "--force").stdout
    assert f"\nskipped  {out / 'README.md'}, not written by siglip-port\n" in printed
    assert f"written  {out / 'config.json'} (" in printed
    assert (out / "README.md").read_text() == "mine"
    assert (out / "precious").read_text() == "mine"
    assert load(out).config == SMALL


def test_extract_refuses_adapters_before_loading(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "adapter_config.json").write_text("{}")
    result = run("extract", tmp_path / "no source", out, "--force", code=1)
    assert "out contains adapter_config.json, adapters that transformers would add" in result.stderr


def wrong_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    save = SigLipVisionModel.save_hf

    def save_damaged(self: SigLipVisionModel, folder: Path) -> None:
        save(self, folder)
        edit_tensors(folder, lambda tensors: {name: -tensor for name, tensor in tensors.items()})

    monkeypatch.setattr(SigLipVisionModel, "save_hf", save_damaged)


def wrong_config(monkeypatch: pytest.MonkeyPatch) -> None:
    save = SigLipVisionModel.save_hf

    def save_damaged(self: SigLipVisionModel, folder: Path) -> None:
        save(self, folder)
        edit_config(folder, hidden_act="gelu")

    monkeypatch.setattr(SigLipVisionModel, "save_hf", save_damaged)


def wrong_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "outputs_on_noise", lambda model: [torch.rand(2)])


def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(model: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(extraction, "outputs_on_noise", interrupt)


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        (
            wrong_weights,
            1,
            "the written files differ from the source and were removed; different: pooling_head",
        ),
        (
            wrong_config,
            1,
            "out: the configuration is not the one that the weights were saved with",
        ),
        (
            wrong_outputs,
            1,
            "and were removed; different: the outputs for a random image\n",
        ),
        (interrupted, 130, "interrupted\n"),
    ],
)
@pytest.mark.parametrize("exists", [False, True], ids=["new", "empty"])
def test_failed_extract_leaves_no_files(
    exists: bool,
    fault: Callable[[pytest.MonkeyPatch], None],
    code: int,
    message: str,
    whole_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if exists:
        (tmp_path / "out").mkdir()
    before = sorted(tmp_path.rglob("*"))
    fault(monkeypatch)
    result = run("extract", whole_model, tmp_path / "out", code=code)
    assert message in result.stderr
    assert result.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_extract_errors(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = checkpoint(replace(SMALL, layer_norm_eps=1e-5))
    result = run("extract", folder, tmp_path / "out", "--format", "timm", code=1)
    assert result.stderr == (
        "layer_norm_eps must be 1e-6 in timm's SigLIP models, got 1e-05; "
        "write the HuggingFace format instead\n"
    )
    edit_tensors(
        folder, lambda tensors: {name: t for name, t in tensors.items() if "fc1" not in name}
    )
    assert "missing tensors (8):" in run("extract", folder, tmp_path / "out", code=1).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["random_checkpoint"]


def test_extract_compares_bits() -> None:
    zero, nan = torch.zeros(2), torch.full((2,), torch.nan)
    assert extraction.is_same(nan, nan.clone())
    assert not extraction.is_same(zero, -zero)
    assert not extraction.is_same(zero, zero.double())
    assert not extraction.is_same(zero, torch.zeros(2, 1))
    assert not extraction.is_same(zero, None)

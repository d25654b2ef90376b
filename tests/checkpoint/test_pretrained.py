"""`from_hf`: sources, arguments, and global state."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from siglip_port import CheckpointError, SigLipVisionModel
from tests.helpers.checkpoints import (
    SMALL,
    MakeCheckpoint,
)

load = SigLipVisionModel.from_hf


def test_dtype_and_device(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    model = load(folder, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    exact = load(folder).state_dict()
    assert all(
        torch.equal(tensor, exact[name].bfloat16()) for name, tensor in model.state_dict().items()
    )
    for bad in ("bfloat16", torch.int8, "auto", torch.float8_e4m3fn):
        with pytest.raises(
            ValueError, match=r"^dtype must be one of torch.float64, torch.float32, .*, got "
        ):
            load(folder, dtype=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device must hold data, got 'meta'"):
        load(folder, device="meta")
    with pytest.raises(ValueError, match="device 'abacus' is not available on this machine"):
        load(folder, device="abacus")


def test_provenance(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    lines = str(load(folder, dtype=torch.bfloat16, pooling_head=False).provenance).splitlines()
    size = sum(
        t.nbytes
        for k, t in load_file(folder / "model.safetensors").items()
        if not k.startswith("head.")
    )
    whole = (folder / "model.safetensors").stat().st_size
    assert lines == [
        f"source   {folder}",
        "files    model.safetensors",
        "layout   HuggingFace, no prefix",
        "config   config.json",
        "pooling  none",
        "pixels   assumed: bicubic filter, pixels in [-1, 1] (no preprocessor_config.json)",
        f"read     {size / 1e3:.2f} of {whole / 1e3:.2f} kB, 53 tensors",
        "ignored  pooling head (11)",
        "dtype    torch.bfloat16 (stored: torch.float32)",
    ]
    assert SigLipVisionModel(SMALL).provenance is None


def test_global_state(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    before = (
        torch.get_rng_state(),
        random.getstate(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
    )
    load(folder)
    after = (
        torch.get_rng_state(),
        random.getstate(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
    )
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert torch.zeros(1).device.type == "cpu"


def test_invalid_sources(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    sources: list[tuple[str | Path, str]] = [
        (
            tmp_path / "empty",
            r"contains neither model.safetensors nor model.safetensors.index.json; found: nothing",
        ),
        (tmp_path / "absent", "is neither a local path nor a Hub id; pass a folder"),
        ("no/such/folder", "is neither a local path nor a Hub id; pass a folder"),
        ("nowhere/model.safetensors", "is neither a local path nor a Hub id; pass a folder"),
        ("", "is neither a local path nor a Hub id"),
        (
            tmp_path / "notes.txt",
            "neither a .safetensors nor an .npz file; pass one, or the checkpoint folder",
        ),
        ("a" * 5000, "cannot be read"),
        ("~no-such-user/encoder", "cannot be read"),
    ]
    for source, message in sources:
        with pytest.raises(CheckpointError, match=message):
            load(source)


@pytest.mark.parametrize("source", [None, 3, b"folder", ["folder"]])
def test_source_types(source: object) -> None:
    with pytest.raises(CheckpointError, match="source must be a path or a Hub id, got "):
        load(source)  # type: ignore[arg-type]


def test_path_like_hub_id(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    shutil.copytree(checkpoint(), tmp_path / "google" / "siglip")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        # An existing path takes precedence over a Hub id.
        assert load("google/siglip").config == SMALL


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": {"hidden_size": 72}}, "config must be a SigLipVisionConfig, got dict"),
        ({"prefix": 3}, "prefix must be a string, got 3"),
        ({"device": 1.5}, "device 1.5 is not available"),
    ],
)
def test_argument_types(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, **arguments)

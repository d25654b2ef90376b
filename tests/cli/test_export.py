"""`siglip-port export`: what it writes, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from siglip_port import SigLipVisionModel
from siglip_port.parity.metrics import relative_error
from tests.helpers.checkpoints import SMALL, pixels
from tests.helpers.commands import run


def test_export_onnx_and_program(whole_model: Path, tmp_path: Path) -> None:
    import onnxruntime

    out = tmp_path / "tower.onnx"
    printed = run("export", whole_model, out).stdout
    assert f"written  {out} (" in printed
    assert "compared with the encoder, in batches of 1, 2 and 5: differs by " in printed
    x = pixels(SMALL, 3).float()
    model = SigLipVisionModel.from_hf(whole_model)
    (tokens, *_) = onnxruntime.InferenceSession(out).run(None, {"pixel_values": x.numpy()})
    with torch.inference_mode():
        assert relative_error(torch.from_numpy(tokens), model(x).double()) < 1e-5
    run("export", whole_model, tmp_path / "tower.pt2", "--format", "program")
    assert torch.export.load(tmp_path / "tower.pt2").module()(x)[0].shape == tokens.shape


def test_export_errors(whole_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        "must be named *.pt2"
        in run("export", whole_model, "a.onnx", "--format", "package", code=2).output
    )
    assert "does not exist" in run("export", whole_model, tmp_path / "no" / "a.onnx", code=2).output
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert (
        "onnxruntime is not installed; run: pip install"
        in run("export", whole_model, tmp_path / "a.onnx", code=2).stderr
    )
    assert not (tmp_path / "a.onnx").exists()

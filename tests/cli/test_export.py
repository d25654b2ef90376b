"""`siglip-port export`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from siglip_port import SigLipVisionModel
from siglip_port.parity.metrics import relative_error
from siglip_port.text import format_bytes
from tests.helpers.checkpoints import SMALL, pixels
from tests.helpers.commands import run


def test_export_onnx_and_program(whole_model: Path, tmp_path: Path) -> None:
    import onnxruntime

    out = tmp_path / "encoder.onnx"
    printed = run("export", whole_model, out).stdout
    assert f"written  {out} (" in printed
    assert "verified relative difference " in printed
    assert " from the model, batch sizes 1, 2, 5" in printed
    x = pixels(SMALL, 3).float()
    model = SigLipVisionModel.from_hf(whole_model)
    (tokens, *_) = onnxruntime.InferenceSession(out).run(None, {"pixel_values": x.numpy()})
    with torch.inference_mode():
        assert relative_error(torch.from_numpy(tokens), model(x).double()) < 1e-5
    run("export", whole_model, tmp_path / "encoder.pt2", "--format", "program")
    assert torch.export.load(tmp_path / "encoder.pt2").module()(x)[0].shape == tokens.shape


def test_export_prints_every_file(
    whole_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from siglip_port.optimize import export

    monkeypatch.setattr(export, "MAX_INLINE_BYTES", 0)
    out = tmp_path / "encoder.onnx"
    printed = run("export", whole_model, out).stdout
    data = tmp_path / "encoder.onnx.data"
    assert f"written  {out} (" in printed
    assert f"\n         {data} ({format_bytes(data.stat().st_size)})\n" in printed
    assert sorted(tmp_path.glob("encoder*")) == [out, data]


def test_export_errors(whole_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        "OUTPUT must end in .pt2 with --format package"
        in run("export", whole_model, "a.onnx", "--format", "package", code=2).output
    )
    missing = run("export", whole_model, tmp_path / "no" / "a.onnx", code=2).output
    assert "folder " in missing
    assert "does not exist" in missing
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert (
        "onnxruntime is not installed; run: pip install"
        in run("export", whole_model, tmp_path / "a.onnx", code=2).stderr
    )
    assert not (tmp_path / "a.onnx").exists()

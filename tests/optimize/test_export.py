from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from siglip_port import SigLipVisionConfig, SigLipVisionModel, optimize
from siglip_port.optimize import export
from siglip_port.optimize import onednn as native
from siglip_port.optimize import selection as inference
from siglip_port.optimize.export import ExportError, export_onnx, export_package, export_program
from siglip_port.optimize.selection import BOUNDS
from siglip_port.parity import randomise
from tests.helpers.checkpoints import SMALL, pixels

HEADED = replace(SMALL, pooling_head=True, num_encoder_blocks=1)
Export = Callable[[SigLipVisionModel, Path], float]


def tower(config: SigLipVisionConfig = HEADED) -> SigLipVisionModel:
    model = SigLipVisionModel(config).eval()
    randomise(model, seed=0)
    return model


def close(ours: Tensor, theirs: Tensor) -> bool:
    return inference.difference([ours], [theirs]) <= BOUNDS[torch.float32]


@torch.inference_mode()
def test_onnx_runs_elsewhere(tmp_path: Path) -> None:
    import onnxruntime

    model, x = tower().train(), pixels(HEADED, 4).float()
    assert export_onnx(model, tmp_path / "tower.onnx") <= BOUNDS[torch.float32]
    assert [file.name for file in tmp_path.iterdir()] == ["tower.onnx"]
    assert all(part.training for part in model.modules())  # the model is left as it was
    session = onnxruntime.InferenceSession(tmp_path / "tower.onnx")
    assert [output.name for output in session.get_outputs()] == ["tokens", "pooled"]
    assert session.get_inputs()[0].shape[1:] == [3, HEADED.image_size, HEADED.image_size]
    tokens, pooled = session.run(None, {"pixel_values": x.numpy()})
    assert close(torch.from_numpy(tokens), model(x))
    assert close(torch.from_numpy(pooled), model.embed(x))


@torch.inference_mode()
def test_a_program_runs_in_a_process_without_this_package(tmp_path: Path) -> None:
    model, x = tower(replace(HEADED, pooling_head=False)), pixels(HEADED, 4).float()
    assert export_program(model, tmp_path / "tower.pt2") <= BOUNDS[torch.float32]
    torch.save(x, tmp_path / "x")
    code = (
        "import sys, torch; sys.modules['siglip_port'] = None\n"
        "out, = torch.export.load('tower.pt2').module()(torch.load('x')); torch.save(out, 'y')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    assert close(torch.load(tmp_path / "y"), model(x))


@torch.inference_mode()
def test_a_compiled_package_runs(tmp_path: Path) -> None:
    model, x = tower(), pixels(HEADED, 4).float()
    assert export_package(model, tmp_path / "tower.pt2") <= BOUNDS[torch.float32]
    tokens, pooled = native.load_package(tmp_path / "tower.pt2")(x)
    assert close(tokens, model(x))
    assert close(pooled, model.embed(x))


@pytest.mark.parametrize("write", [export_onnx, export_program])
def test_what_computes_something_else_is_refused_and_nothing_is_lost(
    write: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ("tower.onnx" if write is export_onnx else "tower.pt2")
    path.write_text("what was there")
    # The file is checked with pictures; a model that differs on them by 1e-4 stands for a wrong
    # file.
    monkeypatch.setattr(
        export,
        "difference",
        lambda ours, theirs: inference.difference([t * 1.0001 for t in ours], theirs),
    )
    with pytest.raises(
        ExportError,
        match=rf"{path.name} is not written: what it computes differs from .* 1\.0e-04, bound",
    ):
        write(tower(), path)
    assert path.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [path]


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("many lines\nInvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", fails)
    with pytest.raises(
        ExportError,
        match=r"tower\.pt2 is not written: InvalidCxxCompiler: No working C\+\+ compiler found",
    ):
        export_package(tower(), tmp_path / "tower.pt2")
    assert not list(tmp_path.iterdir())


def test_what_is_refused_before_any_work(tmp_path: Path) -> None:
    for write in (export_onnx, export_program, export_package):
        with pytest.raises(ExportError, match=r"the file must be named \*\.\w+, got 'tower\.bin'"):
            write(tower(), tmp_path / "tower.bin")
    with pytest.raises(
        ExportError, match=r"must be on the CPU, of torch.float32, got torch.bfloat16 on cpu"
    ):
        export_onnx(tower().bfloat16(), tmp_path / "tower.onnx")
    with pytest.raises(ExportError, match="model must be a SigLipVisionModel, got a str"):
        export_onnx("tower", tmp_path / "tower.onnx")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="path must be that of a file, got 5"):
        export_onnx(tower(), 5)  # type: ignore[arg-type]
    fast = optimize(tower(), engines=[], cache_dir=tmp_path / "kept")
    with pytest.raises(ExportError, match="export the one that it was made of"):
        export_program(fast, tmp_path / "tower.pt2")
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"tower\.pt2 is not written: "):
        export_program(tower(), tmp_path / "file" / "tower.pt2")
    assert not list(tmp_path.glob("tower*"))


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        ExportError, match=r"tower\.onnx is not written: it needs onnx, onnxscript and onnxruntime"
    ):
        export_onnx(tower(), tmp_path / "tower.onnx")
    assert not list(tmp_path.iterdir())

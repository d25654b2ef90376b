"""Export: files run in other programs, and wrong files are not written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from siglip_port import SigLipVisionModel, optimize
from siglip_port.extras import MissingExtraError
from siglip_port.optimize import export
from siglip_port.optimize.comparison import TOLERANCES, relative_difference
from siglip_port.optimize.export import (
    ExportError,
    export_onnx,
    export_package,
    export_program,
    load_package,
)
from tests.helpers.checkpoints import SMALL, pixels
from tests.helpers.models import random_model

CONFIG = replace(SMALL, pooling_head=True, num_encoder_blocks=1)
HEADLESS = replace(CONFIG, pooling_head=False)
TOLERANCE = TOLERANCES[torch.float32]

Export = Callable[[SigLipVisionModel, Path], float]


@pytest.fixture
def model() -> SigLipVisionModel:
    return random_model(CONFIG)


@pytest.fixture
def images() -> Tensor:
    return pixels(CONFIG, 4).float()


def is_close(output: Tensor, expected: Tensor) -> bool:
    return relative_difference([output], [expected]) <= TOLERANCE


# --- exported files -------------------------------------------------------------------------------


@torch.inference_mode()
def test_onnx(model: SigLipVisionModel, images: Tensor, tmp_path: Path) -> None:
    import onnxruntime

    model.train()
    assert export_onnx(model, tmp_path / "model.onnx") <= TOLERANCE
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert all(module.training for module in model.modules())  # unchanged
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [output.name for output in session.get_outputs()] == ["tokens", "pooled"]
    assert session.get_inputs()[0].shape[1:] == [3, CONFIG.image_size, CONFIG.image_size]
    tokens, pooled = session.run(None, {"pixel_values": images.numpy()})
    assert is_close(torch.from_numpy(tokens), model(images))
    assert is_close(torch.from_numpy(pooled), model.embed(images))


@torch.inference_mode()
def test_program_runs_without_siglip_port(images: Tensor, tmp_path: Path) -> None:
    model = random_model(HEADLESS)
    assert export_program(model, tmp_path / "model.pt2") <= TOLERANCE
    torch.save(images, tmp_path / "images")
    program = (
        "import sys, torch; sys.modules['siglip_port'] = None\n"
        "run = torch.export.load('model.pt2').module()\n"
        "tokens, = run(torch.load('images')); torch.save(tokens, 'tokens')"
    )
    command = [sys.executable, "-c", program]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert is_close(torch.load(tmp_path / "tokens"), model(images))


@pytest.mark.slow
@torch.inference_mode()
def test_package(model: SigLipVisionModel, images: Tensor, tmp_path: Path) -> None:
    assert export_package(model, tmp_path / "model.pt2") <= TOLERANCE
    tokens, pooled = load_package(tmp_path / "model.pt2")(images)
    assert is_close(tokens, model(images))
    assert is_close(pooled, model.embed(images))


# --- failed exports -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (export_program, "model.pt2"),
        pytest.param(export_onnx, "model.onnx", marks=pytest.mark.slow),
    ],
)
def test_file_with_wrong_outputs_is_not_written(
    write: Export,
    name: str,
    model: SigLipVisionModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An existing file is kept if the new one differs by 1e-4."""

    def difference_from_other(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
        return relative_difference([output * 1.0001 for output in outputs], expected)

    path = tmp_path / name
    path.write_text("old")
    monkeypatch.setattr(export, "relative_difference", difference_from_other)
    message = rf"{name} not written: relative difference from the model is 1\.0e-04, bound"
    with pytest.raises(ExportError, match=message):
        write(model, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_compiler_missing(
    model: SigLipVisionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("many lines\nInvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", fail)
    message = r"model\.pt2 not written: InvalidCxxCompiler: No working C\+\+ compiler found"
    with pytest.raises(ExportError, match=message):
        export_package(model, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_extra_missing(
    model: SigLipVisionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match="onnxruntime is not installed"):
        export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


# --- validation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [export_onnx, export_program, export_package])
def test_wrong_suffix(write: Export, model: SigLipVisionModel, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"path must end in \.\w+, got 'model\.bin'"):
        write(model, tmp_path / "model.bin")


def test_unusable_model(model: SigLipVisionModel, tmp_path: Path) -> None:
    message = r"model must be torch.float32 on a CPU, got torch.bfloat16 on cpu"
    with pytest.raises(ExportError, match=message):
        export_onnx(random_model(CONFIG).bfloat16(), tmp_path / "model.onnx")
    wrong: Any = "model"
    with pytest.raises(ExportError, match="model must be a SigLipVisionModel, got str"):
        export_onnx(wrong, tmp_path / "model.onnx")
    fast = optimize(model, engines=[], cache_dir=tmp_path / "cache")
    with pytest.raises(ExportError, match="model is already optimized; export the original model"):
        export_program(fast, tmp_path / "model.pt2")
    assert not list(tmp_path.glob("model*"))


def test_unusable_path(model: SigLipVisionModel, tmp_path: Path) -> None:
    wrong: Any = 5
    with pytest.raises(ExportError, match="path must be a string or path-like object, got 5"):
        export_onnx(model, wrong)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"model\.pt2 not written: "):
        export_program(model, tmp_path / "file" / "model.pt2")

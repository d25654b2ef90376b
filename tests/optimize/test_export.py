"""Export: files run in other programs, and wrong files are not written."""

from __future__ import annotations

import contextlib
import shutil
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
from siglip_port.config import SigLipVisionConfig
from siglip_port.extras import MissingExtraError
from siglip_port.optimize import export
from siglip_port.optimize.comparison import TOLERANCES, relative_difference
from siglip_port.optimize.export import (
    ONNX,
    PROGRAM,
    ExportedRun,
    ExportError,
    ExportFormat,
    export_model,
    export_onnx,
    export_package,
    export_program,
    load_package,
)
from tests.helpers.checkpoints import SMALL, pixels
from tests.helpers.interrupted_changes import stop_at
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


@pytest.mark.parametrize("config", [CONFIG, HEADLESS], ids=["head", "headless"])
def test_onnx_dimension_names(config: SigLipVisionConfig, tmp_path: Path) -> None:
    import onnx

    export_onnx(random_model(config), tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    size = config.image_size
    expected = {
        "pixel_values": ["batch", 3, size, size],
        "tokens": ["batch", config.num_patches, config.embed_dim],
    }
    if config.pooling_head:
        expected["pooled"] = ["batch", config.embed_dim]
    shapes = {}
    for value in [*graph.input, *graph.output]:
        dims = value.type.tensor_type.shape.dim
        shapes[value.name] = [dim.dim_param or dim.dim_value for dim in dims]
    assert shapes == expected


@torch.inference_mode()
def test_onnx_weights_in_second_file(
    model: SigLipVisionModel, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx
    import onnxruntime

    folder = tmp_path / "first"
    folder.mkdir()
    path = folder / "model.onnx"
    monkeypatch.setattr(export, "MAX_INLINE_BYTES", 0)
    for seed in (0, 1):  # the second export replaces both files
        model = random_model(CONFIG, seed=seed)
        assert export_onnx(model, path) <= TOLERANCE
        names = sorted(file.name for file in folder.iterdir())
        assert names == ["model.onnx", "model.onnx.data"]
        locations = set()
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            locations |= {entry.value for entry in tensor.external_data if entry.key == "location"}
        assert locations == {"model.onnx.data"}
        moved = shutil.copytree(folder, tmp_path / f"moved {seed}")
        session = onnxruntime.InferenceSession(moved / "model.onnx")
        tokens, pooled = session.run(None, {"pixel_values": images.numpy()})
        assert is_close(torch.from_numpy(tokens), model(images))
        assert is_close(torch.from_numpy(pooled), model.embed(images))
    monkeypatch.undo()
    export_onnx(model, path)
    assert list(folder.iterdir()) == [path]
    onnxruntime.InferenceSession(path)


@pytest.mark.slow  # 40 s, 7 GiB of memory
def test_onnx_above_2_gib(tmp_path: Path) -> None:
    import onnxruntime

    config = replace(HEADLESS, embed_dim=64, mlp_hidden_dim=4_400_000)
    model = SigLipVisionModel(config).eval()
    assert sum(parameter.nbytes for parameter in model.parameters()) > 2**31
    assert export_onnx(model, tmp_path / "model.onnx") <= TOLERANCE
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["model.onnx", "model.onnx.data"]
    onnxruntime.InferenceSession(tmp_path / "model.onnx")


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


@pytest.mark.parametrize("fault", ["does not open", "other outputs"])
@pytest.mark.parametrize("file_format", [ONNX, PROGRAM], ids=["onnx", "program"])
def test_file_that_fails_at_its_place(
    file_format: ExportFormat,
    fault: str,
    model: SigLipVisionModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The old files come back if the moved file does not open, or differs."""

    def load(path: Path) -> ExportedRun:
        run = file_format.load(path)
        if path.parent != tmp_path:
            return run
        if fault == "does not open":
            raise FileNotFoundError("model.data is missing")
        return lambda images: [output * 1.0001 for output in run(images)]

    path = tmp_path / f"model{file_format.suffix}"
    message = {
        "does not open": r"not written: model\.data is missing",
        "other outputs": r"not written: relative difference from the model is 1\.0e-04, bound",
    }[fault]
    monkeypatch.setattr(export, "MAX_INLINE_BYTES", 0)
    with pytest.raises(ExportError, match=message):
        export_model(model, path, replace(file_format, load=load))
    assert not list(tmp_path.iterdir())
    export_model(random_model(CONFIG, seed=5), path, file_format)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(before) == (2 if file_format is ONNX else 1)
    for limit in (0, 2**30):
        monkeypatch.setattr(export, "MAX_INLINE_BYTES", limit)
        with pytest.raises(ExportError, match=message):
            export_model(model, path, replace(file_format, load=load))
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@torch.inference_mode()
def test_killed_export(images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file never runs with the weights of another export."""
    monkeypatch.setattr(export, "MAX_INLINE_BYTES", 0)
    models = {name: random_model(HEADLESS, seed=seed) for seed, name in enumerate(("old", "new"))}
    for name, model in models.items():
        (tmp_path / name).mkdir()
        export_onnx(model, tmp_path / name / "model.onnx")

    def write(_: object, path: Path) -> None:
        shutil.copytree(tmp_path / "new", path.parent, dirs_exist_ok=True)

    states = []
    for number in range(4):
        path = Path(shutil.copytree(tmp_path / "old", tmp_path / f"{number}")) / "model.onnx"
        with monkeypatch.context() as patch:
            stop_at(patch, number, killed=True)
            with contextlib.suppress(ExportError):
                export_model(models["new"], path, replace(ONNX, write=write))
        states.append("missing")
        if path.exists():
            (tokens,) = export.load_onnx(path)(images)
            matches = [name for name in models if is_close(tokens, models[name](images))]
            states[-1] = " and ".join(matches)
    assert states == ["old", "missing", "missing", "new"]


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

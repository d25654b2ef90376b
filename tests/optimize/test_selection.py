"""`optimize`: selection of the engine, cache, and validation."""

from __future__ import annotations

import json
import logging
import pwd
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from siglip_port import CheckpointError, SigLipVisionModel, optimize
from siglip_port.optimize import ENGINES, OptimizedModel, cache, with_engine
from siglip_port.optimize.comparison import TOLERANCES, relative_difference
from siglip_port.optimize.engines import Engine
from siglip_port.optimize.onednn import PrepackedLinear
from tests.helpers.models import images_for

SECONDS = "siglip_port.optimize.selection.seconds_per_batch"


def is_prepacked(model: torch.nn.Module) -> bool:
    return any(isinstance(module, PrepackedLinear) for module in model.modules())


def prepacked_is_fast(model: torch.nn.Module, images: Tensor) -> float:
    return 1.0 if is_prepacked(model) else 2.0


def quantized_is_fast(model: torch.nn.Module, images: Tensor) -> float:
    return 2.0 if any(type(part) is torch.nn.Linear for part in model.modules()) else 1.0


# --- the choice -----------------------------------------------------------------------------------


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Fake timings: engine -> seconds."""
    times = {"eager": 5.0, "prepacked": 2.0, "prepacked-gelu": 4.0}
    engine_of: dict[int, str] = {}

    def track(name: str, use_engine: Engine) -> Engine:
        def use(model: OptimizedModel, cache: Path) -> None:
            use_engine(model, cache)
            engine_of[id(model)] = name

        return use

    for name in times:
        monkeypatch.setitem(ENGINES, name, track(name, ENGINES[name]))
    monkeypatch.setattr(SECONDS, lambda model, _: times[engine_of.get(id(model), "eager")])
    return times


ENGINE_NAMES = ["prepacked", "prepacked-gelu"]


def test_fastest_engine_is_chosen(
    seconds: dict[str, float], model: SigLipVisionModel, tmp_path: Path
) -> None:
    fast = optimize(model, engines=ENGINE_NAMES, batch_size=2, cache_dir=tmp_path)
    assert fast.choice.engine == "prepacked"
    assert fast.choice.milliseconds == {
        "eager": 2500.0,
        "prepacked": 1000.0,
        "prepacked-gelu": 2000.0,
    }
    assert "prepacked (float32, batch 2," in str(fast.choice)
    assert "prepacked 1000.0, prepacked-gelu 2000.0, eager 2500.0" in str(fast.choice)
    assert is_prepacked(fast)


def test_engine_two_percent_faster_is_not_chosen(
    seconds: dict[str, float], model: SigLipVisionModel, tmp_path: Path
) -> None:
    seconds.update({"prepacked": 4.9, "prepacked-gelu": 5.0})
    fast = optimize(model, engines=ENGINE_NAMES, cache_dir=tmp_path)
    assert fast.choice.engine == "eager"
    assert not is_prepacked(fast)


def test_unusable_engines_are_skipped(
    model: SigLipVisionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scale_by(factor: float) -> Engine:
        def use(model: OptimizedModel, cache: Path) -> None:
            norm = model.transformer.post_layernorm
            norm.weight = torch.nn.Parameter(norm.weight * factor)

        return use

    monkeypatch.setitem(ENGINES, "prepacked", scale_by(1.001))
    monkeypatch.setitem(ENGINES, "prepacked-gelu", scale_by(torch.nan))
    for package in ("openvino", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    fast = optimize(model, cache_dir=tmp_path)
    assert fast.choice.engine == "eager"
    skipped = fast.choice.skipped
    assert skipped["compiled"] == "requires a CUDA device, got cpu"
    assert (
        skipped["openvino"] == "openvino is not installed; run: pip install 'siglip-port[openvino]'"
    )
    assert (
        skipped["onnxruntime"]
        == "onnxruntime is not installed; run: pip install 'siglip-port[onnx]'"
    )
    assert skipped["prepacked"].endswith(", bound 2e-05")
    assert skipped["prepacked-gelu"] == "relative difference from eager is inf, bound 2e-05"
    assert "compiled skipped: requires a CUDA device" in str(fast.choice)


def test_int8(
    model: SigLipVisionModel, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SECONDS, quantized_is_fast)
    x = images_for(model)
    fast = optimize(model, dtype=torch.int8, cache_dir=own_cache)
    assert fast.choice.engine == "int8"
    assert 1e-4 < fast.choice.difference <= fast.choice.bound == TOLERANCES[torch.int8]
    with torch.inference_mode():
        assert fast(x).dtype == torch.float32
        assert torch.cosine_similarity(fast.embed(x), model.embed(x), dim=-1).min() > 0.99
    message = r"(?s)missing tensors.*unexpected tensors|unexpected tensors.*missing tensors"
    with pytest.raises(CheckpointError, match=message):
        fast.save_hf(tmp_path / "int8")


def test_int8_beyond_its_tolerance_is_skipped(
    model: SigLipVisionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOLERANCES, torch.int8, 1e-6)
    choice = optimize(model, dtype=torch.int8, cache_dir=tmp_path).choice
    assert choice.engine == "eager"
    assert "bound 1e-06" in choice.skipped["int8"]


def test_int8_is_not_default(model: SigLipVisionModel, own_cache: Path) -> None:
    choice = optimize(model, cache_dir=own_cache).choice
    assert "int8" not in choice.milliseconds
    assert "int8" not in choice.skipped


def test_no_side_effects(
    model: SigLipVisionModel, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model, its mode and gradients, and the global random state are unchanged."""
    monkeypatch.setattr(SECONDS, prepacked_is_fast)
    model.train()
    random_state = torch.get_rng_state()
    for dtype in (torch.float32, torch.int8):
        fast = optimize(model, dtype=dtype, cache_dir=own_cache)
        assert torch.equal(torch.get_rng_state(), random_state)
        assert not any(module.training for module in fast.modules())
        assert all(module.training for module in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_gradients_of_chosen_engine(
    model: SigLipVisionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SECONDS, prepacked_is_fast)
    fast = optimize(model, engines=["prepacked"], cache_dir=tmp_path)
    assert is_prepacked(fast)
    x = images_for(model).requires_grad_()
    fast.embed(x).sum().backward()
    assert x.grad is not None
    assert x.grad.any()


# --- the cache ------------------------------------------------------------------------------------


def test_choice_is_cached(
    model: SigLipVisionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"engines": ["prepacked"], "cache_dir": tmp_path}
    first = optimize(model, **options)
    x = images_for(model, 1)
    with monkeypatch.context() as patched:
        patched.setattr("siglip_port.optimize.selection.choose", None)  # not called a second time
        second = optimize(model, **options)
        assert second.choice == first.choice
        with torch.inference_mode():
            difference = relative_difference([second(x)], [model(x)])
        assert difference <= TOLERANCES[torch.float32]
        changes: list[dict[str, Any]]
        changes = [{"batch_size": 2}, {"engines": []}, {"dtype": torch.bfloat16}]
        for change in changes:
            with pytest.raises(TypeError, match="not callable"):
                optimize(model, **{**options, **change})
    with torch.no_grad():
        model.transformer.post_layernorm.bias[0] += 1  # other weights: compared and timed anew
    assert optimize(model, **options).choice
    assert len(list(tmp_path.glob("*/*.json"))) == 2


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"engine": "none", "conditions": ""}'])
def test_damaged_choice(content: str, model: SigLipVisionModel, tmp_path: Path) -> None:
    optimize(model, engines=["prepacked"], cache_dir=tmp_path)
    (file,) = tmp_path.glob("*/*.json")
    file.write_text(content)
    assert optimize(model, engines=["prepacked"], cache_dir=tmp_path).choice.engine in ENGINES
    assert json.loads(file.read_text())["bound"] == TOLERANCES[torch.float32]


def test_unwritable_cache(
    model: SigLipVisionModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning is logged; the next process measures again."""
    (tmp_path / "file").write_text("")
    cache = tmp_path / "file" / "cache"
    with caplog.at_level(logging.WARNING):
        fast = optimize(model, engines=["prepacked", "openvino"], cache_dir=cache)
    assert "engine choice not cached, the next process measures again: " in caplog.text
    assert "openvino" in fast.choice.skipped


# --- validation -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dtype": torch.int32},
            "dtype must be one of torch.float32, torch.bfloat16, torch.float16, torch.int8, got "
            "torch.int32",
        ),
        (
            {"engines": ["fast"]},
            r"engines must be a list of eager, prepacked, .*, got \['fast'\]",
        ),
        ({"engines": "prepacked"}, "engines must be a list of"),
        ({"engines": 5}, "engines must be a list of"),
        ({"engines": [["prepacked"]]}, "engines must be a list of"),
        (
            {"engines": ["int8"]},
            "engine int8 does not support dtype=None; the engine int8 and dtype=torch.int8 require",
        ),
        (
            {"engines": ["prepacked"], "dtype": torch.int8},
            "engine prepacked does not support dtype=torch.int8",
        ),
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({"batch_size": True}, "batch_size must be a positive integer, got True"),
        ({"cache_dir": 7}, "cache_dir must be a path, got 7"),
    ],
)
def test_wrong_option(
    options: dict[str, Any], message: str, model: SigLipVisionModel, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        optimize(model, **{"cache_dir": tmp_path, **options})
    assert not list(tmp_path.iterdir())


def test_unusable_model(model: SigLipVisionModel, tmp_path: Path) -> None:
    wrong: Any = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="model must be a SigLipVisionModel, got Linear"):
        optimize(wrong, cache_dir=tmp_path)
    fast = optimize(model, engines=[], cache_dir=tmp_path)
    with pytest.raises(ValueError, match="model is already optimized; pass the original model"):
        optimize(fast, cache_dir=tmp_path)
    message = r"parameters must have one dtype of torch.float32, .*, got torch.float64; pass dtype="
    with pytest.raises(ValueError, match=message):
        optimize(model.double(), cache_dir=tmp_path)
    model.pooling_head = None
    with pytest.raises(ValueError, match="the parameters do not match the model's configuration"):
        optimize(model, cache_dir=tmp_path)


# --- users and processes --------------------------------------------------------------------------


def test_user_without_home_folder(
    model: SigLipVisionModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in containers that run with any user id: no HOME, and no account."""

    def no_account(user: int) -> None:
        raise KeyError(user)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", no_account)
    cache.temporary_cache.cache_clear()
    with pytest.raises(RuntimeError, match="Could not determine home directory"):
        Path.home()
    x = images_for(model)
    with torch.inference_mode():
        assert torch.equal(with_engine(model, "eager").embed(x), model.embed(x))
    assert not caplog.records
    optimized = optimize(model, engines=["prepacked"])
    assert optimized.choice.engine in ("eager", "prepacked")
    folder = cache.user_cache()
    assert list(folder.rglob("*.json"))
    assert cache.user_cache() == folder
    (record,) = caplog.records
    assert "no home folder; set XDG_CACHE_HOME to a folder, or pass cache_dir=" in record.message
    cache.temporary_cache().cleanup()
    cache.temporary_cache.cache_clear()


def test_dtype_by_name(model: SigLipVisionModel, tmp_path: Path) -> None:
    assert optimize(model, dtype="bfloat16", engines=[], cache_dir=tmp_path).dtype == torch.bfloat16
    assert with_engine(model, "eager", dtype="float16").dtype == torch.float16
    assert with_engine(model, "eager", dtype="auto").dtype == torch.float32
    with pytest.raises(ValueError, match=r"dtype must be one of torch.float32, .*, got 'half'"):
        with_engine(model, "eager", dtype="half")


def test_parameters_made_in_inference_mode(model: SigLipVisionModel, tmp_path: Path) -> None:
    with torch.inference_mode():
        copies = [
            optimize(model, engines=["prepacked"], cache_dir=tmp_path),
            with_engine(model, "prepacked", dtype=torch.bfloat16, cache_dir=tmp_path),
        ]
    for optimized in copies:
        assert not any(parameter.is_inference() for parameter in optimized.parameters())

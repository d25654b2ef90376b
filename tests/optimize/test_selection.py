from __future__ import annotations

import copy
import json
import logging
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from siglip_port import (
    CheckpointError,
    OptimizedModel,
    SigLipVisionConfig,
    SigLipVisionModel,
    optimize,
    pack,
)
from siglip_port.optimize import onednn as native
from siglip_port.optimize import selection as inference
from siglip_port.optimize.selection import BOUNDS, ENGINES, EngineError
from siglip_port.parity import randomise
from siglip_port.parity.siglip import cases as proof
from tests.helpers.checkpoints import SMALL, pixels

ON_CPU = [name for name in ENGINES if name not in ("compiled", "int8")]
HEADED = replace(SMALL, pooling_head=True, interpolation="hf")


def tower(config: SigLipVisionConfig = HEADED, seed: int = 0) -> SigLipVisionModel:
    model = SigLipVisionModel(config).eval()
    randomise(model, seed=seed)
    return model


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all: what is compiled once serves every test of this file."""
    return tmp_path_factory.mktemp("engines")


def made_by(
    engine: str, model: SigLipVisionModel, kept: Path, dtype: torch.dtype | None = None
) -> OptimizedModel:
    return inference.in_form(model, engine, dtype=dtype, cache_dir=kept)


def difference(ours: Tensor, theirs: Tensor) -> float:
    return inference.difference([ours], [theirs])


@pytest.mark.parametrize("engine", ON_CPU)
@torch.inference_mode()
def test_every_engine_gives_what_the_tower_gives(engine: str, kept: Path) -> None:
    model = tower()
    fast = made_by(engine, model, kept)
    for batch in (1, 2, 5):
        x = pixels(HEADED, batch).float()
        assert difference(fast(x), model(x)) <= BOUNDS[torch.float32]
        assert (
            difference(fast.embed(x, normalize=True), model.embed(x, normalize=True))
            <= BOUNDS[torch.float32]
        )
    assert fast.transformer is not model.transformer
    assert set(fast.state_dict()) == set(model.state_dict())


@pytest.mark.parametrize("engine", ON_CPU)
@torch.inference_mode()
def test_every_method_works_in_every_form(engine: str, kept: Path, tmp_path: Path) -> None:
    model = tower()
    fast = made_by(engine, model, kept)
    x, wide = pixels(HEADED, 2).float(), torch.rand(1, 3, HEADED.image_size, 2 * HEADED.image_size)
    packed, bound = pack([wide[0], x[0]], HEADED.patch_size), BOUNDS[torch.float32]
    pairs = [
        (fast.hidden_states(x, [0, -2])[1], model.hidden_states(x, [0, -2])[1]),
        (fast.attention_maps(x, [0])[0], model.attention_maps(x, [0])[0]),
        (fast.pooling_attention(fast(x)), model.pooling_attention(model(x))),
        (fast(wide), model(wide)),
        (fast.embed(**packed), model.embed(**packed)),
        (fast(x[:0]), model(x[:0])),
    ]
    assert all(not ours.numel() or difference(ours, theirs) <= bound for ours, theirs in pairs)
    assert all(ours.shape == theirs.shape and ours.dtype == theirs.dtype for ours, theirs in pairs)
    for wrong in (x[0], x.int(), x[:, :2], "x"):
        with pytest.raises(ValueError, match="pixel_values must be"):
            fast(wrong)
    assert fast(x.double()).dtype == torch.float32
    fast.save_hf(tmp_path)
    again = SigLipVisionModel.from_hf(tmp_path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_the_other_dtypes(dtype: torch.dtype, kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, x = tower(), pixels(HEADED, 2).float()
    fast = optimize(model, dtype=dtype, engines=["packed", "packed-gelu"], cache_dir=kept)
    assert fast(x).dtype == fast.embed(x).dtype == dtype
    cosine = torch.cosine_similarity(fast.embed(x).float(), model.embed(x), dim=-1)
    assert cosine.min() > 0.999
    assert fast.choice.difference <= fast.choice.bound == BOUNDS[dtype]
    assert next(model.parameters()).dtype == torch.float32


def test_int8_is_for_those_who_ask(
    monkeypatch: pytest.MonkeyPatch, kept: Path, tmp_path: Path
) -> None:
    model, x = tower(), pixels(HEADED, 2).float()
    plain = lambda model, x: float(any(type(part) is torch.nn.Linear for part in model.modules()))  # noqa: E731
    monkeypatch.setattr(inference, "_seconds", plain)  # whatever is plain is slow
    fast = optimize(model, dtype=torch.int8, cache_dir=kept)
    assert fast.choice.engine == "int8"
    assert 1e-4 < fast.choice.difference <= fast.choice.bound == BOUNDS[torch.int8]
    with torch.inference_mode():
        assert fast(x).dtype == torch.float32
        assert torch.cosine_similarity(fast.embed(x), model.embed(x), dim=-1).min() > 0.99
    with pytest.raises(
        CheckpointError,
        match=r"(?s)missing tensors.*unknown tensors|unknown tensors.*missing tensors",
    ):
        fast.save_hf(tmp_path)
    assert "int8" not in optimize(model, cache_dir=tmp_path).choice.milliseconds
    monkeypatch.setitem(BOUNDS, torch.int8, 1e-6)
    refused = optimize(model, dtype=torch.int8, cache_dir=tmp_path).choice
    assert refused.engine == "eager"
    assert "bound 1e-06" in refused.left_out["int8"]


def test_the_fastest_is_taken_and_the_reason_told(
    monkeypatch: pytest.MonkeyPatch, kept: Path
) -> None:
    seconds = {"eager": 5.0, "packed": 2.0, "packed-gelu": 4.0}
    built: dict[int, str] = {}
    for name in seconds:
        make = ENGINES[name]
        monkeypatch.setitem(
            ENGINES,
            name,
            lambda model, kept, name=name, make=make: (
                make(model, kept),
                built.update({id(model): name}),
            ),
        )
    monkeypatch.setattr(
        inference, "_seconds", lambda model, pictures: seconds[built.get(id(model), "eager")]
    )
    fast = optimize(tower(seed=3), engines=["packed", "packed-gelu"], batch_size=2, cache_dir=kept)
    assert fast.choice.engine == "packed"
    assert fast.choice.milliseconds == {"eager": 2500.0, "packed": 1000.0, "packed-gelu": 2000.0}
    assert "packed (float32, batch 2," in str(fast.choice)
    assert "packed 1000.0, packed-gelu 2000.0, eager 2500.0" in str(fast.choice)
    assert any(isinstance(part, native.PackedLinear) for part in fast.modules())
    seconds["packed"], seconds["packed-gelu"] = 4.9, 5.0
    slow = optimize(tower(seed=3), engines=["packed", "packed-gelu"], cache_dir=kept)
    assert slow.choice.engine == "eager"  # two percent are not worth it
    assert not any(isinstance(part, native.PackedLinear) for part in slow.modules())


def test_what_cannot_be_used_is_told_and_the_tower_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def wrong(model: OptimizedModel, kept: Path) -> None:
        model.transformer.post_layernorm.weight = torch.nn.Parameter(
            model.transformer.post_layernorm.weight * 1.001
        )

    def nothing(model: OptimizedModel, kept: Path) -> None:
        model.transformer.post_layernorm.weight = torch.nn.Parameter(
            model.transformer.post_layernorm.weight * torch.nan
        )

    monkeypatch.setitem(ENGINES, "packed", wrong)
    monkeypatch.setitem(ENGINES, "packed-gelu", nothing)
    for package in ("openvino", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    fast = optimize(tower(), cache_dir=tmp_path)
    assert fast.choice.engine == "eager"
    left_out = fast.choice.left_out
    assert left_out["compiled"].startswith("it is for GPUs")
    assert left_out["openvino"] == "it is not installed: pip install 'siglip-port[openvino]'"
    assert left_out["onnxruntime"] == "it is not installed: pip install 'siglip-port[onnx]'"
    assert left_out["packed"].endswith(", bound 2e-05")
    assert left_out["packed-gelu"].startswith("its results differ from the tower's own by inf")
    assert "compiled is left out:" in str(fast.choice)


def test_what_was_found_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, x = tower(), pixels(HEADED, 1).float()
    first = optimize(model, engines=["packed"], cache_dir=tmp_path)
    (file,) = tmp_path.glob("*/*.json")
    monkeypatch.setattr(inference, "_choose", None)  # not asked a second time
    second = optimize(model, engines=["packed"], cache_dir=tmp_path)
    assert second.choice == first.choice
    with torch.inference_mode():
        assert difference(second(x), model(x)) <= BOUNDS[torch.float32]
    changes: list[dict[str, Any]] = [{"batch_size": 2}, {"engines": []}, {"dtype": torch.bfloat16}]
    for change in changes:
        with pytest.raises(TypeError, match="not callable"):
            optimize(model, **{"engines": ["packed"], "cache_dir": tmp_path, **change})
    monkeypatch.undo()
    with torch.no_grad():
        model.transformer.post_layernorm.bias[0] += 1  # other weights: compared and timed anew
    assert optimize(model, engines=["packed"], cache_dir=tmp_path).choice
    assert len(list(tmp_path.glob("*/*.json"))) == 2
    model = tower()
    for damage in ("", "{}", "[1]", '{"engine": "none", "conditions": ""}'):
        file.write_text(damage)
        assert optimize(model, engines=["packed"], cache_dir=tmp_path).choice.engine in ENGINES
        assert json.loads(file.read_text())["bound"] == BOUNDS[torch.float32]


@pytest.mark.parametrize(
    ("engine", "writer", "file"),
    [
        ("openvino", "openvino.convert_model", "tower-f32.xml"),
        ("onnxruntime", "siglip_port.optimize.selection.write_onnx", "tower.onnx"),
    ],
)
def test_another_program_s_file_is_written_once_for_its_weights(
    engine: str, writer: str, file: str, monkeypatch: pytest.MonkeyPatch, kept: Path
) -> None:
    model, x = tower(), pixels(HEADED, 3).float()
    made_by(engine, model, kept)
    before = set(kept.glob(f"*/{file}"))
    monkeypatch.setattr(writer, None)  # not called again
    with torch.inference_mode():
        assert difference(made_by(engine, model, kept)(x), model(x)) <= BOUNDS[torch.float32]
    assert before == set(kept.glob(f"*/{file}"))
    with torch.no_grad():
        model.transformer.post_layernorm.bias[0] += 1
    with pytest.raises(EngineError, match="not callable"):
        made_by(engine, model, kept)


@pytest.mark.parametrize(
    ("engine", "program", "file"),
    [("openvino", "OpenVINO", "tower-f32.xml"), ("onnxruntime", "ONNX Runtime", "tower.onnx")],
)
def test_a_damaged_file_of_an_engine_is_named(
    engine: str, program: str, file: str, tmp_path: Path
) -> None:
    model = tower()
    path = tmp_path / inference._fingerprint(inference.frozen(model, None)) / file
    path.parent.mkdir()
    path.write_text("<net")
    with pytest.raises(EngineError, match=f"{program} cannot take the tower: .*delete {path}"):
        made_by(engine, model, tmp_path)
    assert optimize(model, engines=[engine], cache_dir=tmp_path).choice.engine == "eager"


def test_packed_linears_follow_their_weights() -> None:
    model, x = tower(), pixels(HEADED, 2).float()
    fast = inference.frozen(model, None)
    native.pack(fast, fuse=True)
    with torch.inference_mode():
        before = fast(x)
    with torch.no_grad():
        fast.transformer.encoder.encoder_blocks[0].mlp.fc1.weight.mul_(1.5)  # type: ignore[union-attr, operator]
    with torch.inference_mode():
        assert difference(fast(x), before) > 1e-3
        assert difference(fast(x), model(x)) <= BOUNDS[torch.float32]  # they share their parameters


@pytest.mark.parametrize("engine", ON_CPU)
@torch.inference_mode()
def test_copies_casts_and_threads(engine: str, kept: Path) -> None:
    model, x = tower(), pixels(HEADED, 2).float()
    fast, bound = made_by(engine, model, kept), BOUNDS[torch.float32]
    many = [torch.rand(256, *x.shape[1:]) for _ in range(40)]  # large, so that threads meet
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(torch.inference_mode()(fast), many))
    assert all(
        difference(ours, model(pictures)) <= bound
        for ours, pictures in zip(found, many, strict=True)
    )
    assert difference(copy.deepcopy(fast)(x), model(x)) <= bound
    assert difference(pickle.loads(pickle.dumps(fast))(x), model(x)) <= bound
    truth = tower().double()(x)
    assert difference(fast.double()(x), truth) <= 1e-12  # an engine of float32 would show
    assert difference(fast.float()(x), truth) <= bound


@pytest.mark.parametrize("engine", ON_CPU)
def test_gradients_for_pixels_go_the_ordinary_way(engine: str, kept: Path) -> None:
    model = tower()
    fast = made_by(engine, model, kept)
    gradients = []
    for each in (fast, model):
        x = pixels(HEADED, 2).float().requires_grad_()
        each.embed(x).square().sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    assert difference(*gradients) <= 1e-4


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            {"dtype": torch.int32},
            "dtype must be one of torch.float32, torch.bfloat16, torch.float16, torch.int8, got "
            "torch.int32",
        ),
        (
            {"engines": ["fast"]},
            r"engines must be a list of some of eager, packed, .*, got \['fast'\]",
        ),
        ({"engines": "packed"}, "engines must be a list of some of"),
        ({"engines": 5}, "engines must be a list of some of"),
        ({"engines": [["packed"]]}, "engines must be a list of some of"),
        ({"engines": ["int8"]}, "engine int8 does not go with dtype None"),
        (
            {"engines": ["packed"], "dtype": torch.int8},
            "engine packed does not go with dtype torch.int8",
        ),
        ({"batch_size": 0}, "batch_size must be a whole number from 1 on, got 0"),
        ({"batch_size": True}, "batch_size must be a whole number from 1 on, got True"),
        ({"cache_dir": 7}, "cache_dir must be a path, got 7"),
    ],
)
def test_wrong_arguments(how: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        optimize(tower(), **{"cache_dir": tmp_path, **how})
    assert not list(tmp_path.iterdir())


def test_what_was_optimized_has_gradients_and_nothing_global_has_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(inference, "_seconds", lambda model, x: float(not _is_packed(model)))
    model, x, before = (
        tower().train(),
        pixels(HEADED, 2).float().requires_grad_(),
        torch.get_rng_state(),
    )
    for dtype in (torch.float32, torch.int8):
        fast = optimize(model, dtype=dtype, cache_dir=tmp_path)
        assert torch.equal(torch.get_rng_state(), before)
        assert not any(part.training for part in fast.modules())
        assert all(part.training for part in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters())
    fast = optimize(model, cache_dir=tmp_path)
    assert _is_packed(fast)
    fast.embed(x).sum().backward()
    assert x.grad is not None
    assert x.grad.any()


def _is_packed(model: torch.nn.Module) -> bool:
    return any(isinstance(part, native.PackedLinear) for part in model.modules())


def test_what_is_no_tower(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model must be a SigLipVisionModel, got a Linear"):
        optimize(torch.nn.Linear(1, 1), cache_dir=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is optimized already"):
        optimize(optimize(tower(), engines=[], cache_dir=tmp_path), cache_dir=tmp_path)
    wrapped = tower()
    wrapped.pooling_head = None
    with pytest.raises(ValueError, match="not those of a SigLIP tower"):
        optimize(wrapped, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="name one dtype with dtype="):
        optimize(tower().double(), cache_dir=tmp_path)


def test_a_folder_that_cannot_be_written_to_costs_only_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        fast = optimize(
            tower(), engines=["packed", "openvino"], cache_dir=tmp_path / "file" / "kept"
        )
    assert "what was found is not kept" in caplog.text
    assert "openvino" in fast.choice.left_out


def test_engines_that_this_dtype_or_machine_has_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match="it is for float32 and bfloat16 on CPUs"):
        made_by("openvino", tower(), tmp_path, torch.float16)
    with pytest.raises(EngineError, match="it is for float32 on CPUs"):
        made_by("onnxruntime", tower(), tmp_path, torch.bfloat16)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(EngineError, match="built without oneDNN"):
        made_by("packed", tower(), tmp_path)


def test_the_whole_harness_passes_the_packed_form(kept: Path) -> None:
    """At every step inside: Linears that are packed stand where Linears stood.

    With a mistake in one, it does not.
    """
    wanted = ("environment", "config", "weights", "liveness", "semantics", "interface", "rounding")
    with proof.random_case(proof.ODD, "L7", gates=wanted) as case:
        port = made_by("packed", SigLipVisionModel.from_hf(case.source), kept)
        assert [str(gate) for gate in case.check(port) if not gate.passed] == []
        port.transformer.encoder.encoder_blocks[4].mlp.fc2.algorithm = "tanh"  # type: ignore[union-attr]
        port.transformer.encoder.encoder_blocks[4].mlp.fc2.activation = "gelu"  # type: ignore[union-attr]
        assert {gate.name for gate in case.check(port) if not gate.passed} >= {
            "semantics",
            "rounding float32",
        }


@pytest.mark.parametrize("engine", ON_CPU)
def test_rounding_of_every_engine_is_that_of_the_reference(engine: str, kept: Path) -> None:
    """The gate of the comparison, with the weights that make rounding loud, on what comes out of each engine."""
    with proof.random_case(proof.ODD, "L7", gates=("rounding",)) as case:
        port = SigLipVisionModel.from_hf(case.source)
        (gate,) = proof.engine_gates(case, port, engine, kept)
        assert gate.name == f"rounding float32, {engine}"
        assert gate.passed, gate.findings
        assert gate.checked >= 2
        (rough,) = proof.engine_gates(case, port.bfloat16().float(), engine, kept)
        assert not rough.passed


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_what_an_engine_computes_reaches_the_gate(
    engine: str, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tower's own modules are not what is judged.

    With a mistake in the engine alone, the gate fails.
    """
    make = ENGINES[engine]

    def slightly_off(model: OptimizedModel, kept: Path) -> None:
        make(model, kept)
        assert isinstance(model.transformer, inference.EngineTransformer)
        run = model.transformer.run
        assert run is not None
        model.transformer.run = lambda x: run(x) * 1.01

    monkeypatch.setitem(ENGINES, engine, slightly_off)
    with proof.random_case(proof.ODD, "L7", gates=("rounding",)) as case:
        (gate,) = proof.engine_gates(case, SigLipVisionModel.from_hf(case.source), engine, kept)
        assert not gate.passed

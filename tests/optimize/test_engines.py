"""Every engine gives the results of the model, for every method."""

from __future__ import annotations

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from siglip_port import EncoderBlock, SigLipVisionConfig, SigLipVisionModel, optimize, pack
from siglip_port.extras import MissingExtraError
from siglip_port.optimize import ENGINES, EngineError, OptimizedModel, with_engine
from siglip_port.optimize.cache import model_fingerprint
from siglip_port.optimize.comparison import TOLERANCES, relative_difference
from siglip_port.optimize.onednn import PrepackedLinear, fuse_gelu, prepack_linears
from siglip_port.optimize.optimized_model import EngineTransformer, inference_copy
from siglip_port.parity.siglip import cases
from tests.helpers.models import images_for

CPU_ENGINES = [name for name in ENGINES if name not in ("compiled", "int8")]
TOLERANCE = TOLERANCES[torch.float32]
SHALLOW = replace(cases.ODD, num_encoder_blocks=2)

# OpenVINO and ONNX Runtime compile for many seconds: the default run uses two blocks.
CONFIGS = [
    pytest.param(SHALLOW, id="2 blocks"),
    pytest.param(cases.ODD, id="11 blocks", marks=pytest.mark.slow),
]


def difference(output: Tensor, expected: Tensor) -> float:
    return relative_difference([output], [expected])


# --- the same results -----------------------------------------------------------------------------


@pytest.mark.parametrize("engine", CPU_ENGINES)
@torch.inference_mode()
def test_forward_and_embed(engine: str, model: SigLipVisionModel, engine_cache: Path) -> None:
    fast = with_engine(model, engine, cache_dir=engine_cache)
    for batch_size in (1, 2, 5):
        x = images_for(model, batch_size)
        assert difference(fast(x), model(x)) <= TOLERANCE
        vectors = fast.embed(x, normalize=True)
        assert difference(vectors, model.embed(x, normalize=True)) <= TOLERANCE
    assert fast.transformer is not model.transformer
    assert set(fast.state_dict()) == set(model.state_dict())


@pytest.mark.parametrize("engine", CPU_ENGINES)
@torch.inference_mode()
def test_other_methods(engine: str, model: SigLipVisionModel, engine_cache: Path) -> None:
    fast = with_engine(model, engine, cache_dir=engine_cache)
    x = images_for(model, 2)
    size = model.config.image_size
    wide = torch.rand(1, 3, size, 2 * size)
    packed = pack([wide[0], x[0]], model.config.patch_size)
    results = [
        (fast.hidden_states(x, [0, -2])[1], model.hidden_states(x, [0, -2])[1]),
        (fast.attention_maps(x, [0])[0], model.attention_maps(x, [0])[0]),
        (fast.pooling_attention(fast(x)), model.pooling_attention(model(x))),
        (fast(wide), model(wide)),
        (fast.embed(**packed), model.embed(**packed)),
    ]
    for output, expected in results:
        assert output.shape == expected.shape
        assert output.dtype == expected.dtype
        assert difference(output, expected) <= TOLERANCE
    assert fast(x[:0]).shape == model(x[:0]).shape
    assert fast(x.double()).dtype == torch.float32


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_wrong_input(engine: str, model: SigLipVisionModel, engine_cache: Path) -> None:
    fast = with_engine(model, engine, cache_dir=engine_cache)
    x = images_for(model, 2)
    for wrong in (x[0], x.int(), x[:, :2], "x"):
        with pytest.raises(ValueError, match="pixel_values must be"):
            fast(wrong)


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_save_hf(engine: str, model: SigLipVisionModel, engine_cache: Path, tmp_path: Path) -> None:
    with_engine(model, engine, cache_dir=engine_cache).save_hf(tmp_path)
    loaded = SigLipVisionModel.from_hf(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_low_precision(dtype: torch.dtype, model: SigLipVisionModel, engine_cache: Path) -> None:
    engines = ["prepacked", "prepacked-gelu"]
    fast = optimize(model, dtype=dtype, engines=engines, cache_dir=engine_cache)
    x = images_for(model, 2)
    assert fast(x).dtype == fast.embed(x).dtype == dtype
    cosine = torch.cosine_similarity(fast.embed(x).float(), model.embed(x), dim=-1)
    assert cosine.min() > 0.999
    assert fast.choice.difference <= fast.choice.bound == TOLERANCES[dtype]
    assert model.dtype == torch.float32


# --- threads, copies, casts, gradients ------------------------------------------------------------


@pytest.mark.parametrize("engine", CPU_ENGINES)
@torch.inference_mode()
def test_threads(engine: str, model: SigLipVisionModel, engine_cache: Path) -> None:
    fast = with_engine(model, engine, cache_dir=engine_cache)
    size = model.config.image_size
    batches = [torch.rand(256, 3, size, size) for _ in range(40)]  # large, so that threads overlap
    with ThreadPoolExecutor(8) as threads:
        outputs = list(threads.map(torch.inference_mode()(fast), batches))
    for output, batch in zip(outputs, batches, strict=True):
        assert difference(output, model(batch)) <= TOLERANCE


@pytest.mark.parametrize("engine", CPU_ENGINES)
@torch.inference_mode()
def test_copies_and_casts(engine: str, model: SigLipVisionModel, engine_cache: Path) -> None:
    fast = with_engine(model, engine, cache_dir=engine_cache)
    x = images_for(model, 2)
    assert difference(copy.deepcopy(fast)(x), model(x)) <= TOLERANCE
    assert difference(pickle.loads(pickle.dumps(fast))(x), model(x)) <= TOLERANCE
    expected = copy.deepcopy(model).double()(x)
    assert difference(fast.double()(x), expected) <= 1e-12  # a float32 engine would fail
    assert difference(fast.float()(x), expected) <= TOLERANCE


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_gradients_for_pixels(engine: str, model: SigLipVisionModel, engine_cache: Path) -> None:
    fast = with_engine(model, engine, cache_dir=engine_cache)
    gradients = []
    for each in (fast, model):
        x = images_for(model, 2).requires_grad_()
        each.embed(x).square().sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    assert difference(*gradients) <= 1e-4


def test_prepacked_weights_are_updated(model: SigLipVisionModel) -> None:
    fast = inference_copy(model, None)
    prepack_linears(fast)
    fuse_gelu(fast, model.config.hidden_act)
    x = images_for(model, 2)
    with torch.inference_mode():
        before = fast(x)
    with torch.no_grad():
        block = fast.transformer.encoder.encoder_blocks[0]
        assert isinstance(block, EncoderBlock)
        block.mlp.fc1.weight.mul_(1.5)
    with torch.inference_mode():
        assert difference(fast(x), before) > 1e-3
        assert difference(fast(x), model(x)) <= TOLERANCE  # parameters are shared


# --- the harness ----------------------------------------------------------------------------------


def test_harness_passes_prepacked_model(engine_cache: Path) -> None:
    """All taps exist in the prepacked model, and a broken layer fails."""
    gates = ("environment", "config", "weights", "sensitivity", "numerics", "interface", "rounding")
    with cases.random_case(cases.ODD, "L7", gates=gates) as case:
        port = with_engine(
            SigLipVisionModel.from_hf(case.source), "prepacked", cache_dir=engine_cache
        )
        assert [str(gate) for gate in case.check(port) if not gate.passed] == []
        block = port.transformer.encoder.encoder_blocks[4]
        assert isinstance(block, EncoderBlock)
        assert isinstance(block.mlp.fc2, PrepackedLinear)
        block.mlp.fc2.activation = "gelu"
        block.mlp.fc2.algorithm = "tanh"
        failed = {gate.name for gate in case.check(port) if not gate.passed}
        assert failed >= {"numerics", "rounding float32"}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_rounding_equals_reference(
    engine: str, config: SigLipVisionConfig, engine_cache: Path
) -> None:
    """The rounding gate on tokens and embeddings, with weights that amplify rounding."""
    with cases.random_case(config, "L7", gates=("rounding",)) as case:
        port = SigLipVisionModel.from_hf(case.source)
        (gate,) = cases.engine_gates(case, port, engine, engine_cache)
        assert gate.name == f"rounding float32, {engine}"
        assert gate.passed, gate.findings
        assert gate.checked >= 2


ROUGH_ENGINES = [
    "eager",
    "prepacked",
    "prepacked-gelu",
    pytest.param("onnxruntime", marks=pytest.mark.slow),
    pytest.param("openvino", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("engine", ROUGH_ENGINES)
def test_rounding_of_rough_weights(engine: str, engine_cache: Path) -> None:
    """The gate fails for weights rounded to bfloat16."""
    with cases.random_case(cases.ODD, "L7", gates=("rounding",)) as case:
        port = SigLipVisionModel.from_hf(case.source).bfloat16().float()
        (gate,) = cases.engine_gates(case, port, engine, engine_cache)
        assert not gate.passed


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_rounding_of_wrong_engine(
    engine: str, config: SigLipVisionConfig, engine_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate fails for a bug in the engine, so it does not run the model's own modules."""
    use_engine = ENGINES[engine]

    def use_wrong_engine(model: OptimizedModel, cache: Path) -> None:
        use_engine(model, cache)
        assert isinstance(model.transformer, EngineTransformer)
        run = model.transformer.run
        assert run is not None
        model.transformer.run = lambda x: run(x) * 1.01

    monkeypatch.setitem(ENGINES, engine, use_wrong_engine)
    with cases.random_case(config, "L7", gates=("rounding",)) as case:
        port = SigLipVisionModel.from_hf(case.source)
        (gate,) = cases.engine_gates(case, port, engine, engine_cache)
        assert not gate.passed


# --- compiled files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "writer", "file"),
    [
        ("openvino", "openvino.convert_model", "encoder-f32.xml"),
        ("onnxruntime", "siglip_port.optimize.engines.write_onnx", "encoder.onnx"),
    ],
)
def test_file_is_cached_by_weights(
    engine: str,
    writer: str,
    file: str,
    model: SigLipVisionModel,
    engine_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = images_for(model, 3)
    with_engine(model, engine, cache_dir=engine_cache)
    files = set(engine_cache.glob(f"*/{file}"))
    monkeypatch.setattr(writer, None)  # not called again
    fast = with_engine(model, engine, cache_dir=engine_cache)
    with torch.inference_mode():
        assert difference(fast(x), model(x)) <= TOLERANCE
    assert set(engine_cache.glob(f"*/{file}")) == files
    with torch.no_grad():
        model.transformer.post_layernorm.bias[0] += 1
    with pytest.raises(EngineError, match="not callable"):
        with_engine(model, engine, cache_dir=engine_cache)


@pytest.mark.parametrize(
    ("engine", "program", "file"),
    [("openvino", "OpenVINO", "encoder-f32.xml"), ("onnxruntime", "ONNX Runtime", "encoder.onnx")],
)
def test_damaged_file(
    engine: str, program: str, file: str, model: SigLipVisionModel, tmp_path: Path
) -> None:
    path = tmp_path / model_fingerprint(inference_copy(model, None)) / file
    path.parent.mkdir()
    path.write_text("<net")
    with pytest.raises(EngineError, match=f"{program} failed: .*delete {path} to export again"):
        with_engine(model, engine, cache_dir=tmp_path)
    assert optimize(model, engines=[engine], cache_dir=tmp_path).choice.engine == "eager"


# --- unavailable engines --------------------------------------------------------------------------


def test_unsupported_dtype(model: SigLipVisionModel, tmp_path: Path) -> None:
    with pytest.raises(
        EngineError, match="requires float32 or bfloat16 on a CPU, got float16 on cpu"
    ):
        with_engine(model, "openvino", dtype=torch.float16, cache_dir=tmp_path)
    with pytest.raises(EngineError, match="requires float32 on a CPU, got bfloat16 on cpu"):
        with_engine(model, "onnxruntime", dtype=torch.bfloat16, cache_dir=tmp_path)


def test_torch_without_onednn(
    model: SigLipVisionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(EngineError, match="built without oneDNN"):
        with_engine(model, "prepacked", cache_dir=tmp_path)


@pytest.mark.parametrize(("engine", "extra"), [("openvino", "openvino"), ("onnxruntime", "onnx")])
def test_extra_missing(
    engine: str,
    extra: str,
    model: SigLipVisionModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, engine, None)
    message = rf"{engine} is not installed; run: pip install 'siglip-port\[{extra}\]'"
    with pytest.raises(MissingExtraError, match=message):
        with_engine(model, engine, cache_dir=tmp_path)

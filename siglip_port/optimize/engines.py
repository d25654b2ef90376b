"""Engines: ways to run a model. Each function changes an `OptimizedModel` in place.

docs/performance.md has measurements.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from siglip_port import atomic
from siglip_port.extras import require
from siglip_port.optimize.comparison import noise_images
from siglip_port.optimize.export import export_any_batch, write_onnx
from siglip_port.optimize.onednn import fuse_gelu, prepack_linears, prepacking_problem
from siglip_port.optimize.optimized_model import EngineTransformer, OptimizedModel

if TYPE_CHECKING:
    import onnxruntime
    import openvino

T = TypeVar("T")


class EngineError(Exception):
    """An engine is not available; the message gives the reason."""


def use_eager(model: OptimizedModel, cache: Path) -> None:
    """Run the model's own modules."""


def use_prepacked(model: OptimizedModel, cache: Path) -> None:
    """Prepack the weights of all `nn.Linear`s for oneDNN."""
    require_cpu(model)
    problem = prepacking_problem(model.dtype)
    if problem:
        raise EngineError(problem)
    prepack_linears(model)


def use_prepacked_gelu(model: OptimizedModel, cache: Path) -> None:
    """Prepack, and fuse GELU into the preceding linear layer."""
    use_prepacked(model, cache)
    fuse_gelu(model, model.config.hidden_act)


def use_compiled(model: OptimizedModel, cache: Path) -> None:
    """Compile the transformer with Inductor and CUDA graphs."""
    if model.device.type != "cuda":
        raise EngineError(f"requires a CUDA device, got {model.device}")
    compiled = torch.compile(model.transformer, mode="max-autotune", dynamic=False)

    def run(pixel_values: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        tokens: Tensor = compiled(pixel_values)
        return tokens.clone()  # the next run overwrites the output of the CUDA graph

    model.transformer = EngineTransformer(model.transformer, run)


def use_int8(model: OptimizedModel, cache: Path) -> None:
    """Quantize every `nn.Linear` dynamically: int8 weights, inputs quantized at run time.

    Uses `torch.ao.quantization`, which torch plans to replace by torchao; torchao's int8 needs a
    compiler on CPUs.
    """
    require_cpu(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from torch.ao.quantization import quantize_dynamic

            quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)
        except (ImportError, AttributeError, RuntimeError, NotImplementedError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise EngineError(f"torch.ao.quantization failed: {reason}") from error


def use_onnxruntime(model: OptimizedModel, cache: Path) -> None:
    """Run the transformer in ONNX Runtime."""
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise EngineError(f"requires float32 on a CPU, got {dtype_and_device(model)}")
    require("onnxruntime", "onnx", "onnxscript")
    import onnxruntime

    def write(path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter warns about its own deprecations
            example = noise_images(model, 2)
            write_onnx(model.transformer, example, ["tokens"], path, external_data=True)

    def load(path: Path) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    files = ["encoder.onnx.data", "encoder.onnx"]
    session = load_or_write("ONNX Runtime", cache, files, write, load)

    def run(pixel_values: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"pixel_values": pixel_values.numpy()})[0])

    model.transformer = EngineTransformer(model.transformer, run)


def use_openvino(model: OptimizedModel, cache: Path) -> None:
    """Run the transformer in OpenVINO."""
    dtype = model.dtype
    precisions = {torch.float32: "f32", torch.bfloat16: "bf16"}
    if model.device.type != "cpu" or dtype not in precisions:
        raise EngineError(f"requires float32 or bfloat16 on a CPU, got {dtype_and_device(model)}")
    require("openvino")
    import openvino

    def write(path: Path) -> None:
        transformer = copy.deepcopy(model.transformer).float()
        program = export_any_batch(transformer, noise_images(model, 2).float())
        openvino.save_model(openvino.convert_model(program), path, compress_to_fp16=False)

    def load(path: Path) -> openvino.CompiledModel:
        settings = {
            "INFERENCE_PRECISION_HINT": precisions[dtype],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "CACHE_DIR": str(cache),
        }
        return openvino.Core().compile_model(path, "CPU", settings)

    name = f"encoder-{precisions[dtype]}"
    files = [f"{name}.bin", f"{name}.xml"]
    compiled = load_or_write("OpenVINO", cache, files, write, load)
    lock = threading.Lock()  # OpenVINO rejects concurrent calls

    def run(pixel_values: Tensor) -> Tensor:
        with lock:
            tokens = compiled(pixel_values.float().numpy(), share_inputs=True)[0].copy()
        return torch.from_numpy(tokens).to(dtype)

    model.transformer = EngineTransformer(model.transformer, run)


def require_cpu(model: OptimizedModel) -> None:
    """Raise EngineError unless the model is on the CPU."""
    if model.device.type != "cpu":
        raise EngineError(f"requires a CPU, got {model.device}")


def dtype_and_device(model: OptimizedModel) -> str:
    """Format the dtype and device of a model."""
    return f"{str(model.dtype).removeprefix('torch.')} on {model.device}"


def load_or_write(
    runtime: str,
    cache: Path,
    names: Sequence[str],
    write: Callable[[Path], None],
    load: Callable[[Path], T],
) -> T:
    """Load a compiled file from the cache, and write it first if it is missing.

    Args:
        runtime: Name of the runtime, for messages.
        cache: Cache folder of the model.
        names: Names of all files that `write` creates; the last one is loaded.
        write: Function that writes the files, given the path of the last one.
        load: Function that loads the last file.

    Raises:
        EngineError: The file cannot be written or loaded.
    """
    path = cache / names[-1]
    try:
        if not path.exists():
            with atomic.staging_dir(cache) as staging:
                write(staging / path.name)
                atomic.commit_files([staging / name for name in names], cache)
        return load(path)
    except Exception as error:  # the runtimes document no exception types
        advice = f"; delete {path} to export again" if path.exists() else ""
        raise EngineError(f"{runtime} failed: {last_line(error)}{advice}") from error


def last_line(error: BaseException) -> str:
    """Return the last line of an exception's message, or its type's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


Engine = Callable[[OptimizedModel, Path], None]
"""Function of the model to change and its cache folder."""

ENGINES: dict[str, Engine] = {
    "eager": use_eager,
    "prepacked": use_prepacked,
    "prepacked-gelu": use_prepacked_gelu,
    "onnxruntime": use_onnxruntime,
    "openvino": use_openvino,
    "compiled": use_compiled,
    "int8": use_int8,
}
"""Engines by name.

The model's own modules (`eager`); weights prepacked for oneDNN, without and with fused GELU; ONNX
Runtime; OpenVINO; Inductor with CUDA graphs (`compiled`); and dynamic int8 quantization.
"""

"""The engines: ways to run a model, each of which changes an `OptimizedModel` in place.

See docs/performance.md for what each brought where.
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

Loaded = TypeVar("Loaded")


class EngineError(Exception):
    """An engine cannot be used here; the message says why."""


def use_eager(model: OptimizedModel, cache: Path) -> None:
    """Leave the model as it is."""


def use_prepacked(model: OptimizedModel, cache: Path) -> None:
    """Prepack the weights of all Linears for oneDNN."""
    require_cpu(model)
    problem = prepacking_problem(model.dtype)
    if problem:
        raise EngineError(problem)
    prepack_linears(model)


def use_prepacked_gelu(model: OptimizedModel, cache: Path) -> None:
    """Prepack, and compute GELU in the kernel of the Linear before it."""
    use_prepacked(model, cache)
    fuse_gelu(model)


def use_compiled(model: OptimizedModel, cache: Path) -> None:
    """Compile the transformer with Inductor into CUDA graphs."""
    if model.device.type != "cuda":
        raise EngineError(
            "it is for GPUs; on a CPU it takes minutes for nothing: docs/performance.md"
        )
    compiled = torch.compile(model.transformer, mode="max-autotune", dynamic=False)

    def run(pixel_values: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        tokens: Tensor = compiled(pixel_values)
        return tokens.clone()  # the next run overwrites the graph's own output

    model.transformer = EngineTransformer(model.transformer, run)


def use_int8(model: OptimizedModel, cache: Path) -> None:
    """Replace every Linear by one of int8 weights, whose inputs are quantized as they come.

    By `torch.ao.quantization`, which torch means to drop in favor of torchao; torchao's int8 needs
    a compiler on CPUs.
    """
    require_cpu(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from torch.ao.quantization import quantize_dynamic

            quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)
        except (ImportError, AttributeError, RuntimeError, NotImplementedError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise EngineError(f"this torch cannot do it: {reason}") from error


def use_onnxruntime(model: OptimizedModel, cache: Path) -> None:
    """Run the transformer in ONNX Runtime."""
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise EngineError("it is for float32 on CPUs")
    require("onnxruntime", "onnx", "onnxscript")
    import onnxruntime

    def write(path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter, about itself
            write_onnx(model.transformer, noise_images(model, 2), ["tokens"], path, one_file=False)

    def load(path: Path) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    files = ["tower.onnx.data", "tower.onnx"]
    session = load_or_write("ONNX Runtime", cache, files, write, load)

    def run(pixel_values: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"pixel_values": pixel_values.numpy()})[0])

    model.transformer = EngineTransformer(model.transformer, run)


def use_openvino(model: OptimizedModel, cache: Path) -> None:
    """Run the transformer in OpenVINO."""
    dtype = model.dtype
    precisions = {torch.float32: "f32", torch.bfloat16: "bf16"}
    if model.device.type != "cpu" or dtype not in precisions:
        raise EngineError("it is for float32 and bfloat16 on CPUs")
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

    name = f"tower-{precisions[dtype]}"
    files = [f"{name}.bin", f"{name}.xml"]
    compiled = load_or_write("OpenVINO", cache, files, write, load)
    lock = threading.Lock()  # OpenVINO refuses a second thread

    def run(pixel_values: Tensor) -> Tensor:
        with lock:
            tokens = compiled(pixel_values.float().numpy(), share_inputs=True)[0].copy()
        return torch.from_numpy(tokens).to(dtype)

    model.transformer = EngineTransformer(model.transformer, run)


def require_cpu(model: OptimizedModel) -> None:
    """Raise EngineError unless the model is on the CPU."""
    if model.device.type != "cpu":
        raise EngineError("it is for CPUs")


def load_or_write(
    program: str,
    cache: Path,
    names: Sequence[str],
    write: Callable[[Path], None],
    load: Callable[[Path], Loaded],
) -> Loaded:
    """Load a file that another program runs; write it first if it is not in the cache.

    Args:
        program: for messages.
        cache: the folder of the files.
        names: of all files that `write` makes; the last is the one to load.
        write: writes them to where the last is.
        load: loads the last.

    Raises:
        EngineError: it cannot be written or loaded.
    """
    path = cache / names[-1]
    try:
        if not path.exists():
            with atomic.staging_dir(cache) as staging:
                write(staging / path.name)
                atomic.commit_files([staging / name for name in names], cache)
        return load(path)
    except Exception as error:  # of many kinds, none of them documented
        advice = f"; if it could before, delete {path}" if path.exists() else ""
        raise EngineError(
            f"{program} cannot take the encoder: {last_line(error)}{advice}"
        ) from error


def last_line(error: BaseException) -> str:
    """Return the last line of an error's message, or its type's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


Engine = Callable[[OptimizedModel, Path], None]
"""Takes a model to change, and the folder of the cache that belongs to it."""

ENGINES: dict[str, Engine] = {
    "eager": use_eager,
    "packed": use_prepacked,
    "packed-gelu": use_prepacked_gelu,
    "onnxruntime": use_onnxruntime,
    "openvino": use_openvino,
    "compiled": use_compiled,
    "int8": use_int8,
}
"""All engines by name, the simplest first: the model as it is.

Its Linears prepacked for oneDNN, without and with GELU in the same kernel; run by ONNX Runtime, or
by OpenVINO; compiled by Inductor into CUDA graphs; and, for int8, Linears of 8 bits.
"""

"""Ports that are no `torch.nn.Module`: exported files, functions, vectors, and HTTP services.

Each is loaded into a function, images in, outputs by name out: `tokens` [B, N, D] and `pooled`
[B, D], as far as it has them.
"""

from __future__ import annotations

import base64
import functools
import importlib
import io
import json
import math
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from siglip_port.extras import require

Outputs = dict[str, Tensor]
"""Outputs by name: `tokens`, `pooled`, or both."""

PixelPort = Callable[[Tensor], Outputs]
"""Pixels [B, C, S, S] -> outputs."""

OUTPUT_NAMES = {
    "tokens": ("tokens", "last_hidden_state"),
    "pooled": ("pooled", "pooler_output", "image_embeds", "embedding", "embeddings"),
}
"""Output -> its names in files of this package, of transformers and of others."""

HTTP_TIMEOUT = 60.0
"""Seconds to wait for an answer."""


class ForeignPortError(Exception):
    """A port cannot be loaded, or its results cannot be read; the message says why."""


def load_pixel_port(target: str) -> PixelPort:
    """Load a port that takes pixels: a file, or a function as `module:function`.

    Raises:
        ForeignPortError: The target cannot be loaded.
        siglip_port.extras.MissingExtraError: A required package is not installed.
    """
    path = Path(target)
    loader = LOADERS.get(path.suffix)
    if loader is None:
        return load_function(target)
    if not path.is_file():
        raise ForeignPortError(f"{target}: no such file")
    return loader(path)


def is_pixel_port(target: str) -> bool:
    """Return whether `load_pixel_port` supports a target."""
    module, _, function = target.partition(":")
    is_function = bool(function) and all(part.isidentifier() for part in module.split("."))
    return Path(target).suffix in LOADERS or (is_function and function.isidentifier())


def name_outputs(names: Sequence[str], tensors: Sequence[Any]) -> Outputs:
    """Name outputs by the names of a file, or else by their shape.

    Raises:
        ForeignPortError: None of them is known.
    """
    outputs: Outputs = {}
    for name, value in zip(names, tensors, strict=True):
        tensor = torch.as_tensor(value).detach().cpu()
        output = output_name(name, tensor)
        if output:
            outputs.setdefault(output, tensor)
    if outputs:
        return outputs
    shapes = [list(torch.as_tensor(value).shape) for value in tensors]
    raise ForeignPortError(
        "expected an output of shape [B, N, D] (tokens) or [B, D] (pooled), got "
        f"{', '.join(map(str, shapes))}"
    )


def output_name(name: str, tensor: Tensor) -> str:
    """Return `tokens` or `pooled`; empty for another output."""
    for output, names in OUTPUT_NAMES.items():
        if name in names:
            return output
    return {3: "tokens", 2: "pooled"}.get(tensor.ndim, "")


def name_result(result: object) -> Outputs:
    """Name what a function or program returned: a tensor, several, or some by name."""
    if isinstance(result, Mapping):
        return name_outputs([str(name) for name in result], list(result.values()))
    if isinstance(result, (tuple, list)):
        return name_outputs([""] * len(result), result)
    return name_outputs([""], [result])


# --- files ----------------------------------------------------------------------------------------


def load_onnx(path: Path) -> PixelPort:
    """Load an ONNX file with ONNX Runtime, on the CPU."""
    require("onnxruntime")
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises many types
        raise ForeignPortError(f"{path}: cannot be loaded ({first_line(error)})") from error
    inputs = session.get_inputs()
    if len(inputs) != 1:
        text = ", ".join(node.name for node in inputs)
        raise ForeignPortError(f"{path}: expected one input (pixel values), found {text}")
    names = [node.name for node in session.get_outputs()]
    dtype = torch.float16 if "float16" in inputs[0].type else torch.float32

    def run(pixel_values: Tensor) -> Outputs:
        arrays = session.run(None, {inputs[0].name: pixel_values.to(dtype).numpy()})
        return name_outputs(names, arrays)

    return in_batches_of(inputs[0].shape[0], run)


def load_openvino(path: Path) -> PixelPort:
    """Load an OpenVINO model, computed in float32 on the CPU."""
    require("openvino")
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    try:
        compiled = openvino.Core().compile_model(path, "CPU", settings)
    except Exception as error:  # openvino raises many types
        raise ForeignPortError(f"{path}: cannot be loaded ({first_line(error)})") from error
    names: list[str] = [next(iter(sorted(node.get_names())), "") for node in compiled.outputs]
    batch = compiled.input(0).get_partial_shape()[0]

    def run(pixel_values: Tensor) -> Outputs:
        results = compiled(pixel_values.float().numpy())
        return name_outputs(names, [results[output].copy() for output in compiled.outputs])

    return in_batches_of(batch.get_length() if batch.is_static else None, run)


def load_program(path: Path) -> PixelPort:
    """Load a `torch.export` program, or an AOTInductor package."""
    from siglip_port.optimize.export import load_package

    run: Callable[[Tensor], object]
    try:
        run = torch.export.load(path).module()
    except Exception as error:  # not a program, but it may be a package
        try:
            run = load_package(path)
        except RuntimeError:
            raise ForeignPortError(f"{path}: cannot be loaded ({first_line(error)})") from error
    return lambda pixel_values: name_result(run(pixel_values))


def in_batches_of(size: object, run: PixelPort) -> PixelPort:
    """Run a port whose batch size is fixed on batches of other sizes.

    Args:
        size: Batch size; anything but an int for a port that takes batches of any size.
        run: The port.
    """
    if not isinstance(size, int):
        return run

    def run_in_batches(pixel_values: Tensor) -> Outputs:
        parts: dict[str, list[Tensor]] = {}
        for batch in pixel_values.split(size):
            missing = size - len(batch)
            filled = torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])])
            for name, tensor in run(filled).items():
                parts.setdefault(name, []).append(tensor[: len(batch)])
        return {name: torch.cat(tensors) for name, tensors in parts.items()}

    return run_in_batches


LOADERS: dict[str, Callable[[Path], PixelPort]] = {
    ".onnx": load_onnx,
    ".xml": load_openvino,
    ".pt2": load_program,
}
"""Suffix -> loader."""


def load_function(target: str) -> PixelPort:
    """Import `module:function`: pixels [B, C, S, S], float32 -> a tensor, several, or by name.

    Tensors may be of torch, NumPy, or any type that `torch.as_tensor` reads.
    """
    module_name, _, name = target.partition(":")
    try:
        function: Any = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ForeignPortError(f"{target}: cannot be imported ({error})") from error
    if not callable(function):
        raise ForeignPortError(f"{target}: expected a function, got {type(function).__name__}")
    return lambda pixel_values: name_result(function(pixel_values))


# --- vectors --------------------------------------------------------------------------------------


def read_vectors(path: Path) -> tuple[list[str], Tensor]:
    """Read a Parquet file of image paths and vectors.

    Returns:
        Paths, from a column `path` or `id`, and vectors [rows, D], from `embedding` or `vector`.

    Raises:
        ForeignPortError: The file cannot be read, or lacks a column.
    """
    require("pyarrow")
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ForeignPortError(f"{path}: cannot be read ({first_line(error)})") from error
    path_column = first_column(path, table.column_names, ("path", "id"))
    vector_column = first_column(path, table.column_names, ("embedding", "vector"))
    table = table.filter(table.column(vector_column).is_valid())
    vectors = table.column(vector_column).to_pylist()
    lengths = {len(vector) for vector in vectors}
    if len(lengths) != 1:
        raise ForeignPortError(f"{path}: expected vectors of one length, found {sorted(lengths)}")
    return table.column(path_column).to_pylist(), torch.tensor(vectors)


def first_column(path: Path, names: Sequence[str], choices: Sequence[str]) -> str:
    """Return the first of some column names that a table has."""
    for name in choices:
        if name in names:
            return name
    raise ForeignPortError(
        f"{path}: expected a column {' or '.join(choices)}, found {', '.join(names)}"
    )


# --- HTTP -----------------------------------------------------------------------------------------


def ask_service(address: str, image: Image.Image) -> Tensor:
    """Ask a service for the vector of an image: [D].

    The request is a POST of `{"input": ["data:image/png;base64,..."], "modality": "image"}`; the
    answer is that of OpenAI's embeddings (`{"data": [{"embedding": [...]}]}`), or a JSON list.

    Raises:
        ForeignPortError: The service cannot be reached, or its answer is no vector.
    """
    file = io.BytesIO()
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    body = {"input": [f"data:image/png;base64,{data}"], "modality": "image"}
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=HTTP_TIMEOUT) as response:
            answer = json.load(response)
    except (OSError, urllib.error.URLError, ValueError) as error:
        raise ForeignPortError(f"{address}: no answer that can be read ({error})") from error
    vector = find_vector(answer)
    if vector is None:
        raise ForeignPortError(
            f"{address}: expected an embedding, got {json.dumps(answer)[:100]}; the answer must be "
            '{"data": [{"embedding": [...]}]} or a list of numbers'
        )
    return vector


def find_vector(answer: object) -> Tensor | None:
    """Return the first list of numbers in a JSON answer; None if it has none."""
    if isinstance(answer, Mapping):
        for key in ("data", "embeddings", "embedding", "vector"):
            if key in answer:
                return find_vector(answer[key])
        return None
    if not isinstance(answer, list) or not answer:
        return None
    if all(isinstance(number, (int, float)) for number in answer):
        return torch.tensor(answer, dtype=torch.float64)
    return find_vector(answer[0])


def service(address: str) -> Callable[[Image.Image], Tensor]:
    """Return the service as a function: image -> vector [D]."""
    return functools.partial(ask_service, address)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_normalized(vectors: Tensor) -> bool:
    """Return whether all vectors [B, D] have unit length, to 1e-3."""
    return all(math.isclose(float(norm), 1, rel_tol=1e-3) for norm in vectors.norm(dim=-1))

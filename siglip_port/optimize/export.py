"""Export to ONNX, torch.export and AOTInductor.

Every file is run and compared with the model before it is moved to its destination, and again
there.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from siglip_port import atomic
from siglip_port.extras import require
from siglip_port.model import SigLipVisionModel
from siglip_port.optimize.comparison import (
    TOLERANCES,
    ModelOutputs,
    noise_images,
    relative_difference,
)
from siglip_port.optimize.optimized_model import FLOAT_DTYPES, OptimizedModel, inference_copy

ExportedRun = Callable[[Tensor], Sequence[Tensor]]
"""[B, C, S, S] -> tokens [B, N, D] and, if the model pools, pooled [B, D]."""

EXAMPLE_BATCH_SIZE = 2
"""Batch size of the example input; above 1, so that the batch dimension stays symbolic."""

BATCH_SIZES = (EXAMPLE_BATCH_SIZE, 1, 5)
"""Batch sizes of the comparison with the model."""

MAX_INLINE_BYTES = 1536 * 2**20
"""Size of the weights above which an ONNX file stores them in a second file.

A protobuf holds 2 GiB, some of which the graph needs; `torch.onnx` has the same limit.
"""


class ExportError(Exception):
    """The export failed and wrote nothing; the message gives the reason."""


@dataclass(frozen=True)
class ExportFormat:
    """Export format.

    Attributes:
        suffix: Required suffix of the file name.
        dtypes: Supported dtypes of the model.
        write: Function that writes a module to a path.
        load: Function that loads a written file.
        packages: Required optional dependencies.
        data_suffix: Suffix of the file of large weights, after the name of the written file; None
            if there is never one.
    """

    suffix: str
    dtypes: tuple[torch.dtype, ...]
    write: Callable[[ModelOutputs, Path], None]
    load: Callable[[Path], ExportedRun]
    packages: tuple[str, ...] = ()
    data_suffix: str | None = None


def export_onnx(model: SigLipVisionModel, path: str | os.PathLike[str]) -> float:
    """Export to ONNX and verify the file with ONNX Runtime.

    The input is `pixel_values` [batch, C, S, S] with a dynamic batch size; outputs are `tokens`
    [batch, N, D] and, if the model pools, `pooled` [batch, D]. Needs the extra `[onnx]`.

    Args:
        model: Model in float32 on a CPU.
        path: Output file, `*.onnx`. Weights above `MAX_INLINE_BYTES` are stored beside it, in
            `*.onnx.data`. Both files are replaced if they exist; an `*.onnx.data` that the new
            file does not need is removed.

    Returns:
        Relative difference from the model, at most `comparison.TOLERANCES`.

    Raises:
        ExportError: The export failed, or the file's results differ from the model's.
        siglip_port.extras.MissingExtraError: A required package is not installed.
    """
    return export_model(model, path, ONNX)


def export_program(model: SigLipVisionModel, path: str | os.PathLike[str]) -> float:
    """Export to a `torch.export` program with a dynamic batch size.

    Run it with `torch.export.load(path).module()(pixel_values)`.

    Args:
        model: Model on a CPU.
        path: Output file, `*.pt2`, replaced if it exists.

    Returns:
        Relative difference from the model, at most `comparison.TOLERANCES`.

    Raises:
        ExportError: The export failed, or the file's results differ from the model's.
    """
    return export_model(model, path, PROGRAM)


def export_package(model: SigLipVisionModel, path: str | os.PathLike[str]) -> float:
    """Compile to an AOTInductor package, which `load_package` loads.

    Needs a C++ compiler and takes a minute or more. The package contains the weights in a
    CPU-specific layout; it needs the same torch release and the same CPU instructions.

    Args:
        model: Model on a CPU.
        path: Output file, `*.pt2`, replaced if it exists.

    Returns:
        Relative difference from the model, at most `comparison.TOLERANCES`.

    Raises:
        ExportError: The export failed, or the file's results differ from the model's.
    """
    return export_model(model, path, PACKAGE)


def export_model(
    model: SigLipVisionModel, path: str | os.PathLike[str], file_format: ExportFormat
) -> float:
    """Write temporary files, compare them with the model, move them, and compare them again.

    Returns:
        Relative difference from the model.

    Raises:
        ExportError: The export failed, or the file's results differ from the model's. The old files
            are unchanged.
        siglip_port.extras.MissingExtraError: A required package is not installed.
    """
    require(*file_format.packages)
    validate_export(model, path, file_format)
    path = Path(path).absolute()
    outputs = ModelOutputs(inference_copy(model, None)).eval()
    try:
        with atomic.staging_dir(path.parent) as staging, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters warn about their own deprecations
            file = staging / path.name
            file_format.write(outputs, file)
            verify_export(file, file_format, outputs)
            with atomic.transaction(staging, path.parent) as changes:
                move_export(changes, path, file_format)
                return verify_export(path, file_format, outputs)
    except ExportError:
        raise
    except Exception as error:  # exporters raise many types
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise ExportError(f"{path.name} not written: {reason}") from error


def verify_export(path: Path, file_format: ExportFormat, outputs: ModelOutputs) -> float:
    """Load an exported file and return its relative difference from the model.

    Raises:
        ExportError: The difference is too large.
    """
    difference = exported_difference(file_format.load(path), outputs)
    bound = TOLERANCES[outputs.model.dtype]
    if not difference <= bound:
        raise ExportError(
            f"{path.name} not written: relative difference from the model is "
            f"{difference:.1e}, bound {bound:.0e}"
        )
    return difference


def move_export(changes: atomic.Transaction, path: Path, file_format: ExportFormat) -> None:
    """Move an exported file, with its file of large weights if it has one.

    At no time does a file refer to the weights of another one.
    """
    data = data_file(path, file_format)
    if data is None:
        changes.move(path.name)
    elif (changes.staging / data.name).exists():
        if data.exists():
            changes.remove(path.name)
        changes.move(data.name)
        changes.move(path.name)
    else:
        changes.move(path.name)
        changes.remove(data.name)


def data_file(path: Path, file_format: ExportFormat) -> Path | None:
    """Return the path of the file of large weights; None if the format never has one."""
    if file_format.data_suffix is None:
        return None
    return path.with_name(path.name + file_format.data_suffix)


def exported_files(path: Path, file_format: ExportFormat) -> list[Path]:
    """Return the files of an export."""
    data = data_file(path, file_format)
    if data is not None and data.exists():
        return [path, data]
    return [path]


def validate_export(
    model: SigLipVisionModel, path: str | os.PathLike[str], file_format: ExportFormat
) -> None:
    """Validate the arguments of an export.

    Raises:
        ExportError: An argument is not supported.
    """
    if not isinstance(model, SigLipVisionModel):
        raise ExportError(f"model must be a SigLipVisionModel, got {type(model).__name__}")
    if not isinstance(path, (str, os.PathLike)):
        raise ExportError(f"path must be a string or path-like object, got {path!r}")
    if isinstance(model, OptimizedModel):
        raise ExportError("model is already optimized; export the original model")
    if model.device.type != "cpu" or model.dtype not in file_format.dtypes:
        raise ExportError(
            f"model must be {' or '.join(map(str, file_format.dtypes))} on a CPU, got "
            f"{model.dtype} on {model.device}"
        )
    if Path(path).suffix != file_format.suffix:
        raise ExportError(f"path must end in {file_format.suffix}, got {Path(path).name!r}")


def exported_difference(run: ExportedRun, outputs: ModelOutputs) -> float:
    """Return the largest relative difference from the model over `BATCH_SIZES`."""
    differences = []
    for batch_size in BATCH_SIZES:
        images = noise_images(outputs.model, batch_size)
        differences.append(relative_difference(run(images), outputs(images)))
    return max(differences)


# --- the formats ----------------------------------------------------------------------------------


def export_any_batch(module: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """Export a module with one input and a dynamic batch size.

    Args:
        module: Module to export.
        example: Example input with a batch size above 1.
    """
    batch = torch.export.Dim("batch", min=1, max=65536)
    with torch.no_grad():
        return torch.export.export(module, (example,), dynamic_shapes=({0: batch},))


def write_onnx(
    module: nn.Module, example: Tensor, outputs: Sequence[str], path: Path, *, external_data: bool
) -> None:
    """Write a module with one input as ONNX with a dynamic batch size, named `batch`.

    Args:
        module: Module to export.
        example: Example input with a batch size above 1.
        outputs: Names of the outputs.
        path: Output file.
        external_data: Whether to store weights in a second file, with `.data` after the name. Large
            weights are always stored there.
    """
    program = torch.onnx.export(
        export_any_batch(module, example),
        input_names=["pixel_values"],
        output_names=list(outputs),
        dynamic_shapes=({0: "batch"},),  # names the dimension; the program has its shapes already
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.save(path, external_data=external_data)


def write_onnx_outputs(outputs: ModelOutputs, path: Path) -> None:
    """Write an ONNX file with the outputs `tokens` and `pooled`."""
    example = noise_images(outputs.model, EXAMPLE_BATCH_SIZE)
    size = sum(parameter.nbytes for parameter in outputs.parameters())
    external_data = size > MAX_INLINE_BYTES
    write_onnx(outputs, example, outputs.names, path, external_data=external_data)


def load_onnx(path: Path) -> ExportedRun:
    """Load an ONNX file with ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(pixel_values: Tensor) -> list[Tensor]:
        arrays = session.run(None, {"pixel_values": pixel_values.numpy()})
        return [torch.from_numpy(array) for array in arrays]

    return run


def write_program(outputs: ModelOutputs, path: Path) -> None:
    """Write a `torch.export` program."""
    example = noise_images(outputs.model, EXAMPLE_BATCH_SIZE)
    torch.export.save(export_any_batch(outputs, example), path)


def load_program(path: Path) -> ExportedRun:
    """Load a `torch.export` program."""
    return torch.export.load(path).module()


def write_package(outputs: ModelOutputs, path: Path) -> None:
    """Write an AOTInductor package."""
    from torch._inductor import aoti_compile_and_package

    program = export_any_batch(outputs, noise_images(outputs.model, EXAMPLE_BATCH_SIZE))
    # With a symbolic batch, Inductor uses oneDNN instead of MKL.
    aoti_compile_and_package(program, package_path=str(path), inductor_configs={"freezing": True})


def load_package(path: str | os.PathLike[str]) -> Callable[[Tensor], list[Tensor]]:
    """Load a package of `export_package`: [B, C, S, S] -> tokens [B, N, D] and pooled [B, D].

    Uses the private class behind `torch._inductor.aoti_load_package`, which would first import the
    whole compiler (seconds).

    Args:
        path: Package, `*.pt2`. Loading runs its code: load trusted files only.

    Raises:
        RuntimeError: The file is not a package, or was built for another torch or CPU.
    """
    try:
        loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
    except (AttributeError, TypeError):
        from torch._inductor import aoti_load_package

        return aoti_load_package(str(path))

    def run(pixel_values: Tensor) -> list[Tensor]:
        return list(loader.boxed_run([pixel_values]))

    return run


ONNX = ExportFormat(
    ".onnx",
    (torch.float32,),
    write_onnx_outputs,
    load_onnx,
    packages=("onnx", "onnxscript", "onnxruntime"),
    data_suffix=".data",
)
PROGRAM = ExportFormat(".pt2", FLOAT_DTYPES, write_program, load_program)
PACKAGE = ExportFormat(".pt2", FLOAT_DTYPES, write_package, load_package)

EXPORTS = {"onnx": ONNX, "program": PROGRAM, "package": PACKAGE}
"""Formats by name."""

"""A model for other programs: ONNX, torch.export and AOTInductor files.

Each is run and compared with the model before it is put in its place.
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
"""[B, C, S, S] -> tokens [B, N, D] and, if the model has a pooled output, pooled [B, D]."""

EXAMPLE_BATCH_SIZE = 2
"""Of the input that a model is exported with; more than one, so that the batch stays symbolic."""

BATCH_SIZES = (EXAMPLE_BATCH_SIZE, 1, 5)
"""The batch sizes that an exported file is compared with: that of the example, one, and another."""


class ExportError(Exception):
    """Nothing was written; the message says why."""


@dataclass(frozen=True)
class ExportFormat:
    """A kind of file.

    Attributes:
        suffix: that the file's name must have.
        dtypes: that the model may have.
        write: writes a module to a path.
        load: loads what was written.
        packages: optional dependencies that it needs.
    """

    suffix: str
    dtypes: tuple[torch.dtype, ...]
    write: Callable[[ModelOutputs, Path], None]
    load: Callable[[Path], ExportedRun]
    packages: tuple[str, ...] = ()


def export_onnx(model: SigLipVisionModel, path: str | os.PathLike[str]) -> float:
    """Write an ONNX file, run it with ONNX Runtime, and compare it with the model.

    Its input is `pixel_values` [batch, C, S, S], its outputs are `tokens` and `pooled`, for every
    batch size. Needs the extra `[onnx]`.

    Args:
        model: in float32, on the CPU.
        path: of the file, `.onnx`; replaced if it is there. Weights are in the same file, so below
            2 GB.

    Returns:
        The difference from the model, in the terms of
        `siglip_port.optimize.comparison.TOLERANCES`.

    Raises:
        ExportError: it cannot be written, or what was written computes something else.
    """
    return export_model(model, path, ONNX)


def export_program(model: SigLipVisionModel, path: str | os.PathLike[str]) -> float:
    """Write a `torch.export` program, for every batch size.

    `torch.export.load(path).module()(pixel_values)` runs it.

    Args:
        model: on the CPU.
        path: of the file, `.pt2`; replaced if it is there.

    Returns:
        As for `export_onnx`.

    Raises:
        ExportError: as for `export_onnx`.
        MissingExtraError: what writes it is not installed.
    """
    return export_model(model, path, PROGRAM)


def export_package(model: SigLipVisionModel, path: str | os.PathLike[str]) -> float:
    """Compile the model into an AOTInductor package for processors such as this one.

    `load_package` loads it. Weights are frozen and laid out for the processor. Takes a minute or
    more, and a C++ compiler. The package runs only where the processor has what this one has, with
    the same release of torch.

    Args:
        model: on the CPU.
        path: of the file, `.pt2`; replaced if it is there.

    Returns:
        As for `export_onnx`.

    Raises:
        ExportError: as for `export_onnx`.
        MissingExtraError: what writes it is not installed.
    """
    return export_model(model, path, PACKAGE)


def export_model(
    model: SigLipVisionModel, path: str | os.PathLike[str], file_format: ExportFormat
) -> float:
    """Write a file beside its place, load it, compare it, and only then put it there.

    Returns:
        The difference from the model.

    Raises:
        ExportError: as for `export_onnx`.
        MissingExtraError: what writes it is not installed.
    """
    require(*file_format.packages)
    validate_export(model, path, file_format)
    path = Path(path).absolute()
    outputs = ModelOutputs(inference_copy(model, None)).eval()
    try:
        with atomic.staging_dir(path.parent) as staging, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters, about themselves
            file = staging / path.name
            file_format.write(outputs, file)
            difference = exported_difference(file_format.load(file), outputs)
            bound = TOLERANCES[model.dtype]
            if not difference <= bound:
                raise ExportError(
                    f"{path.name} is not written: what it computes differs from the model by "
                    f"{difference:.1e}, bound {bound:.0e}"
                )
            atomic.commit_files([file], path.parent)
    except ExportError:
        raise
    except Exception as error:  # of many kinds: exporters raise whatever they like
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise ExportError(f"{path.name} is not written: {reason}") from error
    return difference


def validate_export(
    model: SigLipVisionModel, path: str | os.PathLike[str], file_format: ExportFormat
) -> None:
    """Check what can be checked before any work.

    Raises:
        ExportError: an argument cannot be used.
    """
    if not isinstance(model, SigLipVisionModel):
        raise ExportError(f"model must be a SigLipVisionModel, got a {type(model).__name__}")
    if not isinstance(path, (str, os.PathLike)):
        raise ExportError(f"path must be that of a file, got {path!r}")
    if isinstance(model, OptimizedModel):
        raise ExportError(
            "the model is optimized for this machine; export the one that it was made of"
        )
    if model.device.type != "cpu" or model.dtype not in file_format.dtypes:
        raise ExportError(
            f"the model must be on the CPU, of {' or '.join(map(str, file_format.dtypes))}, got "
            f"{model.dtype} on {model.device}"
        )
    if Path(path).suffix != file_format.suffix:
        raise ExportError(f"the file must be named *{file_format.suffix}, got {Path(path).name!r}")


def exported_difference(run: ExportedRun, outputs: ModelOutputs) -> float:
    """Compare what was exported with the model, in batches of several sizes."""
    differences = []
    for batch_size in BATCH_SIZES:
        images = noise_images(outputs.model, batch_size)
        differences.append(relative_difference(run(images), outputs(images)))
    return max(differences)


# --- the formats ----------------------------------------------------------------------------------


def export_any_batch(module: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """Export a module of one input for every batch size.

    Args:
        module: any.
        example: its input, of a batch of more than one.
    """
    batch = torch.export.Dim("batch", min=1, max=65536)
    with torch.no_grad():
        return torch.export.export(module, (example,), dynamic_shapes=({0: batch},))


def write_onnx(
    module: nn.Module, example: Tensor, outputs: Sequence[str], path: Path, *, one_file: bool
) -> None:
    """Write a module of one input as ONNX, for every batch size.

    Args:
        module: any.
        example: its input, of a batch of more than one.
        outputs: their names.
        path: of the file.
        one_file: whether weights are in the same file, which is then below 2 GB.
    """
    program = torch.onnx.export(
        export_any_batch(module, example),
        input_names=["pixel_values"],
        output_names=list(outputs),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.save(path, external_data=not one_file)


def write_onnx_outputs(outputs: ModelOutputs, path: Path) -> None:
    """Write tokens and pooled vectors as one ONNX file."""
    example = noise_images(outputs.model, EXAMPLE_BATCH_SIZE)
    write_onnx(outputs, example, outputs.names, path, one_file=True)


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
    """Compile an AOTInductor package."""
    from torch._inductor import aoti_compile_and_package

    program = export_any_batch(outputs, noise_images(outputs.model, EXAMPLE_BATCH_SIZE))
    # The batch is symbolic, which makes Inductor take oneDNN's kernels instead of MKL's.
    aoti_compile_and_package(program, package_path=str(path), inductor_configs={"freezing": True})


def load_package(path: str | os.PathLike[str]) -> Callable[[Tensor], list[Tensor]]:
    """Load what `export_package` wrote: [B, C, S, S] -> tokens [B, N, D] and pooled [B, D].

    By the class behind `torch._inductor.aoti_load_package`, since that imports the whole compiler
    first, which takes seconds. The class is private to torch.

    Args:
        path: a `.pt2` file of this machine's own making: loading one runs what is in it.

    Raises:
        RuntimeError: it is no package, or not one for this torch and this processor.
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
)
PROGRAM = ExportFormat(".pt2", FLOAT_DTYPES, write_program, load_program)
PACKAGE = ExportFormat(".pt2", FLOAT_DTYPES, write_package, load_package)

EXPORTS: dict[str, tuple[Callable[[SigLipVisionModel, Path], float], str]] = {
    "onnx": (export_onnx, ".onnx"),
    "program": (export_program, ".pt2"),
    "package": (export_package, ".pt2"),
}
"""The exports by the name of their format: the function, and the suffix of the file's name."""

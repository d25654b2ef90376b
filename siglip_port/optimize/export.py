"""A tower for other programs.

ONNX, torch.export and AOTInductor files, each run and compared before it is there.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from siglip_port import atomic
from siglip_port.model import SigLipVisionModel
from siglip_port.optimize import onednn as native
from siglip_port.optimize.selection import (
    BOUNDS,
    OptimizedModel,
    Outputs,
    difference,
    export_any_batch,
    frozen,
    pictures,
    write_onnx,
)

Run = Callable[[Tensor], Sequence[Tensor]]
"""[B, C, S, S] -> tokens [B, N, D] and, where the model makes one vector of them, pooled [B, D]."""

BATCHES = (2, 1, 5)
"""The batch sizes that what was written is compared with.

That of the example, one, and one that is neither.
"""


class ExportError(Exception):
    """Nothing was written; the message says why."""


def export_onnx(model: SigLipVisionModel, path: str | os.PathLike[str]) -> float:
    """Writes an ONNX file.

    Input `pixel_values` [batch, C, S, S], outputs `tokens` and `pooled`, for every batch size.

    Runs it with ONNX Runtime and compares; needs the extra `[onnx]`.

    Args:
        model: in float32, on the CPU.
        path: what to write, `.onnx`; replaced if it is there. Weights are in the same file, so
            below 2 GB.

    Returns:
        By how much what it computes differs from the model, as
        `siglip_port.optimize.selection.BOUNDS` count it.

    Raises:
        ExportError: it cannot be written, or what was written computes something else.
    """

    def write(outputs: Outputs, place: Path) -> None:
        write_onnx(outputs, pictures(model, BATCHES[0]), outputs.names, place, one_file=True)

    def load(place: Path) -> Run:
        import onnxruntime

        session = onnxruntime.InferenceSession(place, providers=["CPUExecutionProvider"])
        return lambda pixel_values: [
            torch.from_numpy(o) for o in session.run(None, {"pixel_values": pixel_values.numpy()})
        ]

    return _export(
        model,
        path,
        ".onnx",
        write,
        load,
        (torch.float32,),
        needs="onnx, onnxscript and onnxruntime",
    )


def export_program(model: SigLipVisionModel, path: str | os.PathLike[str]) -> float:
    """Writes a `torch.export` program, for every batch size.

    `torch.export.load(path).module()(pixel_values)`.

    Args:
        model: on the CPU.
        path: what to write, `.pt2`; replaced if it is there.

    Returns:
        As for `export_onnx`.

    Raises:
        ExportError: as for `export_onnx`.
    """

    def write(outputs: Outputs, place: Path) -> None:
        torch.export.save(export_any_batch(outputs, pictures(model, BATCHES[0])), place)

    def load(place: Path) -> Run:
        return torch.export.load(place).module()

    return _export(model, path, ".pt2", write, load, native.PACKED)


def export_package(model: SigLipVisionModel, path: str | os.PathLike[str]) -> float:
    """Compiles the model into an AOTInductor package for processors such as this one.

    `load_package` loads it.

    Weights are frozen and laid out for the processor. Takes a minute or more, and a C++ compiler.
    The package runs only where the processor has what this one has, with the same release of torch.

    Args:
        model: on the CPU.
        path: what to write, `.pt2`; replaced if it is there.

    Returns:
        As for `export_onnx`.

    Raises:
        ExportError: as for `export_onnx`.
    """

    def write(outputs: Outputs, place: Path) -> None:
        from torch._inductor import aoti_compile_and_package

        exported = export_any_batch(outputs, pictures(model, BATCHES[0]))
        # The batch is symbolic, which makes Inductor take oneDNN's kernels instead of MKL's.
        aoti_compile_and_package(
            exported, package_path=str(place), inductor_configs={"freezing": True}
        )

    return _export(model, path, ".pt2", write, native.load_package, native.PACKED)


def _export(
    model: SigLipVisionModel,
    path: str | os.PathLike[str],
    suffix: str,
    write: Callable[[Outputs, Path], None],
    load: Callable[[Path], Run],
    dtypes: tuple[torch.dtype, ...],
    needs: str = "",
) -> float:
    """Writes beside the place, loads, compares, and only then puts it there."""
    if not isinstance(model, SigLipVisionModel):
        raise ExportError(f"model must be a SigLipVisionModel, got a {type(model).__name__}")
    if not isinstance(path, (str, os.PathLike)):
        raise ExportError(f"path must be that of a file, got {path!r}")
    path = Path(path)
    if isinstance(model, OptimizedModel):
        raise ExportError(
            "the model is optimized for this machine; export the one that it was made of"
        )
    home = model.transformer.post_layernorm.weight
    if home.device.type != "cpu" or home.dtype not in dtypes:
        raise ExportError(
            f"the model must be on the CPU, of {' or '.join(map(str, dtypes))}, got {home.dtype} "
            f"on {home.device}"
        )
    if path.suffix != suffix:
        raise ExportError(f"the file must be named *{suffix}, got {path.name!r}")
    outputs = Outputs(frozen(model, None)).eval()
    try:
        with (
            atomic.staging_dir(path.absolute().parent) as folder,
            torch.no_grad(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # of the exporters, about themselves
            place = folder / path.name
            write(outputs, place)
            run = load(place)
            pairs = [(run(x), outputs(x)) for x in (pictures(model, batch) for batch in BATCHES)]
            found = max(difference(ours, theirs) for ours, theirs in pairs)
            if not found <= BOUNDS[home.dtype]:
                raise ExportError(
                    f"{path.name} is not written: what it computes differs from the model by "
                    f"{found:.1e}, bound "
                    f"{BOUNDS[home.dtype]:.0e}"
                )
            atomic.commit_files([place], path.absolute().parent)
    except ImportError as error:
        raise ExportError(f"{path.name} is not written: it needs {needs}: {error}") from error
    except ExportError:
        raise
    except Exception as error:  # of many kinds: the exporters tell in whatever they like
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise ExportError(f"{path.name} is not written: {reason}") from error
    return found


EXPORTS: dict[str, tuple[Callable[[SigLipVisionModel, Path], float], str]] = {
    "onnx": (export_onnx, ".onnx"),
    "program": (export_program, ".pt2"),
    "package": (export_package, ".pt2"),
}
"""What can be written, by the name of its format: how, and what the file's name must end in."""

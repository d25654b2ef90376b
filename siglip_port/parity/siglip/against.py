"""`verify --against`: judge a port that is no `torch.nn.Module` by its outputs.

Taps, gradients and the port's own methods cannot be judged; the verdict lists what was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from siglip_port.parity.golden.folder import Expected
from siglip_port.parity.golden.judge import judge_results
from siglip_port.parity.observe import run_reference
from siglip_port.parity.results import Comparison, Finding, GateResult, Section
from siglip_port.parity.sides import PORT_ERRORS, dtype_name
from siglip_port.parity.siglip import foreign_ports
from siglip_port.parity.siglip.cases import Case
from siglip_port.parity.siglip.foreign_ports import ForeignPortError, PixelPort
from siglip_port.parity.siglip.sample_images import synthetic_image

BATCH_SIZES = (1, 3)
"""Batch sizes beside that of the case's own inputs."""

MAX_IMAGES = 64
"""Number of images whose vectors are compared."""

Process = Callable[[Image.Image], Tensor]
"""The reference's image processor: image -> pixels [1, C, S, S]."""

TARGETS = (
    "a golden folder, vectors (.parquet), a model file (.onnx, .pt2, .xml of OpenVINO), a function "
    "(module:function), or an address (http://...)"
)


def check_target(target: str) -> None:
    """Check what can be checked of a target before a checkpoint is loaded.

    Raises:
        ForeignPortError: The file does not exist.
        ValueError: The target is of no kind in `TARGETS`.
    """
    if target.startswith(("http://", "https://")):
        return
    is_file = target.endswith((".parquet", *foreign_ports.LOADERS))
    if not is_file and not foreign_ports.is_pixel_port(target):
        raise ValueError(f"--against must be {TARGETS}, got {target!r}")
    if is_file and not Path(target).is_file():
        raise ForeignPortError(f"{target}: no such file")


def judge_target(
    target: str, case: Case, process: Process, image: Image.Image, dtype: torch.dtype
) -> Comparison:
    """Judge another port on a checkpoint.

    Args:
        target: File, function or address, see `TARGETS`.
        case: Checkpoint with its reference.
        process: The reference's image processor.
        image: Image for ports that take images.
        dtype: Dtype in which the port computes.

    Raises:
        ForeignPortError: The port cannot be loaded, or does not answer.
        ValueError: The target is of none of these kinds.
    """
    check_target(target)
    if target.startswith(("http://", "https://")):
        images = {"image": image, "synthetic image": synthetic_image()}
        ask = foreign_ports.service(target)
        vectors = torch.stack([ask(sample) for sample in images.values()])
        section = judge_vectors(case, list(images.values()), vectors, process, dtype)
        return Comparison((section,), f"{case.weights}, {len(images)} images")
    if target.endswith(".parquet"):
        return judge_parquet(Path(target), case, process, dtype)
    port = foreign_ports.load_pixel_port(target)
    return Comparison(tuple(judge_pixel_port(port, case, dtype)), case.weights)


def judge_pixel_port(port: PixelPort, case: Case, dtype: torch.dtype) -> list[Section]:
    """Judge a port that takes pixels, in several batch sizes."""
    batches = {f"batch of {len(case.inputs)}": case.inputs}
    for size in BATCH_SIZES:
        shape = (size, *case.inputs.shape[1:])
        generator = torch.Generator().manual_seed(size)
        batches[f"batch of {size}"] = torch.rand(shape, generator=generator) * 2 - 1
    sections = []
    for name, pixel_values in batches.items():
        gate = judge_batch(port, case, pixel_values.cpu(), dtype)
        sections.append(Section(name, case.weights, (gate,)))
    return sections


def judge_batch(
    port: PixelPort, case: Case, pixel_values: Tensor, dtype: torch.dtype
) -> GateResult:
    """Judge the outputs of a port for one batch; a port that raises is different."""
    run = run_reference(case.reference.side(), pixel_values, [], dtype, case.attentions)
    try:
        outputs = port(pixel_values)
    except ForeignPortError:
        raise
    except PORT_ERRORS as error:  # whatever the port raises
        message = f"the port raises {type(error).__name__}: {foreign_ports.first_line(error)}"
        return GateResult(f"rounding {dtype_name(dtype)}", 1, "", (Finding(message),))
    expected = Expected.of(run).only(outputs)
    return judge_results(expected, outputs, dtype_name(dtype))


# --- vectors of images ----------------------------------------------------------------------------


def judge_parquet(path: Path, case: Case, process: Process, dtype: torch.dtype) -> Comparison:
    """Judge vectors in a Parquet file against those of its images."""
    names, vectors = foreign_ports.read_vectors(path)
    chosen = evenly_spaced(len(names), MAX_IMAGES)
    images = [open_image(path, names[i]) for i in chosen]
    section = judge_vectors(case, images, vectors[chosen], process, dtype)
    return Comparison((section,), f"{case.weights}, {len(images)} images")


def evenly_spaced(length: int, limit: int) -> list[int]:
    """Return at most `limit` positions of a list, the first and the last one included."""
    if length <= limit:
        return list(range(length))
    return [i * (length - 1) // (limit - 1) for i in range(limit)]


def open_image(table: Path, name: str) -> Image.Image:
    """Open an image; a relative path is relative to the working folder or to the table's."""
    for path in (Path(name), table.parent / name):
        if path.is_file():
            try:
                with Image.open(path) as image:
                    image.load()
                    return image
            except OSError as error:
                raise ForeignPortError(f"{path}: cannot be read ({error})") from error
    raise ForeignPortError(f"{table}: image {name!r} not found; run the command where it is")


def judge_vectors(
    case: Case, images: list[Image.Image], vectors: Tensor, process: Process, dtype: torch.dtype
) -> Section:
    """Judge the vectors of images, [B, D]; they may have unit length.

    Args:
        case: Checkpoint with its reference.
        images: B images.
        vectors: The port's vectors.
        process: The reference's image processor.
        dtype: Dtype in which the port computes.
    """
    pixel_values = torch.cat([process(image) for image in images])
    run = run_reference(case.reference.side(), pixel_values, [], dtype, case.attentions)
    expected = Expected.of(run).only(["pooled"])
    if not expected.outputs:
        raise ForeignPortError("the checkpoint has no pooling head, so it has no vectors")
    name = "vectors"
    if foreign_ports.is_normalized(vectors.double()):
        name = "vectors of unit length"
        pooled = expected.tensors["pooled"]
        unit = pooled / pooled.norm(dim=-1, keepdim=True)
        expected = replace(expected, tensors={"pooled": unit})
    gate = judge_results(expected, {"pooled": vectors}, dtype_name(dtype))
    return Section(name, case.weights, (gate,))

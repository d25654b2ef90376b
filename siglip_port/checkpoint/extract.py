"""Writes the vision encoder of a checkpoint as one of its own, verified before it can be seen."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from siglip_port.atomic import commit_files, staging_dir
from siglip_port.checkpoint.errors import CheckpointError
from siglip_port.model import SigLipVisionModel
from siglip_port.text import fold_blocks

Format = Literal["hf", "timm"]


@dataclass(frozen=True)
class Extraction:
    """What was written and verified.

    Attributes:
        files: those written.
        parameters: number of parameters that were compared, each a tensor.
        tokens: shape of the tokens that were compared.
        pooled: shape of the pooled vectors that were compared; None where the model has none.
    """

    files: tuple[Path, ...]
    parameters: int
    tokens: tuple[int, ...]
    pooled: tuple[int, ...] | None


def extract_model(model: SigLipVisionModel, out: Path, *, written_as: Format = "hf") -> Extraction:
    """Write a model to a folder.

    What is there afterwards is whole and verified, or nothing has changed.

    Args:
        model: as it was loaded.
        out: where to. If it exists, files of the same names are replaced and others stay.
        written_as: `hf` for a checkpoint of transformers, `timm` for one of timm.

    Raises:
        CheckpointError: it cannot be written, or what is read back is not the same.
        ValueError: timm has no model of this architecture.
    """
    try:
        return write_and_verify(model, out, written_as)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error.strerror or error}") from error


def write_and_verify(model: SigLipVisionModel, out: Path, written_as: Format) -> Extraction:
    """Write a model beside its place, read it back, and move it there if it is the same."""
    # On the same file system as what it becomes: a folder that exists may be one of its own, as
    # volumes are.
    exists = out.exists()
    with staging_dir(out if exists else out.parent) as staging:
        # A folder within, which has the permissions that a folder usually has: a temporary one is
        # private.
        folder = staging / "tower"
        try:
            if written_as == "hf":
                model.save_hf(folder)
            else:
                model.save_timm(folder)
            outputs = verify(model, folder)
        except CheckpointError as error:  # which speaks of a folder that nobody has asked for
            raise CheckpointError(str(error).replace(str(folder), str(out))) from error
        names = sorted(path.name for path in folder.iterdir())
        if exists:
            commit_files([folder / name for name in names], out)
        else:
            folder.rename(out)
    shapes = [tuple(output.shape) for output in outputs]
    return Extraction(
        files=tuple(out / name for name in names),
        parameters=len(model.state_dict()),
        tokens=shapes[0],
        pooled=shapes[1] if len(shapes) > 1 else None,
    )


def verify(model: SigLipVisionModel, folder: Path) -> list[Tensor]:
    """Read what was written, and compare it.

    Returns:
        What both models compute of noise.

    Raises:
        CheckpointError: it is not the same.
    """
    result = SigLipVisionModel.from_hf(folder)
    expected_state = model.state_dict()
    state = result.state_dict()
    different = []
    for name in expected_state.keys() | state.keys():
        if not is_same(expected_state.get(name), state.get(name)):
            different.append(name)
    # How positions are fitted to other sizes is the caller's choice, and no file tells it.
    if result.config != replace(model.config, interpolation=result.config.interpolation):
        different.append("the configuration")
    expected = outputs_of_noise(model)
    if not different:
        outputs = zip(outputs_of_noise(result), expected, strict=True)
        if not all(is_same(output, other) for output, other in outputs):
            different.append("what it computes of an image of noise")
    if different:
        names = ", ".join(fold_blocks(sorted(different)))
        raise CheckpointError(
            f"what was written is not what was read, and has been removed; different: {names}"
        )
    return expected


def is_same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether the bits are the same, so that NaN equals NaN, and 0 is not -0."""
    if a is None or b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@torch.inference_mode()
def outputs_of_noise(model: SigLipVisionModel) -> list[Tensor]:
    """Compute tokens and, where there is a way to pool them, the pooled vector of noise."""
    # A copy in memory of torch's own: how a sum is rounded may depend on where a tensor begins,
    # which for a mapped one is anywhere.
    model = copy.deepcopy(model)
    config = model.config
    shape = (1, config.num_channels, config.image_size, config.image_size)
    tokens = model(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    if not config.has_pooled_output:
        return [tokens]
    return [tokens, model.pool(tokens)]

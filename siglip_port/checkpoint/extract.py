"""Writes the tower of a checkpoint as a checkpoint of its own, and reads it back before anybody else can see it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from siglip_port import atomic
from siglip_port.checkpoint.reader import CheckpointError
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
        pooled: shape of the pooled vectors that were compared; None where the tower has none.
    """

    files: tuple[Path, ...]
    parameters: int
    tokens: tuple[int, ...]
    pooled: tuple[int, ...] | None


def extract(model: SigLipVisionModel, out: Path, *, written_as: Format = "hf") -> Extraction:
    """Writes a model to a folder.

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
        return _extract(model, out, written_as)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error.strerror or error}") from error


def _extract(model: SigLipVisionModel, out: Path, written_as: Format) -> Extraction:
    # On the same file system as what it becomes: a folder that exists may be one of its own, as
    # volumes are.
    exists = out.exists()
    with atomic.staging_dir(out if exists else out.parent) as unfinished:
        # A folder within, which has the permissions that a folder usually has: a temporary one is
        # private.
        folder = unfinished / "tower"
        try:
            (model.save_hf if written_as == "hf" else model.save_timm)(folder)
            parameters, outputs = _verify(model, folder)
        except CheckpointError as error:  # which speaks of a folder that nobody has asked for
            raise CheckpointError(str(error).replace(str(folder), str(out))) from error
        names = sorted(path.name for path in folder.iterdir())
        if exists:
            atomic.commit_files([folder / name for name in names], out)
        else:
            folder.rename(out)
    shapes = [tuple(output.shape) for output in outputs]
    pooled = shapes[1] if len(shapes) > 1 else None
    return Extraction(tuple(out / name for name in names), parameters, shapes[0], pooled)


def _verify(model: SigLipVisionModel, folder: Path) -> tuple[int, list[Tensor]]:
    """Reads what was written.

    Returns how many parameters were compared, and what both models compute of noise.
    """
    again = SigLipVisionModel.from_hf(folder)
    expected, found = model.state_dict(), again.state_dict()
    different = [
        name
        for name in expected.keys() | found.keys()
        if not _same(expected.get(name), found.get(name))
    ]
    # How positions are fitted to other sizes is the caller's choice, and no file tells it.
    if again.config != replace(model.config, interpolation=again.config.interpolation):
        different.append("the configuration")
    outputs = _outputs(model)
    if not different and not all(
        _same(a, b) for a, b in zip(outputs, _outputs(again), strict=True)
    ):
        different.append("what it computes of a picture of noise")
    if different:
        names = ", ".join(fold_blocks(sorted(different)))
        raise CheckpointError(
            f"what was written is not what was read, and has been removed; different: {names}"
        )
    return len(expected), outputs


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether the bits are the same, so that NaN equals NaN, and 0 is not -0."""
    if a is None or b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@torch.inference_mode()
def _outputs(model: SigLipVisionModel) -> list[Tensor]:
    """Tokens and, where there is a way to pool them, the pooled vector of a picture of noise."""
    # A copy in memory of torch's own: how a sum is rounded may depend on where a tensor begins,
    # which for a mapped one is anywhere.
    model, config = copy.deepcopy(model), model.config
    shape = (1, config.num_channels, config.image_size, config.image_size)
    tokens = model(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    return [tokens, model.pool(tokens)] if config.pooling_head or config.mean_pooling else [tokens]

"""Saving the vision encoder of a checkpoint on its own, verified before it is moved into place."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from siglip_port.atomic import staging_dir
from siglip_port.checkpoint.errors import CheckpointError
from siglip_port.checkpoint.model_card import CARD
from siglip_port.checkpoint.output_folder import (
    check_folder,
    move_checkpoint,
    staged_names,
)
from siglip_port.model import SigLipVisionModel
from siglip_port.text import fold_blocks

Format = Literal["hf", "timm"]


@dataclass(frozen=True)
class Extraction:
    """Result of an extraction.

    Attributes:
        files: Written files.
        skipped: Files of the output folder that were not replaced: a `README.md` of somebody else.
        parameters: Number of verified parameter tensors.
        tokens: Shape of the compared tokens, [1, N, D].
        pooled: Shape of the compared embedding, [1, D]; None if the model has no pooling.
    """

    files: tuple[Path, ...]
    skipped: tuple[Path, ...]
    parameters: int
    tokens: tuple[int, ...]
    pooled: tuple[int, ...] | None


def extract_model(
    model: SigLipVisionModel, output_dir: Path, *, format: Format = "hf"
) -> Extraction:
    """Save a model, verify the files, and move them into place.

    On failure, the output folder is unchanged.

    Args:
        model: Loaded model.
        output_dir: Output folder, created if necessary. Its checkpoint is replaced: see `save_hf`.
        format: `hf` for transformers, `timm` for timm.

    Raises:
        CheckpointError: The files cannot be written (see `save_hf`), or differ from the model when
            read back.
        ValueError: timm does not support this architecture.
    """
    try:
        return write_and_verify(model, output_dir, format)
    except OSError as error:
        message = f"{output_dir} cannot be written to: {error.strerror or error}"
        raise CheckpointError(message) from error


def write_and_verify(model: SigLipVisionModel, output_dir: Path, format: Format) -> Extraction:
    """Save a model to a staging folder, read it back, and move it if it is identical."""
    # Staging must be on the file system of the output; an existing folder may be a mount point.
    check_folder(output_dir)
    exists = output_dir.exists()
    with staging_dir(output_dir if exists else output_dir.parent) as staging:
        # A subfolder gets the default permissions; the temporary folder itself is private.
        folder = staging / "encoder"
        try:
            if format == "hf":
                model.save_hf(folder)
            else:
                model.save_timm(folder)
            outputs = verify(model, folder)
        except CheckpointError as error:  # its message names the staging folder
            raise CheckpointError(str(error).replace(str(folder), str(output_dir))) from error
        if exists:
            names = move_checkpoint(folder, output_dir)
        else:
            names = staged_names(folder)
            folder.rename(output_dir)
    skipped = []
    if CARD not in names:
        skipped.append(output_dir / CARD)
    shapes = [tuple(output.shape) for output in outputs]
    return Extraction(
        files=tuple(output_dir / name for name in names),
        skipped=tuple(skipped),
        parameters=len(model.state_dict()),
        tokens=shapes[0],
        pooled=shapes[1] if len(shapes) > 1 else None,
    )


def verify(model: SigLipVisionModel, folder: Path) -> list[Tensor]:
    """Load the saved files and compare the model bit for bit.

    Returns:
        Tokens and, if the model has pooling, the embedding of a random image, equal in both models.

    Raises:
        CheckpointError: The loaded model differs.
    """
    result = SigLipVisionModel.from_hf(folder)
    expected_state = model.state_dict()
    state = result.state_dict()
    different = []
    for name in expected_state.keys() | state.keys():
        if not is_same(expected_state.get(name), state.get(name)):
            different.append(name)
    # The interpolation rule is an argument of `from_hf` and is not stored in the files.
    if result.config != replace(model.config, interpolation=result.config.interpolation):
        different.append("the configuration")
    expected = outputs_on_noise(model)
    if not different:
        outputs = zip(outputs_on_noise(result), expected, strict=True)
        if not all(is_same(output, other) for output, other in outputs):
            different.append("the outputs for a random image")
    if different:
        names = ", ".join(fold_blocks(sorted(different)))
        raise CheckpointError(
            f"the written files differ from the source and were removed; different: {names}"
        )
    return expected


def is_same(a: Tensor | None, b: Tensor | None) -> bool:
    """Return whether tensors are bit-identical: NaN equals NaN, and 0 differs from -0."""
    if a is None or b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@torch.inference_mode()
def outputs_on_noise(model: SigLipVisionModel) -> list[Tensor]:
    """Return the tokens and, if the model has pooling, the embedding of a random image."""
    # The alignment of mapped tensors may change the rounding of sums; a copy has PyTorch's.
    model = copy.deepcopy(model)
    config = model.config
    shape = (1, config.num_channels, config.image_size, config.image_size)
    tokens = model(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    if not config.has_pooled_output:
        return [tokens]
    return [tokens, model.pool(tokens)]

"""Writes a model as a checkpoint, each file whole or not at all."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from siglip_port.atomic import commit_files, staging_dir
from siglip_port.checkpoint.errors import CheckpointError, Problem, describe_problems
from siglip_port.checkpoint.formats import DTYPES
from siglip_port.checkpoint.layouts import (
    HUGGINGFACE,
    HUGGINGFACE_NAFLEX,
    PREFIX,
    TIMM,
    TIMM_NAFLEX,
)
from siglip_port.checkpoint.preprocessor_config import PREPROCESSOR
from siglip_port.checkpoint.pretrained import build_on_meta
from siglip_port.checkpoint.provenance import FINGERPRINT, ORIGIN, fingerprint
from siglip_port.checkpoint.recognize import Match
from siglip_port.checkpoint.source import CONFIG, WEIGHTS
from siglip_port.checkpoint.timm_config import config_to_timm
from siglip_port.model import SigLipVisionModel

Documents = Mapping[str, Mapping[str, Any]]
"""Names and contents of the JSON files that go with the weights."""


def save_hf(model: SigLipVisionModel, folder: str | os.PathLike[str]) -> None:
    """Write a model as a HuggingFace `SiglipVisionModel`, or `Siglip2VisionModel` if it is NaFlex.

    Writes `model.safetensors`, a complete `config.json` and `preprocessor_config.json`. Tensors are
    named as on the Hub (prefix `vision_model.`), which old and new releases of transformers read.

    Args:
        model: the model.
        folder: where to; made if it does not exist. The three files are replaced if they are there
            already.

    Raises:
        CheckpointError: the parameters are no longer those of the encoder (wrapped, quantized, with
            adapters), or the folder cannot be written.
    """
    layout = HUGGINGFACE_NAFLEX if model.config.naflex else HUGGINGFACE
    documents = {CONFIG: model.config.to_hf(), PREPROCESSOR: model.preprocessor_config}
    save(model, folder, Match(layout, PREFIX), documents)


def save_timm(model: SigLipVisionModel, folder: str | os.PathLike[str]) -> None:
    """Write a model as timm does: `model.safetensors` and timm's `config.json`.

    `timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=0)` loads it, with the
    activation of the encoder. timm reads images its own way: it crops them, where transformers does
    not.

    Args:
        model: the model.
        folder: where to; made if it does not exist. The two files are replaced if they are there
            already.

    Raises:
        CheckpointError: as for `save_hf`.
        ValueError: timm has no model of this architecture.
    """
    layout = TIMM_NAFLEX if model.config.naflex else TIMM
    documents = {CONFIG: config_to_timm(model.config, model.preprocessor_config)}
    save(model, folder, Match(layout, ""), documents)


def save(
    model: SigLipVisionModel,
    folder: str | os.PathLike[str],
    match: Match,
    documents: Documents,
) -> None:
    """Write the tensors of a model, and the JSON files that go with them.

    Args:
        model: the model.
        folder: where to; made if it does not exist. `model.safetensors` and the documents in it are
            replaced.
        match: how tensors are to be stored, and behind which prefix.
        documents: `config.json`, and others.

    Raises:
        CheckpointError: the tensors are not those of the architecture, or the folder cannot be
            written.
    """
    _, shapes = build_on_meta(model.config, "the configuration", SigLipVisionModel)
    state_dict = model.state_dict()
    problems = find_problems(state_dict, shapes)
    if problems:
        raise CheckpointError(describe_problems("the model to be saved", problems))
    if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
        raise CheckpointError(f"the checkpoint needs a folder to be written to, got {folder!r}")
    stored = match.layout.to_stored(
        state_dict,
        model.config.num_encoder_blocks,
        model.config.num_attention_heads,
        match.layout.rules(model.config.pooling_head),
        match.prefix,
    )
    if match.layout.has_hf_config:
        documents = with_dtype(documents, stored)
    try:
        write_files(Path(folder), stored, weights_metadata(model), documents)
    except (OSError, SafetensorError, TypeError) as error:  # TypeError: a document that is no JSON
        raise CheckpointError(
            f"the checkpoint could not be written to {os.fspath(folder)}: {error}"
        ) from error


def find_problems(state_dict: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> list[Problem]:
    """Find what keeps a state from being saved as that of an architecture.

    Args:
        state_dict: of the model.
        shapes: our names of all that the architecture has, with the shape of each.
    """
    missing = shapes.keys() - state_dict.keys()
    unknown = list(state_dict.keys() - shapes.keys())
    misshapen: list[str] = []
    unsavable: list[str] = []
    subclasses: list[str] = []
    for name, tensor in state_dict.items():
        if not isinstance(tensor, torch.Tensor):
            # Quantized modules keep other things among their state than tensors; all of it is
            # unknown here, and what it stands for is missing.
            if name in shapes:
                unknown.append(name)
                missing.add(name)
            continue
        if name in shapes and tensor.shape != shapes[name]:
            misshapen.append(name)
        if tensor.dtype not in DTYPES.values() or tensor.is_meta:
            unsavable.append(name)
        # A subclass of torch's Tensor: FSDP's DTensor, say, of which every process holds a part.
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            subclasses.append(name)
    problems = [
        ("missing tensors", sorted(missing)),
        ("unknown tensors", sorted(unknown)),
        ("another shape than the configuration says", misshapen),
        ("a dtype or device that cannot be saved", unsavable),
        ("sharded or quantized; to be gathered or dequantized first", subclasses),
    ]
    return [(problem, names) for problem, names in problems if names]


def with_dtype(documents: Documents, stored: Mapping[str, torch.Tensor]) -> Documents:
    """Add to transformers' configuration the dtype that the tensors have."""
    dtypes = {tensor.dtype for tensor in stored.values()}
    dtype = functools.reduce(torch.promote_types, dtypes)
    config = {**documents[CONFIG], "dtype": str(dtype).removeprefix("torch.")}
    return {**documents, CONFIG: config}


def weights_metadata(model: SigLipVisionModel) -> dict[str, str]:
    """Return the metadata of the weights file, sorted."""
    # without its format, transformers 4.40 cannot read the file
    metadata = {"format": "pt", FINGERPRINT: fingerprint(model.config)}
    if model.provenance is not None and model.provenance.origin is not None:
        metadata[ORIGIN] = model.provenance.origin
    return metadata


def write_files(
    folder: Path,
    stored: Mapping[str, torch.Tensor],
    metadata: dict[str, str],
    documents: Documents,
) -> None:
    """Write all files beside their places, then move them there.

    A reader sees the old files or the new ones, never a part, and a model that is mapped from the
    old file keeps it.
    """
    with staging_dir(folder) as staging:
        weights = staging / WEIGHTS
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in stored.items()}
        save_file(tensors, weights, metadata=metadata)
        sort_metadata(weights)
        files = [weights]
        for name, content in documents.items():
            path = staging / name
            path.write_text(json.dumps(dict(content), indent=2) + "\n", encoding="utf-8")
            files.append(path)
        # safetensors hides its files from everybody else
        weights.chmod(files[-1].stat().st_mode)
        commit_files(files, folder)


def sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file, which the library writes in any order."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(content.ljust(length))

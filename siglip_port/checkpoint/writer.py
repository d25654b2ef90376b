"""Saving a model as a checkpoint, with atomic replacement of each file."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from siglip_port.atomic import staging_dir
from siglip_port.checkpoint.errors import CheckpointError, Problem, describe_problems
from siglip_port.checkpoint.formats import DTYPES
from siglip_port.checkpoint.layouts import (
    HUGGINGFACE,
    HUGGINGFACE_NAFLEX,
    PREFIX,
    TIMM,
    TIMM_NAFLEX,
)
from siglip_port.checkpoint.model_card import CARD, model_card
from siglip_port.checkpoint.output_folder import check_folder, move_checkpoint
from siglip_port.checkpoint.preprocessor_config import PREPROCESSOR, without_references
from siglip_port.checkpoint.pretrained import build_on_meta
from siglip_port.checkpoint.provenance import FINGERPRINT, ORIGIN, fingerprint
from siglip_port.checkpoint.recognize import Match
from siglip_port.checkpoint.sentence_transformers import sentence_transformers_files
from siglip_port.checkpoint.source import CONFIG, WEIGHTS
from siglip_port.checkpoint.timm_config import config_to_timm
from siglip_port.image_options import UnsupportedOptionsError, parse_options
from siglip_port.model import SigLipVisionModel

Documents = Mapping[str, Any]
"""Contents of the JSON files beside the weights, by name relative to the folder."""


ADAPTERS = "has adapters; call merge_and_unload() first and save its result"
WRAPPED = "has a wrapped part; put the module inside the wrapper back first"
WRAPPERS = {
    "base_layer": ADAPTERS,
    "lora_A": ADAPTERS,
    "lora_B": ADAPTERS,
    "modules_to_save": ADAPTERS,
    "_orig_mod": "has a compiled part; put its _orig_mod back first, or use part.compile()",
    "module": WRAPPED,
    "_fsdp_wrapped_module": WRAPPED,
    "_checkpoint_wrapped_module": WRAPPED,
    "parametrizations": "has a parametrized weight; remove the parametrization first",
}
"""Part of a parameter's name -> why the model cannot be saved, and what to do."""


def save_hf(model: SigLipVisionModel, folder: str | os.PathLike[str]) -> None:
    """Save a model for transformers: `SiglipVisionModel`, or `Siglip2VisionModel` for NaFlex.

    Writes `model.safetensors`, a complete `config.json`, `preprocessor_config.json`, the files that
    sentence-transformers needs for the same embeddings, and a model card, `README.md`. Tensor names
    have the prefix `vision_model.`, as in the published files, which old and new releases of
    transformers read.

    Args:
        model: Model to save.
        folder: Output folder, created if necessary. It holds one checkpoint: files of the same
            names are replaced, except a `README.md` that is not a model card of this package; an
            old `model.safetensors.index.json` with the shards that it lists, and an old
            `processor_config.json`, are removed. Other files stay.

    Raises:
        CheckpointError: The parameters do not match the configuration (wrapped, quantized, with
            adapters), the folder contains adapters or other weights that libraries would read with
            the saved ones (the message names them), or the files cannot be written. The folder is
            unchanged.
    """
    require_plain_model(model)
    layout = HUGGINGFACE_NAFLEX if model.config.naflex else HUGGINGFACE
    processor = without_references(checked_processor(model))
    documents = {
        CONFIG: model.config.to_hf(),
        PREPROCESSOR: {**processor, **model.preprocessing.assumption()},
        **sentence_transformers_files(model.config),
    }
    save(model, folder, Match(layout, PREFIX), documents, "transformers")


def save_timm(model: SigLipVisionModel, folder: str | os.PathLike[str]) -> None:
    """Save a model for timm: `model.safetensors`, timm's `config.json` and a model card.

    `timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=0)` loads it with the
    model's activation. Preprocessing differs: timm crops images, transformers does not.

    Args:
        model: Model to save.
        folder: Output folder, created if necessary. Files are replaced and removed as by `save_hf`,
            whose `preprocessor_config.json` and sentence-transformers files are removed, too.

    Raises:
        CheckpointError: See `save_hf`.
        ValueError: timm does not support this architecture.
    """
    require_plain_model(model)
    layout = TIMM_NAFLEX if model.config.naflex else TIMM
    content = config_to_timm(model.config, checked_processor(model))
    documents = {CONFIG: {**content, **model.preprocessing.assumption()}}
    save(model, folder, Match(layout, ""), documents, "timm")


def save(
    model: SigLipVisionModel,
    folder: str | os.PathLike[str],
    match: Match,
    documents: Documents,
    library: str,
) -> None:
    """Save the tensors of a model and the files beside them.

    Args:
        model: Model to save.
        folder: Output folder, created if necessary. Its checkpoint is replaced: see `save_hf`.
        match: Layout and prefix of the stored tensors.
        documents: Contents of `config.json` and other JSON files.
        library: Library that the files are for, `transformers` or `timm`.

    Raises:
        CheckpointError: See `save_hf`.
    """
    _, shapes = build_on_meta(model.config, "the configuration", SigLipVisionModel)
    state_dict = model.state_dict()
    problems = find_problems(state_dict, shapes)
    if problems:
        raise CheckpointError(
            wrapper_problem(state_dict) or describe_problems("the model to be saved", problems)
        )
    if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
        raise CheckpointError(f"folder must be a path, got {folder!r}")
    folder = Path(folder)
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
        if folder.is_file():
            raise CheckpointError(
                f"the checkpoint cannot be written to {folder}: it is a file; choose another folder"
            )
        check_folder(folder)
        card = model_card(model, library)
        write_files(folder, stored, weights_metadata(model), documents, card)
    except (OSError, SafetensorError, TypeError) as error:  # TypeError: not JSON serializable
        raise CheckpointError(f"the checkpoint cannot be written to {folder}: {error}") from error


def checked_processor(model: SigLipVisionModel) -> dict[str, Any]:
    """Return `model.preprocessor_config`.

    Raises:
        CheckpointError: A field has an invalid value.
    """
    try:
        parse_options(model.preprocessor_config)
    except UnsupportedOptionsError:
        pass  # transformers supports it
    except ValueError as error:
        raise CheckpointError(f"model.preprocessor_config cannot be saved: {error}") from error
    return model.preprocessor_config


def require_plain_model(model: object) -> None:
    """Raise CheckpointError unless `model` is a SigLipVisionModel, and no wrapper around one."""
    if not isinstance(model, SigLipVisionModel):
        raise CheckpointError(
            f"model must be a SigLipVisionModel, got {type(model).__name__}; pass the model inside "
            "it: the result of merge_and_unload() of a PeftModel, .module of a "
            "DistributedDataParallel, ._orig_mod of a compiled model"
        )


def find_problems(state_dict: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> list[Problem]:
    """Compare a state dict with the architecture.

    Args:
        state_dict: State dict of the model.
        shapes: Shapes of all parameters of the architecture by name.

    Returns:
        The problems that prevent saving.
    """
    missing = shapes.keys() - state_dict.keys()
    unexpected = list(state_dict.keys() - shapes.keys())
    misshapen: list[str] = []
    unsavable: list[str] = []
    subclasses: list[str] = []
    for name, tensor in state_dict.items():
        if not isinstance(tensor, torch.Tensor):
            # Quantized modules have entries that are not tensors, in place of parameters.
            if name in shapes:
                unexpected.append(name)
                missing.add(name)
            continue
        if name in shapes and tensor.shape != shapes[name]:
            misshapen.append(name)
        if tensor.dtype not in DTYPES.values() or tensor.is_meta:
            unsavable.append(name)
        # Tensor subclasses, such as FSDP's DTensor, of which each process has only a shard.
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            subclasses.append(name)
    problems = [
        ("missing tensors", sorted(missing)),
        ("unexpected tensors", sorted(unexpected)),
        ("shapes that differ from the configuration", misshapen),
        ("unsupported dtype or device", unsavable),
        ("sharded or quantized tensors; gather or dequantize them first", subclasses),
    ]
    return [(problem, names) for problem, names in problems if names]


def wrapper_problem(names: Iterable[str]) -> str:
    """Describe the wrapper that parameter names belong to; empty if there is none."""
    for name in names:
        for part in name.split("."):
            if part in WRAPPERS:
                return f"the model to be saved {WRAPPERS[part]} (it has a parameter {name})"
    return ""


def with_dtype(documents: Documents, stored: Mapping[str, torch.Tensor]) -> Documents:
    """Add the dtype of the tensors to transformers' configuration."""
    dtypes = {tensor.dtype for tensor in stored.values()}
    dtype = functools.reduce(torch.promote_types, dtypes)
    config = {**documents[CONFIG], "dtype": str(dtype).removeprefix("torch.")}
    return {**documents, CONFIG: config}


def weights_metadata(model: SigLipVisionModel) -> dict[str, str]:
    """Return the metadata of the weights file."""
    # transformers 4.40 cannot read a file without "format"
    metadata = {"format": "pt", FINGERPRINT: fingerprint(model.config)}
    if model.provenance is not None and model.provenance.origin is not None:
        metadata[ORIGIN] = model.provenance.origin
    return metadata


def write_files(
    folder: Path,
    stored: Mapping[str, torch.Tensor],
    metadata: dict[str, str],
    documents: Documents,
    card: str,
) -> None:
    """Write all files to a staging folder, then move them into place.

    A reader never sees a partial file, and a model mapped from the old file keeps its weights.
    """
    with staging_dir(folder) as staging:
        weights = staging / WEIGHTS
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in stored.items()}
        save_file(tensors, weights, metadata=metadata)
        sort_metadata(weights)
        for name, content in documents.items():
            path = staging / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (staging / CARD).write_text(card, encoding="utf-8")
        # safetensors creates files readable by the owner only
        weights.chmod((staging / CARD).stat().st_mode)
        move_checkpoint(staging, folder)


def sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file, which the library writes in arbitrary order."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(content.ljust(length))

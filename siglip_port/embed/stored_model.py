"""The model of existing embeddings: what `_run.json` stores of it, and how it is loaded again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from siglip_port.config import SigLipVisionConfig
from siglip_port.embed.encoder import IN_MEMORY
from siglip_port.embed.errors import EmbedError
from siglip_port.image_processing import ImageProcessor, check_backend
from siglip_port.model import SigLipVisionModel

PASS_SOURCE = "pass the model as source="

PLACE = ("layout", "prefix")
"""Stored arguments that belong to one file; another `source` may need others."""

ARGUMENTS = (*PLACE, "config", "dtype", "interpolation", "pooling_head")
"""Stored arguments of `SigLipVisionModel.from_hf`."""


def describe_model(model: SigLipVisionModel) -> dict[str, Any]:
    """Return what loads a model again, beside its source and commit, as a JSON object.

    That are the arguments that were passed to `from_hf`, and `path`, the absolute path of a local
    checkpoint. Empty for a model that was not loaded from a checkpoint.
    """
    provenance = model.provenance
    if provenance is None:
        return {}
    stored: dict[str, Any] = {}
    if provenance.commit is None:
        stored["path"] = str(Path(provenance.source).expanduser().absolute())
    for name, value in provenance.options.items():
        stored[name] = value
        if isinstance(value, torch.dtype):
            stored[name] = str(value).removeprefix("torch.")
        elif isinstance(value, SigLipVisionConfig):
            stored[name] = asdict(value)
    return stored


def load_model(
    folder: Path,
    settings: Mapping[str, Any],
    *,
    source: str | os.PathLike[str] | None,
    passed: Mapping[str, Any],
    local_files_only: bool,
) -> SigLipVisionModel:
    """Load the model of the embeddings in a folder.

    Args:
        folder: Output folder of `embed`.
        settings: Its settings.
        source: Hub id or path of the model, if it has moved; None for the stored one.
        passed: Arguments of `SigLipVisionModel.from_hf` that replace the stored ones.
        local_files_only: Whether to use only the Hub's local cache.

    Raises:
        EmbedError: The settings do not say how to load it, or it cannot be loaded.
        siglip_port.CheckpointError: `source` cannot be loaded.
    """
    arguments = stored_arguments(folder, settings)
    options: dict[str, Any] = {"local_files_only": local_files_only}
    if source is not None:
        for name in PLACE:
            arguments.pop(name, None)
        return SigLipVisionModel.from_hf(source, **{**arguments, **passed, **options})
    address = stored_address(folder, settings)
    arguments["revision"] = settings["commit"]
    try:
        return SigLipVisionModel.from_hf(address, **{**arguments, **passed, **options})
    except ValueError as error:
        raise EmbedError(
            f"{folder}: the model of the embeddings cannot be loaded: {error}; {PASS_SOURCE}"
        ) from error


def stored_arguments(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the stored arguments of `SigLipVisionModel.from_hf`.

    Raises:
        EmbedError: They are not those that this version stores.
    """
    stored = settings.get("model", {})
    try:
        arguments = {name: value for name, value in stored.items() if name != "path"}
        if "dtype" in arguments:
            arguments["dtype"] = getattr(torch, arguments["dtype"])
        if "config" in arguments:
            arguments["config"] = SigLipVisionConfig(**arguments["config"])
    except (AttributeError, TypeError, ValueError) as error:
        raise EmbedError(f"{folder}: invalid model in its settings ({error})") from error
    unknown = arguments.keys() - set(ARGUMENTS)
    if unknown:
        raise EmbedError(f"{folder}: unknown arguments in its settings: {', '.join(unknown)}")
    return arguments


def stored_address(folder: Path, settings: Mapping[str, Any]) -> str:
    """Return the address of the stored model, an existing path if it is local.

    Raises:
        EmbedError: The model was never stored, or its path does not exist.
    """
    source: str = settings["source"]
    path = settings.get("model", {}).get("path")
    if source == IN_MEMORY:
        raise EmbedError(
            f"{folder}: the model of the embeddings was in memory, not loaded from a checkpoint; "
            f"save it with save_hf, and {PASS_SOURCE}"
        )
    if path is None:
        return source
    for candidate in (path, source):
        if Path(candidate).expanduser().exists():
            return str(candidate)
    raise EmbedError(
        f"{folder}: the model of the embeddings, {source}, is no longer at {path}; {PASS_SOURCE}"
    )


def stored_processor(folder: Path, settings: Mapping[str, Any]) -> ImageProcessor:
    """Return the image processor of the embeddings.

    Raises:
        EmbedError: It has other options than those of this version.
        siglip_port.extras.MissingExtraError: Its backend is not installed.
    """
    options: dict[str, Any] = {}
    for name, value in settings["processor"].items():
        options[name] = tuple(value) if isinstance(value, list) else value
    try:
        processor = ImageProcessor(**options)
    except TypeError as error:
        raise other_preprocessing(folder) from error
    if processor.fingerprint != settings["preprocessing"]:
        raise other_preprocessing(folder)
    check_backend(processor.backend, processor.resample)
    return processor


def other_preprocessing(folder: Path) -> EmbedError:
    """Return the error for embeddings whose preprocessing this version cannot repeat."""
    return EmbedError(
        f"{folder}: embeddings were computed with the preprocessing of another version of "
        "siglip-port; search with that version, or write them again"
    )

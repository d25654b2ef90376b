"""A model from a checkpoint: what `from_hf` does."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TypedDict, TypeVar

import torch

from siglip_port.checkpoint.errors import CheckpointError
from siglip_port.checkpoint.formats import DTYPES
from siglip_port.checkpoint.reader import Checkpoint
from siglip_port.config import SigLipVisionConfig
from siglip_port.model import SigLipVisionModel

Model = TypeVar("Model", bound=SigLipVisionModel)


class LoadOptions(TypedDict, total=False):
    """The keyword arguments of `SigLipVisionModel.from_hf`: see `load_model`."""

    revision: str | None
    dtype: torch.dtype | None
    device: torch.device | str | None
    pooling_head: bool | None
    interpolation: str | None
    layout: str | None
    prefix: str | None
    config: SigLipVisionConfig | None
    local_files_only: bool
    token: str | bool | None
    cache_dir: str | os.PathLike[str] | None
    vision_only: bool


def load_model(
    cls: type[Model],
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    pooling_head: bool | None = None,
    interpolation: str | None = None,
    layout: str | None = None,
    prefix: str | None = None,
    config: SigLipVisionConfig | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    vision_only: bool = True,
) -> Model:
    """Load a checkpoint that holds a SigLIP vision encoder: all of it, or an error that says why.

    Reads the layouts of transformers, timm, open_clip and big_vision, and of many vision-language
    models, in one file or in shards: see docs/checkpoints.md. `print(model.provenance)` tells what
    was recognized.

    Args:
        cls: the class of the model.
        source: a Hub id, a folder, a `.safetensors` file with its configuration beside it, or an
            `.npz` file. What exists on this machine is taken as a path. Also `name@revision`,
            `hf://...`, `hf-hub:...`, and the address of a model's page on the Hub, or of one of its
            weights files.
        revision: branch, tag or commit of a Hub repository; of no meaning for a path.
        dtype: dtype of the parameters; None for that of the file.
        device: where to put the parameters; None for the CPU, where they are mapped from the file.
        pooling_head: None to keep the pooling head if the checkpoint has one, True to demand one,
            False to leave it out and unread.
        interpolation: the rule by which positions are fitted to images of other sizes, one of
            `siglip_port.config.INTERPOLATIONS`; None for the checkpoint's own, which most have not:
            then images of other sizes are refused.
        layout: the name of one of `siglip_port.checkpoint.layouts.LAYOUTS`; None to recognize it.
        prefix: what stands before the encoder's names in the file, such as `vision_model.`; None to
            find it.
        config: the architecture, where the checkpoint does not tell it, or tells it wrongly.
        local_files_only: look into the Hub's local cache only, never ask the network.
        token: Hub token, True for the stored one, False for none.
        cache_dir: instead of the Hub's usual cache folder.
        vision_only: of weights on the Hub, fetch the vision encoder alone, where that is less than
            the file; False for whole files, which other libraries find in the cache, too, and whose
            hash the Hub reports.

    Returns:
        The model in `eval()` mode.

    Raises:
        CheckpointError: the checkpoint cannot be found, or does not hold exactly one SigLIP vision
            encoder.
        ValueError: `dtype`, `device`, `interpolation` or `layout` is not supported.
    """
    from siglip_port.hub import HubOptions, find_source

    validate_placement(dtype, device)
    validate_overrides(config, prefix)
    options = HubOptions(
        revision=revision,
        local_files_only=local_files_only,
        token=token,
        cache_dir=cache_dir,
        vision_only=vision_only,
    )
    replace(config or SigLipVisionConfig(), interpolation=interpolation)  # refuses unknown rules
    files = find_source(source, options)
    checkpoint = Checkpoint(
        files, pooling_head=pooling_head, layout=layout, prefix=prefix, config=config
    )
    rule = interpolation or checkpoint.config.interpolation
    model, shapes = build_on_meta(replace(checkpoint.config, interpolation=rule), files.title, cls)
    tensors, model.provenance = checkpoint.read(shapes, dtype=dtype, device=device)
    model.load_state_dict(tensors, strict=True, assign=True)
    model.preprocessor_config = checkpoint.preprocessor_config
    return model.eval()


def validate_placement(dtype: torch.dtype | None, device: torch.device | str | None) -> None:
    """Raise ValueError unless parameters can be of this dtype, and on this device."""
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(
            f"dtype must be one of {', '.join(map(str, DTYPES.values()))}, got {dtype!r}"
        )
    try:
        is_meta = torch.empty(0, device=device).is_meta
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used on this machine: {reason}") from error
    if is_meta:
        raise ValueError("device must be one that holds values, got 'meta'")


def validate_overrides(config: SigLipVisionConfig | None, prefix: str | None) -> None:
    """Raise ValueError unless what overrides the checkpoint is of the right type."""
    if config is not None and not isinstance(config, SigLipVisionConfig):
        raise ValueError(f"config must be a SigLipVisionConfig, got a {type(config).__name__}")
    if prefix is not None and not isinstance(prefix, str):
        raise ValueError(f"prefix must be a text, got {prefix!r}")


def build_on_meta(
    config: SigLipVisionConfig, name: str, cls: type[Model]
) -> tuple[Model, dict[str, torch.Size]]:
    """Build a model without memory for its parameters.

    Args:
        config: the architecture.
        name: of the checkpoint, for messages.
        cls: the class of the model.

    Returns:
        The model on `meta`, and our names of all its tensors with the shape of each.

    Raises:
        CheckpointError: the sizes are beyond what torch can even describe.
    """
    try:
        with torch.device("meta"):
            model = cls(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{name} describes an impossible encoder: {error}") from error
    return model, {name: tensor.shape for name, tensor in model.state_dict().items()}

"""Loading a model from a checkpoint: `SigLipVisionModel.from_hf`."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, TypedDict, TypeVar

import torch

from siglip_port.checkpoint.errors import CheckpointError
from siglip_port.checkpoint.formats import DTYPES
from siglip_port.checkpoint.json_files import read_word
from siglip_port.checkpoint.reader import Checkpoint
from siglip_port.config import SigLipVisionConfig
from siglip_port.model import SigLipVisionModel
from siglip_port.validation import parse_dtype

Model = TypeVar("Model", bound=SigLipVisionModel)


class LoadOptions(TypedDict, total=False):
    """Keyword arguments of `SigLipVisionModel.from_hf`: see `load_model`."""

    revision: str | None
    subfolder: str | None
    dtype: torch.dtype | str | None
    device: torch.device | str | None
    pooling_head: bool | None
    interpolation: str | None
    layout: str | None
    prefix: str | None
    config: SigLipVisionConfig | None
    preprocessing: str | os.PathLike[str] | Mapping[str, Any] | None
    local_files_only: bool
    token: str | bool | None
    cache_dir: str | os.PathLike[str] | None
    vision_only: bool


TRANSFORMERS_OPTIONS = {
    "torch_dtype": "use dtype=",
    "device_map": "use device=",
    "use_auth_token": "use token=",
    "attn_implementation": "omit it, attention always runs in scaled_dot_product_attention",
    "quantization_config": "omit it, and quantize with siglip_port.optimize(model, dtype='int8')",
    "trust_remote_code": "omit it, no code of a checkpoint is ever run",
    "use_safetensors": "omit it, pickles are never read",
    "low_cpu_mem_usage": "omit it, weights are mapped from the file",
    "ignore_mismatched_sizes": "omit it, or pass config=SigLipVisionConfig(...)",
}
"""Option of transformers' `from_pretrained` -> what to do instead."""


@torch.inference_mode(False)  # parameters made in inference mode could never be trained
def load_model(
    cls: type[Model],
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    pooling_head: bool | None = None,
    interpolation: str | None = None,
    layout: str | None = None,
    prefix: str | None = None,
    config: SigLipVisionConfig | None = None,
    preprocessing: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    vision_only: bool = True,
) -> Model:
    """Load the SigLIP vision encoder of a checkpoint.

    Reads the layouts of transformers, timm, open_clip, big_vision and many vision-language models,
    in one file or in shards: see docs/checkpoints.md. `print(model.provenance)` shows what was
    loaded.

    Args:
        cls: Class of the model.
        source: Hub id, folder, `.safetensors` file with its configuration beside it, or `.npz`
            file. An existing path takes precedence over a Hub id. Also accepts `name@revision`,
            `hf://...`, `hf-hub:...`, and the URL of a model, or of one of its folders or weights
            files on the Hub.
        revision: Branch, tag or commit of a Hub repository; ignored for a path.
        subfolder: Folder in the local folder or repository that contains the configuration and the
            weights, such as `image_encoder`; None for none.
        dtype: Dtype of the parameters or its name, such as `"bfloat16"`; None or `"auto"` for the
            file's.
        device: Device of the parameters; None for the CPU, where they are mapped from the file.
        pooling_head: None to load the pooling head if the checkpoint has one, True to require one,
            False to ignore it.
        interpolation: Rule for resizing the position embedding to other image sizes, one of
            `siglip_port.config.INTERPOLATIONS`. None for the checkpoint's; without a rule, other
            image sizes are refused.
        layout: Name of one of `siglip_port.checkpoint.layouts.LAYOUTS`; None to recognize it.
        prefix: Prefix of the encoder's names in the file, such as `vision_model.`; None to find it.
        config: Architecture, if the checkpoint's is missing or wrong.
        preprocessing: Preprocessing, if the checkpoint's is missing or wrong: `siglip` (bicubic
            filter) or `siglip2` (bilinear filter) for that of the published checkpoints, or a
            `preprocessor_config.json` as a mapping or path.
        local_files_only: Whether to use only the Hub's local cache, without network access.
        token: Hub token; True for the stored token, False for none.
        cache_dir: Cache folder, instead of the Hub's default.
        vision_only: Whether to download only the vision encoder's bytes if they are a small part of
            the file. Whole files can be reused from the cache by other libraries and verified
            against the Hub's hash.

    Returns:
        The model in `eval()` mode.

    Raises:
        CheckpointError: The checkpoint does not exist, or does not contain exactly one SigLIP
            vision encoder.
        ValueError: `dtype`, `device`, `interpolation`, `layout` or `preprocessing` is not
            supported.
    """
    from siglip_port.hub import HubOptions, find_source

    dtype = parse_dtype(dtype, DTYPES.values())
    validate_device(device)
    validate_overrides(config, prefix)
    word = read_word(preprocessing)
    options = HubOptions(
        revision=revision,
        local_files_only=local_files_only,
        token=token,
        cache_dir=cache_dir,
        vision_only=vision_only,
    )
    replace(config or SigLipVisionConfig(), interpolation=interpolation)  # raises for unknown rules
    files = find_source(source, options, subfolder)
    checkpoint = Checkpoint(
        files,
        pooling_head=pooling_head,
        layout=layout,
        prefix=prefix,
        config=config,
        preprocessing=word,
    )
    rule = interpolation or checkpoint.config.interpolation
    model, shapes = build_on_meta(replace(checkpoint.config, interpolation=rule), files.title, cls)
    tensors, provenance = checkpoint.read(shapes, dtype=dtype, device=device)
    options_to_repeat = {
        "dtype": dtype,
        "pooling_head": pooling_head,
        "interpolation": interpolation,
        "layout": layout,
        "prefix": prefix,
        "config": config,
    }
    passed = {name: value for name, value in options_to_repeat.items() if value is not None}
    model.provenance = replace(provenance, options=passed)
    model.load_state_dict(tensors, strict=True, assign=True)
    model.preprocessing = checkpoint.preprocessing
    return model.eval()


def validate_option_names(names: Collection[str]) -> None:
    """Raise TypeError for the first name that is not an option of `from_hf`."""
    options = list(LoadOptions.__annotations__)
    for name in names:
        if name in options:
            continue
        nearest = difflib.get_close_matches(name, options, n=1)
        advice = f"choose one of {', '.join(options)}"
        if nearest:
            advice = f"use {nearest[0]}="
        raise TypeError(
            f"from_hf(...) has no option {name}; {TRANSFORMERS_OPTIONS.get(name, advice)}"
        )


def validate_device(device: torch.device | str | None) -> None:
    """Raise ValueError unless this machine has the device and it holds data."""
    try:
        is_meta = torch.empty(0, device=device).is_meta
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} is not available on this machine: {reason}") from error
    if is_meta:
        raise ValueError("device must hold data, got 'meta'")


def validate_overrides(config: SigLipVisionConfig | None, prefix: str | None) -> None:
    """Raise ValueError unless `config` and `prefix` have the right type."""
    if config is not None and not isinstance(config, SigLipVisionConfig):
        raise ValueError(
            f"config must be a SigLipVisionConfig, got {type(config).__name__}; read the contents "
            "of a config.json with SigLipVisionConfig.from_hf"
        )
    if prefix is not None and not isinstance(prefix, str):
        raise ValueError(f"prefix must be a string, got {prefix!r}")


def build_on_meta(
    config: SigLipVisionConfig, name: str, cls: type[Model]
) -> tuple[Model, dict[str, torch.Size]]:
    """Build a model on the `meta` device, without memory for its parameters.

    Args:
        config: Architecture.
        name: Name of the checkpoint, for messages.
        cls: Class of the model.

    Returns:
        The model, and the shapes of its parameters by name.

    Raises:
        CheckpointError: The sizes overflow.
    """
    try:
        with torch.device("meta"):
            model = cls(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{name}: the configuration has impossible sizes: {error}") from error
    return model, {name: tensor.shape for name, tensor in model.state_dict().items()}

"""transformers' `config.json` <-> `SigLipVisionConfig`.

Published files omit every value that equals the default of transformers' class (the file of
google/siglip-base-patch16-224 contains only `patch_size`), so a missing key means the default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from siglip_port.config import SigLipVisionConfig, is_int, is_number

NAVIT = {"pooling_head": False, "interpolation": "navit"}
SMOLVLM = {**NAVIT, "patch_size": 32}
IDEFICS3 = {**SMOLVLM, "embed_dim": 1152, "num_attention_heads": 16}
MODEL_TYPES: dict[str, dict[str, Any]] = {
    "siglip": {},
    "siglip_vision_model": {},
    "siglip2": {"naflex": True, "image_size": 256},
    "siglip2_vision_model": {"naflex": True, "image_size": 256},
    "idefics2": SMOLVLM,
    "idefics2_vision": SMOLVLM,
    "idefics3": IDEFICS3,
    "idefics3_vision": IDEFICS3,
    "smolvlm": IDEFICS3,
    "smolvlm_vision": IDEFICS3,
    "minicpmv_vision": {"pooling_head": False, "interpolation": "minicpm"},
    "phi4_multimodal_vision": {
        "embed_dim": 1152,
        "image_size": 448,
        "patch_size": 14,
        "num_attention_heads": 16,
        "num_encoder_blocks": 27,
        "mlp_hidden_dim": 4304,
        "interpolation": "navit",
    },
    "janus_vision_model": {
        "embed_dim": 1024,
        "image_size": 384,
        "num_attention_heads": 16,
        "num_encoder_blocks": 24,
        "mlp_hidden_dim": 4096,
        "hidden_act": "gelu",
        "pooling_head": False,
    },
}
"""Supported `model_type` values of a vision encoder, with their non-default values."""

# Type of the vision encoder for models whose published files do not give it, or not exactly.
ENCODER_OF = {
    "paligemma": "siglip_vision_model",
    "gemma3": "siglip_vision_model",
    "idefics2": "idefics2_vision",
    "idefics3": "idefics3_vision",
    "smolvlm": "smolvlm_vision",
    "phi4_multimodal": "phi4_multimodal_vision",
    "phi4mm": "phi4_multimodal_vision",
    "lfm2_vl": "siglip2_vision_model",
    "lfm2-vl": "siglip2_vision_model",
    "janus": "janus_vision_model",
    "deepseek_vl": "siglip_vision_model",
}

MINICPM = ("minicpmv", "minicpmo")

REFUSED_TYPES = {
    "minicpmv4_6": "its vision encoder merges tokens between blocks",
    "minicpmv4_6_vision": "its vision encoder merges tokens between blocks",
    "youtu_vl": "its vision encoder has rotary positions and window attention",
    "bagel": "its configuration does not say whether positions are learned or rotary",
    "phi3_v": "its vision encoder is CLIP",
    "clip": "CLIP is a different architecture",
    "clip_vision_model": "CLIP is a different architecture",
}

# Field of SigLipVisionConfig <- key of transformers.
HF_KEYS = {
    "num_channels": "num_channels",
    "embed_dim": "hidden_size",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_attention_heads": "num_attention_heads",
    "attention_dropout": "attention_dropout",
    "num_encoder_blocks": "num_hidden_layers",
    "mlp_hidden_dim": "intermediate_size",
    "layer_norm_eps": "layer_norm_eps",
    "hidden_act": "hidden_act",
    "pooling_head": "vision_use_head",
}


class UnknownModelError(ValueError):
    """A configuration without a vision section has an unknown `model_type`."""


def config_from_hf(hf_config: Mapping[str, Any]) -> SigLipVisionConfig:
    """Read the contents of a transformers `config.json`: see `SigLipVisionConfig.from_hf`.

    Raises:
        ValueError: The model is not supported, or a value is invalid.
        UnknownModelError: The `model_type` is unknown, and there is no vision section.
    """
    if not isinstance(hf_config, Mapping):
        raise ValueError(f"configuration must be a JSON object, got {hf_config!r}")
    refuse_other_models(hf_config)
    hf_config = vision_language_part(hf_config)
    vision = vision_part(hf_config)
    model_type = find_model_type(hf_config, vision)
    defaults = MODEL_TYPES[model_type]
    values = {field: vision[key] for field, key in HF_KEYS.items() if key in vision}
    for name in ("image_size", "patch_size"):
        if name in values:
            values[name] = square_side(name, values[name])
    if defaults.get("naflex"):
        values["image_size"] = naflex_image_size(vision, values)
    if model_type == "janus_vision_model":
        embed_dim = values.get("embed_dim", 1024)
        values["mlp_hidden_dim"] = janus_mlp_width(embed_dim, vision.get("mlp_ratio", 4.0))
    if vision.get("mean_pooling") is True:
        values |= {"mean_pooling": True, "pooling_head": False}
    if drops_last_block(hf_config):
        blocks = values.get("num_encoder_blocks", SigLipVisionConfig.num_encoder_blocks)
        values["num_encoder_blocks"] = blocks - 1 if is_int(blocks) else blocks
    return SigLipVisionConfig(**{"pooling_head": True, **defaults, **values})


def config_to_hf(config: SigLipVisionConfig) -> dict[str, Any]:
    """Return the complete flat `config.json`: see `SigLipVisionConfig.to_hf`."""
    values = {key: getattr(config, field) for field, key in HF_KEYS.items()}
    if config.mean_pooling:
        values["mean_pooling"] = True
    if not config.naflex:
        kind = {"architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model"}
        return {**kind, **values}
    del values["image_size"]
    values["num_patches"] = config.num_patches
    kind = {"architectures": ["Siglip2VisionModel"], "model_type": "siglip2_vision_model"}
    return {**kind, **values}


def refuse_other_models(hf_config: Mapping[str, Any]) -> None:
    """Raise ValueError for models whose vision encoder is known not to be SigLIP."""
    vision = hf_config.get("vision_config")
    parts = [hf_config, vision] if isinstance(vision, Mapping) else [hf_config]
    for part in parts:
        model_type = part.get("model_type")
        if isinstance(model_type, str) and model_type in REFUSED_TYPES:
            reason = REFUSED_TYPES[model_type]
            raise ValueError(f"model_type {model_type!r} is not supported: {reason}")


def vision_language_part(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the section that contains `vision_config`.

    In a model around a vision-language model, such as ColPali, that is one level down.
    """
    if "vision_config" in hf_config:
        return hf_config
    parts = {}
    for key, value in hf_config.items():
        if isinstance(value, Mapping) and isinstance(value.get("vision_config"), Mapping):
            parts[key] = value
    if len(parts) > 1:
        raise ValueError(f"vision_config must occur once, found in {', '.join(parts)}")
    return next(iter(parts.values()), hf_config)


def vision_part(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the section of the vision encoder; the whole configuration if it is flat."""
    vision = hf_config.get("vision_config")
    if vision is None:  # Phi-4's own files have no vision section; its code has the values.
        return {} if hf_config.get("model_type") == "phi4mm" else hf_config
    if not isinstance(vision, Mapping):
        raise ValueError(f"vision_config must be an object, got {vision!r}")
    return vision


def find_model_type(hf_config: Mapping[str, Any], vision: Mapping[str, Any]) -> str:
    """Return the type of the vision encoder, from its section or else from the model around it."""
    outer_type = hf_config.get("model_type")
    model_type = vision.get("model_type")
    if model_type is None:
        model_type = ENCODER_OF.get(str(outer_type), outer_type)
    if model_type is None:
        model_type = "siglip_vision_model"
    is_section = vision is not hf_config
    is_minicpm = is_section and outer_type in MINICPM
    if is_minicpm and model_type in (outer_type, "siglip", "siglip_vision_model"):
        return "minicpmv_vision"
    if isinstance(model_type, str) and model_type in MODEL_TYPES:
        return model_type
    message = f"model_type must be one of {', '.join(MODEL_TYPES)}, got {model_type!r}"
    if is_section:
        raise ValueError(message)
    raise UnknownModelError(message)


def drops_last_block(hf_config: Mapping[str, Any]) -> bool:
    """Return whether the model's code removes the last block, as MiniCPM-V does."""
    return hf_config.get("model_type") in MINICPM and hf_config.get("drop_vision_last_layer", True)


def naflex_image_size(vision: Mapping[str, Any], values: Mapping[str, Any]) -> int:
    """Return the side, in pixels, of a NaFlex model's square position grid."""
    num_patches = vision.get("num_patches", 256)
    if not is_int(num_patches) or num_patches < 1 or math.isqrt(num_patches) ** 2 != num_patches:
        raise ValueError(f"num_patches must be a square number, got {num_patches!r}")
    patch_size = values.get("patch_size", SigLipVisionConfig.patch_size)
    return math.isqrt(num_patches) * (patch_size if is_int(patch_size) else 1)


def janus_mlp_width(embed_dim: object, mlp_ratio: object) -> int:
    """Return the hidden width of a Janus MLP, which its configuration gives as a ratio."""
    if (
        not is_int(embed_dim)
        or embed_dim > 10**9
        or not is_number(mlp_ratio)
        or not 0 < mlp_ratio < 1000
    ):
        raise ValueError(
            f"mlp_ratio must be a positive number, got {mlp_ratio!r} with hidden_size {embed_dim!r}"
        )
    return int(embed_dim * mlp_ratio)


def square_side(name: str, size: object) -> object:
    """Return the side of a square, given as a number or as a pair (height, width)."""
    if not isinstance(size, (list, tuple)):
        return size
    if len(size) == 2 and size[0] == size[1]:
        return size[0]
    raise ValueError(f"{name} must be a number or two equal numbers, got {size!r}")

"""transformers' `config.json` <-> `SigLipVisionConfig`.

Published files omit every value that equals the default of transformers' class (the file of
google/siglip-base-patch16-224 contains only `patch_size`), so a missing key means the default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from siglip_port.checkpoint.vision_keys import refuse_unknown_keys, section_at, unknown_keys
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
    "bagel_vision": {"pooling_head": False, "interpolation": "crop"},
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

ROTARY = "its vision encoder has rotary positions"

REFUSED_TYPES = {
    "minicpmv4_6": "its vision encoder merges tokens between blocks",
    "minicpmv4_6_vision": "its vision encoder merges tokens between blocks",
    "youtu_vl": f"{ROTARY} and window attention",
    "Keye": ROTARY,
    "KeyeVL1_5": ROTARY,
    "paddleocr_vl": ROTARY,
    "phi3_v": "its vision encoder is CLIP",
    "clip": "CLIP is a different architecture",
    "clip_vision_model": "CLIP is a different architecture",
}

# Values of a vision section that a model's own code assumes where its configuration omits them.
IMPLIED_VALUES: dict[str, dict[str, Any]] = {
    "eagle_2_5_vl": {"use_rope": True, "use_windows_attn": True},
}

CLASSIFIERS = ("SiglipForImageClassification", "Siglip2ForImageClassification")
"""Architectures that pool by the mean of the tokens; the pooling head in their files is unused."""

HIDDEN_ACT_SYNONYMS = {
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_accurate": "gelu_pytorch_tanh",
    "gelu_python_tanh": "gelu_pytorch_tanh",
    "gelu_python": "gelu",
}
"""transformers' other names of the two activations, equal to them within 1e-12."""

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


VISION_SECTIONS = (
    ("vision_config",),
    ("vit_config",),
    ("vision_encoder_config",),
    ("vision_tower_cfg",),
    ("visual_tokenizer_config", "backbone_config"),
)
"""Paths of the vision encoder's section: transformers, BAGEL, VILA and NVILA, Ovis."""


NO_ENCODER = "configuration describes no vision encoder"


class UnknownModelError(ValueError):
    """A configuration does not describe a vision encoder, or one of an unknown `model_type`."""


def config_from_hf(hf_config: Mapping[str, Any]) -> SigLipVisionConfig:
    """Read the contents of a transformers `config.json`: see `SigLipVisionConfig.from_hf`.

    Raises:
        ValueError: The model is not supported, a value is invalid, or a key of the vision section
            is unknown.
        UnknownModelError: There is no vision section, and the `model_type` is unknown or missing.
    """
    if not isinstance(hf_config, Mapping):
        raise ValueError(f"configuration must be a JSON object, got {hf_config!r}")
    refuse_other_models(hf_config)
    hf_config, vision = find_vision_section(hf_config)
    model_type = find_model_type(hf_config, vision)
    refuse_unknown_keys(vision)
    defaults = MODEL_TYPES[model_type]
    values = {field: vision[key] for field, key in HF_KEYS.items() if key in vision}
    for name in ("image_size", "patch_size"):
        if name in values:
            values[name] = square_side(name, values[name])
    hidden_act = values.get("hidden_act")
    if isinstance(hidden_act, str):
        values["hidden_act"] = HIDDEN_ACT_SYNONYMS.get(hidden_act, hidden_act)
    if defaults.get("naflex"):
        values["image_size"] = naflex_image_size(vision, values)
    if model_type == "janus_vision_model":
        embed_dim = values.get("embed_dim", 1024)
        values["mlp_hidden_dim"] = janus_mlp_width(embed_dim, vision.get("mlp_ratio", 4.0))
    if vision.get("mean_pooling") is True or is_classifier(hf_config):
        values |= {"mean_pooling": True, "pooling_head": False}
    if drops_last_block(hf_config):
        blocks = values.get("num_encoder_blocks", SigLipVisionConfig.num_encoder_blocks)
        values["num_encoder_blocks"] = blocks - 1 if is_int(blocks) else blocks
    return SigLipVisionConfig(**{"pooling_head": True, **defaults, **values})


def unknown_settings(hf_config: Mapping[str, Any]) -> list[str]:
    """Return the settings `key=value` for which `config_from_hf` refuses a configuration."""
    try:
        _, vision = find_vision_section(hf_config)
    except ValueError:
        return []
    return unknown_keys(vision)


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


def find_vision_section(
    hf_config: Mapping[str, Any],
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the model's configuration and the section of its vision encoder.

    In a model around a vision-language model, such as ColPali, both are one level down. Without a
    section, both are the whole configuration if it is flat, that is, the vision encoder's own.

    Raises:
        ValueError: There are several sections, or `vision_config` is not an object.
        UnknownModelError: The configuration does not describe a vision encoder.
    """
    if hf_config.get("vision_config") is not None:
        vision = hf_config["vision_config"]
        if not isinstance(vision, Mapping):
            raise ValueError(f"vision_config must be an object, got {vision!r}")
        return hf_config, with_implied_values(hf_config, vision)
    sections = list_vision_sections(hf_config)
    if len(sections) > 1:
        raise ValueError(f"vision section must occur once, found {', '.join(sections)}")
    for part, section in sections.values():
        return part, with_implied_values(part, section)
    model_type = hf_config.get("model_type")
    if model_type == "bagel":
        raise ValueError("configuration has no vit_config; BAGEL stores it in vit_config.json")
    if model_type == "phi4mm" or isinstance(hf_config.get("text_config"), Mapping):
        return hf_config, {}  # The section is omitted: all values are those of its class.
    if model_type is None and hf_config.keys().isdisjoint(HF_KEYS.values()):
        raise UnknownModelError(NO_ENCODER)
    return hf_config, hf_config


def list_vision_sections(
    hf_config: Mapping[str, Any],
) -> dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Return the model's configuration and vision section by the path of the section.

    Looks at the top level and, if there is none, one level down.
    """
    parts = {"": hf_config, **{f"{name}.": part for name, part in hf_config.items()}}
    sections = {}
    for name, part in parts.items():
        for path in VISION_SECTIONS:
            section = section_at(part, path)
            if section is not None:
                sections[name + ".".join(path)] = (part, section)
        if sections and part is hf_config:
            break
    return sections


def with_implied_values(
    hf_config: Mapping[str, Any], vision: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Add the values that the model's own code assumes where its section omits them."""
    implied = IMPLIED_VALUES.get(str(hf_config.get("model_type")), {})
    return {**implied, **vision}


def find_model_type(hf_config: Mapping[str, Any], vision: Mapping[str, Any]) -> str:
    """Return the type of the vision encoder, from its section or else from the model around it."""
    outer_type = hf_config.get("model_type")
    model_type = vision.get("model_type")
    if model_type is None:
        model_type = ENCODER_OF.get(str(outer_type), outer_type)
    if model_type is None:
        model_type = "siglip_vision_model"
    is_section = vision is not hf_config
    if outer_type == "bagel":
        return "bagel_vision"
    is_minicpm = is_section and outer_type in MINICPM
    if is_minicpm and model_type in (outer_type, "siglip", "siglip_vision_model"):
        return "minicpmv_vision"
    if isinstance(model_type, str) and model_type in MODEL_TYPES:
        return model_type
    message = f"model_type must be one of {', '.join(MODEL_TYPES)}, got {model_type!r}"
    if is_section:
        raise ValueError(message)
    raise UnknownModelError(message)


def is_classifier(hf_config: Mapping[str, Any]) -> bool:
    """Return whether the model classifies the mean of the tokens: see `CLASSIFIERS`."""
    architectures = hf_config.get("architectures")
    return isinstance(architectures, list) and any(name in CLASSIFIERS for name in architectures)


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

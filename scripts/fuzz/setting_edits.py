"""Adds what other code would hear: settings of other models, adapters, values of preprocessing."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from scripts.fuzz.byte_edits import noise
from scripts.fuzz.json_edits import DAMAGED

ADAPTER_CONFIG = "adapter_config.json"
ADAPTERS = (
    b'{"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}',
    b'{"peft_type": "PROMPT_TUNING"}',
    b"{}",
    b"[]",
    b"{",
    b"",
)
"""Contents of an adapter's configuration, intact or not."""

FOREIGN_SETTINGS: tuple[tuple[str, Any], ...] = (
    ("use_rope", True),
    ("rope_theta", 10000.0),
    ("rope_type", "axial"),
    ("window_size", 14),
    ("use_windows_attn", True),
    ("full_attention_indexes", [1]),
    ("fullatt_block_indexes", [0]),
    ("qk_norm", True),
    ("use_qk_norm", True),
    ("qkv_bias", False),
    ("attention_bias", False),
    ("pre_norm", True),
    ("final_norm", False),
    ("layer_scale", 0.1),
    ("init_values", 1e-5),
    ("layer_scale_init_value", 1e-5),
    ("num_register_tokens", 4),
    ("reg_tokens", 4),
    ("class_token", True),
    ("use_cls_token", True),
    ("spatial_merge_size", 2),
    ("temporal_patch_size", 2),
    ("num_key_value_heads", 1),
    ("causal", True),
    ("setting_of_nothing_known", 3),
)
"""Settings under which a vision encoder computes something else, or might."""

TIMM_SETTINGS: tuple[tuple[str, Any], ...] = (
    ("rope_type", "axial"),
    ("pos_embed", "none"),
    ("pos_embed_interp_mode", "nearest"),
    ("pos_embed_ar_preserving", True),
    ("qk_norm", True),
    ("qkv_bias", False),
    ("pre_norm", True),
    ("final_norm", False),
    ("fc_norm", True),
    ("class_token", True),
    ("reg_tokens", 4),
    ("init_values", 1e-5),
    ("norm_layer", "rmsnorm"),
    ("scale_attn_norm", True),
    ("dynamic_img_pad", True),
    ("argument_of_nothing_known", 3),
)
"""Arguments under which timm builds another model, or might."""

PROCESSOR_VALUES: dict[str, tuple[Any, ...]] = {
    "size": (
        *(True, None, 5, 10**40, "5", [], [5], [5, 5], [5, 6], {}, {"height": 5}, {"width": 5}),
        *({"haight": 5, "width": 5}, {"HEIGHT": 5, "width": 5}, {"height": 5, "width": 6}),
        *({"shortest_edge": 5}, {"longest_edge": 5}, {"height": "5", "width": "5"}),
        *({"height": -5, "width": -5}, {"height": 5, "width": True}, {"height": 5.0, "width": 5}),
    ),
    "resample": (None, True, -1, 7, 2, 3, "bicubic", 3.0, [3]),
    "image_mean": (None, 0.5, [], [0.5], [0.5] * 4, ["0.5"] * 3, [None] * 3, [1e400] * 3),
    "image_std": (None, 0.5, [], [0.0] * 3, [0.5] * 4, [-0.5] * 3, [True] * 3),
    "rescale_factor": (None, 0, -1.0, 1.0, "1/255", [1], 1e400),
    "do_rescale": (None, False, 0, "no"),
    "do_normalize": (None, False, 0, "no"),
    "do_resize": (None, False, 0, "no"),
    "do_convert_rgb": (True, False, 1, "no"),
    "do_center_crop": (True, False),
    "crop_size": (5, {"height": 4, "width": 4}),
}
"""Field of a preprocessor configuration -> values, most of them damaged."""


def vision_section(document: dict[str, Any]) -> dict[str, Any]:
    """Return the section of a configuration that describes the vision encoder."""
    for key in ("vision_config", "model_args"):
        if isinstance(document.get(key), dict):
            section: dict[str, Any] = document[key]
            return section
    return document


def add_setting(rng: Random, content: bytes) -> bytes:
    """Add a setting of another model to the vision part of a configuration."""
    try:
        document = json.loads(content)
        settings = TIMM_SETTINGS if "model_args" in document else FOREIGN_SETTINGS
        key, value = rng.choice(settings)
        if not isinstance(document, dict):
            return noise(rng, content)
        vision_section(document)[key] = value
    except DAMAGED:
        return noise(rng, content)
    return json.dumps(document).encode()


def foreign_settings(section: object, settings: tuple[tuple[str, Any], ...]) -> list[str]:
    """Return the keys of a section that have exactly the value of a foreign setting."""
    if not isinstance(section, dict):
        return []
    foreign = []
    for key, value in settings:
        if key in section and json.dumps(section[key]) == json.dumps(value):
            foreign.append(key)
    return foreign


def edit_field(rng: Random, content: bytes) -> bytes:
    """Change one field of a preprocessor configuration, or remove it."""
    try:
        document = json.loads(content)
        key = rng.choice(list(PROCESSOR_VALUES))
        if rng.random() < 0.1:
            document.pop(key, None)
        else:
            document[key] = rng.choice(PROCESSOR_VALUES[key])
    except (*DAMAGED, AttributeError):
        return noise(rng, content)
    return json.dumps(document).encode()


def omit_from_index(rng: Random, content: bytes) -> bytes:
    """Remove one or several tensors from an index; the shards still contain them."""
    try:
        document = json.loads(content)
        weight_map = document["weight_map"]
        for name in rng.sample(list(weight_map), rng.choice((1, 1, 2, 5))):
            del weight_map[name]
    except DAMAGED:
        return noise(rng, content)
    return json.dumps(document).encode()


def add_adapter(rng: Random, files: dict[str, bytes]) -> None:
    """Put the configuration of an adapter beside the weights, with or without its weights."""
    files[ADAPTER_CONFIG] = rng.choice(ADAPTERS)
    if rng.random() < 0.5:
        files["adapter_model.safetensors"] = rng.choice((b"", rng.randbytes(100)))

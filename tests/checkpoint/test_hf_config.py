"""transformers' `config.json` <-> `SigLipVisionConfig`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import SiglipVisionConfig

from siglip_port import SigLipVisionConfig
from tests.helpers.strategies import JSON

SIZES = st.integers(1, 512)


CONFIGS = st.builds(
    lambda heads, head_dim, patch, grid, rest, **fields: SigLipVisionConfig(
        embed_dim=heads * head_dim,
        num_attention_heads=heads,
        patch_size=patch,
        image_size=patch * grid + rest % patch,
        **fields,
    ),
    heads=st.integers(1, 20),
    head_dim=st.integers(1, 128),
    patch=st.integers(1, 32),
    grid=st.integers(1, 64),
    rest=SIZES,
    num_channels=st.integers(1, 4),
    num_encoder_blocks=st.integers(1, 48),
    mlp_hidden_dim=SIZES,
    attention_dropout=st.floats(0, 0.99),
    layer_norm_eps=st.floats(1e-12, 1e-2),
    hidden_act=st.sampled_from(["gelu", "gelu_pytorch_tanh"]),
    pooling_head=st.booleans(),
)


def test_defaults() -> None:
    reference = SiglipVisionConfig().to_dict()
    assert SigLipVisionConfig.from_hf({}) == SigLipVisionConfig(pooling_head=True)
    for key, value in SigLipVisionConfig(pooling_head=True).to_hf().items():
        if key != "architectures":
            assert reference[key] == value, key


@given(CONFIGS)
def test_round_trip(config: SigLipVisionConfig) -> None:
    assert SigLipVisionConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@given(CONFIGS, st.sets(st.sampled_from(sorted(SigLipVisionConfig().to_hf()))))
def test_missing_keys(config: SigLipVisionConfig, omitted: set[str]) -> None:
    """transformers before 4.50 wrote nested files with only the non-default values."""
    default = SigLipVisionConfig(pooling_head=True).to_hf()
    short = {k: v for k, v in config.to_hf().items() if k not in omitted or v != default[k]}
    assert SigLipVisionConfig.from_hf({"model_type": "siglip", "vision_config": short}) == config


@pytest.mark.parametrize(
    "extra",
    [
        {"torch_dtype": "float32"},
        {"dtype": "bfloat16"},
        {"auto_map": {"AutoModel": "code.Model"}},
        {"projection_dim": 768, "logit_scale_init_value": 2.6},
        {"num_image_tokens": 256, "projector_hidden_act": "gelu"},
        {"model_type": "siglip"},
        {"image_size": [224, 224], "patch_size": [16, 16]},
    ],
)
def test_other_keys(extra: dict[str, Any]) -> None:
    for content in (extra, {"model_type": "siglip", "vision_config": extra}):
        assert SigLipVisionConfig.from_hf(content) == SigLipVisionConfig(pooling_head=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"model_type": "dinov2"},
            "model_type must be one of siglip, siglip_vision_model, .*, got 'dinov2'",
        ),
        (
            {"model_type": "bagel"},
            "model_type .bagel. is not supported: its configuration does not say",
        ),
        (
            {"model_type": "youtu_vl", "vision_config": {"model_type": "siglip2_vision_model"}},
            "'youtu_vl' is not supported: its vision encoder has rotary positions and window",
        ),
        (
            {"model_type": "minicpmv", "vision_config": {"model_type": "siglip_navit"}},
            "got 'siglip_navit'",
        ),
        ({"model_type": "minicpmv"}, "got 'minicpmv'"),
        (
            {"model_type": "siglip2", "num_patches": True},
            "num_patches must be a square number, got True",
        ),
        (
            {"a": {"vision_config": {}}, "b": {"vision_config": {}}},
            "vision_config must occur once, found in a, b",
        ),
        ([], r"configuration must be a JSON object, got \[\]"),
        (
            {"model_type": "janus_vision_model", "hidden_size": 10**400},
            "mlp_ratio must be a positive number",
        ),
        (
            {"model_type": "clip"},
            "model_type 'clip' is not supported: CLIP is a different architecture",
        ),
        (
            {"model_type": "llava", "vision_config": {"model_type": "clip_vision_model"}},
            "'clip_vision_model' is not supported",
        ),
        ({"model_type": "llava", "vision_config": {}}, "got 'llava'"),
        ({"model_type": "paligemma"}, "got 'paligemma'"),
        ({"model_type": ["siglip"]}, r"got \['siglip'\]"),
        (
            {"model_type": "siglip2", "num_patches": 200},
            "num_patches must be a square number, got 200",
        ),
        (
            {"model_type": "janus_vision_model", "mlp_ratio": "4"},
            "mlp_ratio must be a positive number, got '4' with hidden_size 1024",
        ),
        ({"vision_config": [1]}, r"vision_config must be an object, got \[1\]"),
        ({"vision_config": []}, r"vision_config must be an object, got \[\]"),
        ({"vision_config": False}, "vision_config must be an object, got False"),
        ({"vision_config": ""}, "vision_config must be an object, got ''"),
        (
            {"image_size": [224, 256]},
            r"image_size must be a number or two equal numbers, got \[224, 256\]",
        ),
    ],
)
def test_other_models(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SigLipVisionConfig.from_hf(content)


KEYS = st.sampled_from([*SigLipVisionConfig().to_hf(), "vision_config", "text_config"])


@given(st.dictionaries(KEYS, JSON | st.dictionaries(KEYS, JSON, max_size=3), max_size=5))
def test_any_json(content: dict[str, Any]) -> None:
    try:
        config = SigLipVisionConfig.from_hf(content)
    except ValueError:
        return
    assert config.num_patches >= 1

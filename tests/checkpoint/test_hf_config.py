"""transformers' `config.json` <-> `SigLipVisionConfig`."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import SiglipVisionConfig
from transformers.activations import ACT2FN

from siglip_port import SigLipVisionConfig
from siglip_port.checkpoint.hf_config import HIDDEN_ACT_SYNONYMS
from siglip_port.model import ACTIVATIONS
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
    default = {"model_type": "siglip"}
    assert SigLipVisionConfig.from_hf(default) == SigLipVisionConfig(pooling_head=True)
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
    flat = {"model_type": "siglip_vision_model", **extra}
    for content in (flat, {"model_type": "siglip", "vision_config": extra}):
        assert SigLipVisionConfig.from_hf(content) == SigLipVisionConfig(pooling_head=True)


SECTION = {"model_type": "siglip_vision_model", "image_size": 448}


@pytest.mark.parametrize(
    "content",
    [
        {"vision_config": SECTION},
        {"model_type": "bagel", "vit_config": {**SECTION, "rope": False}},
        {"vision_encoder_config": SECTION},
        {"model_type": "llava_llama", "vision_tower_cfg": SECTION, "llm_cfg": {"hidden_size": 1}},
        {"visual_tokenizer_config": {"backbone_config": SECTION, "tau": 1.0}},
        {"model_type": "colpali", "vlm_config": {"model_type": "x", "vision_config": SECTION}},
        {"vision_config": SECTION, "vit_config": {"model_type": "clip_vision_model"}},
    ],
    ids=lambda content: ", ".join(content),
)
def test_sections(content: dict[str, Any]) -> None:
    assert SigLipVisionConfig.from_hf(content).image_size == 448


@pytest.mark.parametrize("name", sorted(HIDDEN_ACT_SYNONYMS))
def test_hidden_act_synonyms(name: str) -> None:
    config = SigLipVisionConfig.from_hf({"model_type": "siglip", "hidden_act": name})
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    torch.testing.assert_close(
        ACTIVATIONS[config.hidden_act](x), ACT2FN[name](x), atol=1e-12, rtol=0
    )
    other = {"gelu": "gelu_pytorch_tanh", "gelu_pytorch_tanh": "gelu"}[config.hidden_act]
    assert (ACTIVATIONS[other](x) - ACT2FN[name](x)).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["SiglipForImageClassification", "Siglip2ForImageClassification"])
def test_classifier(name: str) -> None:
    config = SigLipVisionConfig.from_hf({"model_type": "siglip", "architectures": [name]})
    assert (config.mean_pooling, config.pooling_head) == (True, False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "configuration describes no vision encoder"),
        ({"type": "smolvla"}, "configuration describes no vision encoder"),
        ({"dtype": "float32", "architectures": ["X"]}, "configuration describes no vision encoder"),
        (
            {"vit_config": SECTION, "vision_tower_cfg": SECTION},
            "vision section must occur once, found vit_config, vision_tower_cfg",
        ),
        ({"model_type": "bagel", "vit_config": {**SECTION, "rope": True}}, "vision settings rope"),
        ({"model_type": "Keye", "vision_config": SECTION}, "'Keye' is not supported: .* rotary"),
        ({"model_type": "paddleocr_vl", "vision_config": {}}, "not supported: .* rotary"),
        ({"model_type": "siglip", "hidden_act": "quick_gelu"}, "hidden_act must be one of"),
        (
            {"model_type": "dinov2"},
            "model_type must be one of siglip, siglip_vision_model, .*, got 'dinov2'",
        ),
        (
            {"model_type": "bagel", "vit_path": "google/siglip-so400m-patch14-384"},
            "configuration has no vit_config; BAGEL stores it in vit_config.json",
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
            "vision section must occur once, found a.vision_config, b.vision_config",
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

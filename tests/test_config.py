from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest

from siglip_port import SigLipVisionConfig


def test_derived_sizes() -> None:
    so400m = SigLipVisionConfig(
        embed_dim=1152, image_size=384, patch_size=14, num_attention_heads=16
    )
    assert (so400m.head_dim, so400m.grid_size, so400m.num_patches) == (72, 27, 729)


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("hidden_size", "use embed_dim="),
        ("num_hidden_layers", "use num_encoder_blocks="),
        ("intermediate_size", "use mlp_hidden_dim="),
        ("vision_use_head", "use pooling_head="),
        ("num_classes", "to read a config.json of transformers, use SigLipVisionConfig.from_hf"),
    ],
)
def test_names_of_transformers(key: str, advice: str) -> None:
    values: dict[str, Any] = {key: 8}
    with pytest.raises(TypeError, match=f"^SigLipVisionConfig has no field {key}; {advice}$"):
        SigLipVisionConfig(**values)
    with pytest.raises(TypeError, match=f"has no field {key}; {advice}"):
        replace(SigLipVisionConfig(), **values)


def test_copies_and_signature() -> None:
    config = SigLipVisionConfig(24, num_attention_heads=2)
    assert config.num_channels == 24
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), replace(config)):
        assert other == config
    names = list(inspect.signature(SigLipVisionConfig).parameters)
    assert names == [field.name for field in fields(config)]


def test_immutable() -> None:
    with pytest.raises(FrozenInstanceError):
        SigLipVisionConfig().embed_dim = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embed_dim": 100}, "embed_dim must be divisible by num_attention_heads, got 100 and 12"),
        ({"image_size": 8}, "patch_size must not exceed image_size, got 16 and 8"),
        ({"embed_dim": 0}, "embed_dim must be a positive integer, got 0"),
        ({"num_encoder_blocks": -1}, "num_encoder_blocks must be a positive integer, got -1"),
        ({"patch_size": 16.0}, "patch_size must be a positive integer, got 16.0"),
        ({"num_channels": True}, "num_channels must be a positive integer, got True"),
        ({"image_size": "224"}, "image_size must be a positive integer, got '224'"),
        ({"layer_norm_eps": 0}, "layer_norm_eps must lie between 0 and 1, got 0"),
        ({"layer_norm_eps": "1e-6"}, "layer_norm_eps must be a number, got '1e-6'"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps must lie between 0 and 1, got nan"),
        ({"layer_norm_eps": 10**400}, "layer_norm_eps must lie between 0 and 1, got 1000"),
        ({"attention_dropout": 10**400}, r"attention_dropout must lie in \[0, 1\), got 1000"),
        ({"attention_dropout": 1.0}, r"attention_dropout must lie in \[0, 1\), got 1.0"),
        (
            {"hidden_act": "quick_gelu"},
            "hidden_act must be one of gelu_pytorch_tanh, gelu, got 'quick_gelu'",
        ),
        ({"pooling_head": None}, "pooling_head must be True or False, got None"),
    ],
)
def test_invalid_values(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SigLipVisionConfig(**fields)
    with pytest.raises(ValueError, match=message):
        replace(SigLipVisionConfig(), **fields)

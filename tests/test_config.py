from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from siglip_port import SigLipVisionConfig


def test_derived_sizes() -> None:
    so400m = SigLipVisionConfig(
        embed_dim=1152, image_size=384, patch_size=14, num_attention_heads=16
    )
    assert (so400m.head_dim, so400m.grid_size, so400m.num_patches) == (72, 27, 729)


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

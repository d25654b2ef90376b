"""timm's `config.json`."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from siglip_port import SigLipVisionConfig
from siglip_port.checkpoint import layouts, preprocessor_config
from siglip_port.checkpoint.architecture import StoredSizes, infer_architecture
from siglip_port.checkpoint.registry import PUBLISHED, Published
from siglip_port.checkpoint.timm_config import config_to_timm
from tests.helpers.checkpoints import ODD


def to_timm(config: SigLipVisionConfig, **processor: object) -> dict[str, Any]:
    return config_to_timm(config, {**preprocessor_config.default(config), **processor})


@pytest.mark.parametrize("published", PUBLISHED[::5], ids=lambda published: published.repo)
def test_round_trip(published: Published) -> None:
    config = published.config
    contents = to_timm(config)
    layout = layouts.TIMM_NAFLEX if config.naflex else layouts.TIMM
    names = [field.name for field in fields(StoredSizes) if field.name != "num_attention_heads"]
    sizes = StoredSizes(**{name: getattr(config, name) for name in names})
    architecture = infer_architecture(layout, sizes, contents)
    assert architecture.config == replace(config, pooling_head=False)


def test_unpublished_architecture() -> None:
    contents = to_timm(ODD, resample=2, image_mean=[0.1, 0.2, 0.3])
    args = contents["model_args"]
    cfg = contents["pretrained_cfg"]
    assert (args["img_size"], args["patch_size"], args["depth"], args["num_heads"]) == (
        45,
        7,
        11,
        4,
    )
    assert (args["act_layer"], args["global_pool"], contents["num_features"]) == (
        "gelu_tanh",
        "map",
        72,
    )
    assert (cfg["input_size"], cfg["interpolation"], cfg["mean"]) == (
        [3, 45, 45],
        "bilinear",
        [0.1, 0.2, 0.3],
    )
    assert cfg["fixed_input_size"]
    assert to_timm(replace(ODD, pooling_head=False))["global_pool"] == ""
    assert to_timm(replace(ODD, pooling_head=False, mean_pooling=True))["global_pool"] == "avg"
    assert to_timm(replace(ODD, hidden_act="gelu"))["model_args"]["act_layer"] == "gelu"


def test_naflex() -> None:
    contents = to_timm(replace(ODD, naflex=True))
    assert contents["architecture"].startswith("naflexvit")
    assert contents["model_args"]["pos_embed_grid_size"] == [6, 6]
    assert "img_size" not in contents["model_args"]
    assert contents["pretrained_cfg"]["interpolation"] == "bilinear"
    assert not contents["pretrained_cfg"]["fixed_input_size"]


def test_mlp_ratio() -> None:
    """timm computes int(width * ratio), which is 0 for 49 * (1 / 49)."""
    for width in range(1, 130):
        for hidden in (1, 13, 47, 101, 4304):
            config = SigLipVisionConfig(
                embed_dim=width, num_attention_heads=1, mlp_hidden_dim=hidden
            )
            assert int(width * to_timm(config)["model_args"]["mlp_ratio"]) == hidden


def test_other_epsilon() -> None:
    with pytest.raises(
        ValueError,
        match=r"^layer_norm_eps must be 1e-6 in timm's SigLIP models, got 1e-05; write the Hugging",
    ):
        to_timm(replace(ODD, layer_norm_eps=1e-5))

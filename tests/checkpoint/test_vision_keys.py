"""Settings of a configuration that might change the computation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Siglip2VisionConfig, SiglipVisionConfig
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.janus.configuration_janus import JanusVisionConfig
from transformers.models.phi4_multimodal.configuration_phi4_multimodal import (
    Phi4MultimodalVisionConfig,
)
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

from siglip_port import CheckpointError, SigLipVisionConfig, SigLipVisionModel
from siglip_port.checkpoint.inspect import inspect_checkpoint
from siglip_port.checkpoint.vision_keys import HARMLESS_KEYS, SWITCHES, unknown_keys
from siglip_port.hub import HubOptions, find_source
from siglip_port.parity.metrics import relative_error
from tests.helpers.checkpoints import ODD, edit_config, pixels
from tests.helpers.other_libraries import write_hf_encoder
from tests.helpers.strategies import JSON

load = SigLipVisionModel.from_hf

# Keys in the published files of models with other computations, and made-up ones.
OTHER_COMPUTATIONS: list[dict[str, Any]] = [
    {"use_rope": True},
    {"use_windows_attn": True, "window_size": 112, "full_attention_indexes": [7, 15]},
    {"rope_theta": 10000.0},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"qk_norm": True},
    {"qkv_bias": False},
    {"num_register_tokens": 4},
    {"layer_scale_init_value": 0.1},
    {"pre_norm": True},
    {"pre_norm": False},
    {"use_post_layernorm": False},
    {"attention_type": "linear"},
    {"spatial_merge_size": 2},
    {"num_key_value_heads": 2},
    {"head_dim": 32},
    {"norm_type": "rms_norm"},
    {"qk_norm": 0},
]


@pytest.mark.parametrize("settings", OTHER_COMPUTATIONS, ids=str)
def test_other_computations(settings: dict[str, Any]) -> None:
    section = {"model_type": "siglip_vision_model", **settings}
    unknown = unknown_keys(section)
    assert unknown == [f"{key}={value!r}" for key, value in settings.items()]
    contents: list[dict[str, Any]] = [section]
    contents += [{"vision_config": section}, {"x": {"vision_config": section}}]
    for content in contents:
        with pytest.raises(ValueError, match=r"vision settings .* are not SigLIP's, so the model"):
            SigLipVisionConfig.from_hf(content)


@given(st.dictionaries(st.sampled_from(sorted(HARMLESS_KEYS)), JSON), st.sampled_from(["", "_"]))
def test_harmless_keys(section: dict[str, Any], start: str) -> None:
    assert unknown_keys({**section, "_private": 1, **SWITCHES}) == []
    assert unknown_keys({"x": None, **section}) == []


@given(st.text(min_size=1), JSON.filter(lambda value: value is not None))
def test_any_other_key(key: str, value: object) -> None:
    known = key in HARMLESS_KEYS or key in SWITCHES or key.startswith("_")
    assert known or unknown_keys({key: value}) == [f"{key}={value!r}"]


def test_settings_of_a_switch_that_is_off() -> None:
    settings = {"window_size": 112, "full_attention_indexes": [7], "rope_theta": 1e4}
    off = {"use_windows_attn": False, "use_rope": False}
    assert unknown_keys({**settings, **off}) == []
    assert unknown_keys({**settings, "use_rope": False}) == [
        "window_size=112",
        "full_attention_indexes=[7]",
    ]


@pytest.mark.parametrize(
    "kind",
    [
        SiglipVisionConfig,
        Siglip2VisionConfig,
        Idefics2VisionConfig,
        Idefics3VisionConfig,
        SmolVLMVisionConfig,
        Phi4MultimodalVisionConfig,
        JanusVisionConfig,
    ],
)
def test_keys_of_transformers(kind: type[Any]) -> None:
    assert unknown_keys(kind().to_dict()) == []


def test_refusal_and_override(tmp_path: Path) -> None:
    write_hf_encoder(tmp_path)
    expected = load(tmp_path).embed(pixels(ODD))
    edit_config(tmp_path, use_rope=True, window_size=7)
    message = r"vision settings use_rope=True, window_size=7 are not SigLIP's, .*; if it is wrong"
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        inspect_checkpoint(find_source(tmp_path, HubOptions()))
    model = load(tmp_path, config=ODD)
    torch.testing.assert_close(model.embed(pixels(ODD)), expected)
    assert "config   config=; not applied: use_rope=True, window_size=7 in config.json" in str(
        model.provenance
    )


def test_eagle(tmp_path: Path) -> None:
    """Its code has rotary positions and window attention unless its configuration denies both."""
    write_hf_encoder(tmp_path)
    section = json.loads((tmp_path / "config.json").read_text())
    off = {"use_rope": False, "use_windows_attn": False, "full_attention_indexes": [1]}
    edit_config(tmp_path, model_type="eagle_2_5_vl", vision_config={**section, **off})
    assert load(tmp_path).config == ODD
    edit_config(tmp_path, vision_config={**section, "use_rope": False})
    with pytest.raises(CheckpointError, match=r"vision settings use_windows_attn=True are not"):
        load(tmp_path)


@torch.no_grad()
def test_negative_control(tmp_path: Path) -> None:
    """A setting that is read does change the outputs."""
    write_hf_encoder(tmp_path)
    expected = load(tmp_path).embed(pixels(ODD))
    edit_config(tmp_path, layer_norm_eps=1e-2)
    assert relative_error(load(tmp_path).embed(pixels(ODD)), expected) > 1e-4

"""Checkpoints of timm and open_clip, and the model names of timm."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from siglip_port import CheckpointError, SigLipVisionModel
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.stress_weights import randomize
from tests.helpers.checkpoints import EXACT, ODD, TANH, edit_tensors, pixels
from tests.helpers.other_libraries import assert_same_outputs, timm_encoder, timm_outputs

load = SigLipVisionModel.from_hf


EXACT_ODD = replace(ODD, hidden_act=EXACT)


def odd_heads(config: dict[str, Any]) -> dict[str, Any]:
    """Add the sizes that the published names imply, which differ in the small test model."""
    return {**config, "num_heads": 4, "img_size": 45}


@pytest.mark.parametrize(
    ("name", "act"),
    [
        ("vit_base_patch16_siglip_224", EXACT),
        ("vit_base_patch32_siglip_256", TANH),
        ("vit_large_patch16_siglip_384", EXACT),
        ("vit_large_patch16_siglip_512", TANH),
        ("vit_so400m_patch14_siglip_378", EXACT),
        ("vit_so400m_patch16_siglip_512", TANH),
        ("vit_giantopt_patch16_siglip_256", TANH),
        ("vit_base_patch16_siglip_gap_224", EXACT),
        ("vit_so400m_patch16_siglip_gap_256", TANH),
    ],
)
def test_timm(name: str, act: str, tmp_path: Path) -> None:
    reference = timm_encoder(name)
    timm.models.save_for_hf(reference, str(tmp_path), safe_serialization=True)
    model = (
        assert_same_outputs(tmp_path, reference, timm_outputs(reference))
        if "gap" not in name
        else load(tmp_path)
    )
    assert model.config == replace(
        ODD, hidden_act=act, pooling_head="gap" not in name, mean_pooling="gap" in name
    )
    assert model.provenance is not None
    assert model.provenance.layout == "timm, no prefix"
    with torch.no_grad():
        x = pixels(ODD).float()
        assert relative_error(model.embed(x), reference.eval()(x)) <= 1e-5


def test_timm_names() -> None:
    """Activation, sizes and pooling equal those of the models that timm builds."""
    from siglip_port.checkpoint.registry import config_of_name

    names = [n for n in timm.list_models("*siglip*") if n.startswith(("vit_", "naflexvit_"))]
    assert len(names) > 30
    for name in names:
        config = config_of_name(name)
        assert config is not None
        with torch.device("meta"):
            reference: Any = timm.create_model(name)
        assert (config.hidden_act == TANH) == (
            type(reference.blocks[0].mlp.act).__name__ == "GELUTanh"
        ), name
        assert config.mean_pooling == (reference.global_pool == "avg")
        assert config.num_encoder_blocks == len(reference.blocks)
        assert config.num_attention_heads == reference.blocks[0].attn.num_heads
        assert (config.embed_dim, config.mlp_hidden_dim) == reference.blocks[
            0
        ].mlp.fc1.weight.shape[::-1]
        assert reference.norm.eps == config.layer_norm_eps
        if not config.naflex:
            assert (config.patch_size, config.image_size) == (
                reference.patch_embed.patch_size[0],
                reference.patch_embed.img_size[0],
            )


def test_classifier_and_training_prefix(tmp_path: Path) -> None:
    reference = timm_encoder("vit_base_patch16_siglip_gap_224")
    timm.models.save_for_hf(reference, str(tmp_path), safe_serialization=True)
    edit_tensors(
        tmp_path,
        lambda t: {
            **{f"module.{k}": v for k, v in t.items()},
            "module.head.weight": torch.ones(5, 72),
        },
    )
    model = load(tmp_path)
    assert model.provenance is not None
    assert model.provenance.ignored == {"image classifier": 1}
    assert model.config.mean_pooling


def test_timm_naflex(tmp_path: Path) -> None:
    reference: Any = timm.create_model(
        "naflexvit_base_patch16_siglip",
        embed_dim=72,
        depth=3,
        num_heads=4,
        mlp_ratio=1.41,
        pos_embed_grid_size=(6, 6),
        num_classes=0,
    )
    randomize(reference)
    timm.models.save_for_hf(reference, str(tmp_path), safe_serialization=True)
    model = assert_same_outputs(tmp_path, reference, timm_outputs(reference))
    assert model.config.naflex
    assert (model.config.grid_size, model.config.patch_size) == (6, 16)
    with torch.no_grad():  # another size: both resize positions bilinearly with antialiasing
        x = torch.randn(2, 3, 16 * 9, 16 * 4)
        assert relative_error(model.embed(x), reference.eval()(x)) <= 1e-5


def test_missing_config(tmp_path: Path) -> None:
    timm.models.save_for_hf(
        timm_encoder("vit_base_patch16_siglip_224"), str(tmp_path), safe_serialization=True
    )
    (tmp_path / "config.json").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"cannot infer num_attention_heads and hidden_act from .*; put .* or pass config=",
    ):
        load(tmp_path)
    config = replace(ODD, hidden_act="gelu")
    assert load(tmp_path / "model.safetensors", config=config).config == config


@pytest.mark.parametrize(
    ("name", "pool", "by_mean"),
    [("vit_base_patch16_siglip_224", "avg", True), ("vit_base_patch16_siglip_gap_224", "", False)],
)
def test_global_pool(name: str, pool: str, by_mean: bool, tmp_path: Path) -> None:
    reference = timm_encoder(name, global_pool=pool, fc_norm=False)
    tensors = {k: v for k, v in reference.state_dict().items() if not k.startswith("attn_pool")}
    timm.models.save_for_hf(reference, str(tmp_path), safe_serialization=True)
    save_file(tensors, tmp_path / "model.safetensors")
    assert load(tmp_path).config.mean_pooling == by_mean
    assert not load(tmp_path, pooling_head=False).config.mean_pooling


def test_open_clip(tmp_path: Path) -> None:
    """Files as open_clip writes them; `pytest -m versions` runs open_clip itself."""
    reference = timm_encoder("vit_so400m_patch16_siglip_256")
    names = {f"visual.trunk.{k}": v.contiguous() for k, v in reference.state_dict().items()}
    text = {
        "text.transformer.x": torch.ones(2),
        "logit_scale": torch.ones(()),
        "logit_bias": torch.ones(()),
    }
    save_file({**names, **text}, tmp_path / "open_clip_model.safetensors")
    vision = {
        "image_size": 45,
        "timm_model_name": "vit_so400m_patch16_siglip_256",
        "timm_pool": "map",
        "num_heads": 4,
    }
    preprocess = {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    content = {"model_cfg": {"embed_dim": 72, "vision_cfg": vision}, "preprocess_cfg": preprocess}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    model = assert_same_outputs(tmp_path, reference, timm_outputs(reference))
    assert model.config == ODD
    assert model.provenance is not None
    assert model.provenance.layout == "timm, prefix visual.trunk"
    assert model.provenance.ignored == {"logit scale and bias": 2, "text encoder": 1}
    assert model.preprocessor_config["resample"] == 3


def test_open_clip_beside_remote_code(tmp_path: Path) -> None:
    reference = timm_encoder("vit_base_patch16_siglip_224")
    save_file(
        {f"visual.trunk.{k}": v for k, v in reference.state_dict().items()},
        tmp_path / "model.safetensors",
    )
    vision = {"image_size": 45, "timm_model_name": "vit_base_patch16_siglip_224", "num_heads": 4}
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"vision_cfg": vision}})
    )
    (tmp_path / "config.json").write_text(
        '\ufeff{"model_type": "siglip", "auto_map": {"AutoModel": "code.Model"}}'
    )
    assert load(tmp_path).config == EXACT_ODD


@pytest.mark.parametrize(
    ("prefix", "content", "beside"),
    [
        (
            "vision_backbone.fused_featurizer.",
            {
                "model_type": "openvla",
                "vision_backbone_id": "dinosiglip-vit-so-224px",
                "timm_model_ids": [
                    "vit_large_patch14_reg4_dinov2.lvd142m",
                    "vit_so400m_patch14_siglip_224",
                ],
                "image_sizes": [224, 224],
            },
            (
                "vision_backbone.featurizer.",
                ("patch_embed.proj.weight", "blocks.0.norm1.weight", "cls_token"),
            ),
        ),
        (
            "vpm.",
            {
                "model_type": "minicpmv",
                "vision_encoder": "vit_so400m_patch14_siglip_384.webli",
                "hidden_size": 2304,
            },
            ("llm.", ("model.x",)),
        ),
        (
            "vision_model.vision_tower.",
            {
                "model_type": "multi_modality",
                "vision_config": {
                    "cls": "CLIPVisionTower",
                    "params": {"model_name": "siglip_large_patch16_384"},
                },
            },
            ("gen_vision_model.", ("encoder.conv_in.weight",)),
        ),
        (
            "vision_model.vision_tower_low.vision_tower.",
            {
                "vision_config": {
                    "params": {"low_res_cfg": {"model_name": "siglip_large_patch16_384"}}
                }
            },
            (
                "vision_model.vision_tower_high.vision_tower.",
                ("patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.0.attn.rel_pos_h"),
            ),
        ),
    ],
    ids=["OpenVLA", "MiniCPM-V 2.0", "Janus", "DeepSeek-VL 7b"],
)
@torch.no_grad()
def test_timm_encoders_in_other_models(
    prefix: str, content: dict[str, Any], beside: tuple[str, tuple[str, ...]], tmp_path: Path
) -> None:
    reference = timm_encoder("vit_so400m_patch14_siglip_384").eval()
    tensors = {prefix + name: tensor for name, tensor in reference.state_dict().items()}
    tensors |= {beside[0] + name: torch.ones(2, 3, 4, 5) for name in beside[1]}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(odd_heads(content)))
    model = load(tmp_path)
    assert model.config == EXACT_ODD
    x = pixels(ODD).float()
    assert relative_error(model(x), reference.forward_features(x)) <= 1e-5
    assert (
        relative_error(load(tmp_path, pooling_head=False)(x), reference.forward_features(x)) <= 1e-5
    )

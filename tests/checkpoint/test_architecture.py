"""The architecture of a checkpoint without transformers' `config.json`."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from siglip_port import CheckpointError, SigLipVisionConfig, SigLipVisionModel
from siglip_port.checkpoint import layouts, preprocessor_config
from siglip_port.checkpoint.architecture import StoredSizes, infer_architecture, read_sizes
from siglip_port.checkpoint.key_rules import Layout
from siglip_port.checkpoint.layouts import LAYOUTS
from siglip_port.checkpoint.source import CONFIG
from tests.helpers.checkpoints import (
    EXACT,
    ODD,
    TANH,
    config_for,
    edit_config,
)
from tests.helpers.damaged_files import assert_refused
from tests.helpers.flax import flax, write_npz
from tests.helpers.other_libraries import write_hf_encoder
from tests.helpers.strategies import json_values

load = SigLipVisionModel.from_hf


# Sizes from the shapes of google/siglip-base-patch16-224.
BASE = StoredSizes(
    embed_dim=768,
    num_patches=196,
    patch_size=16,
    num_channels=3,
    mlp_hidden_dim=3072,
    num_encoder_blocks=12,
)
UNPUBLISHED = replace(BASE, mlp_hidden_dim=64)
SO400M = replace(BASE, embed_dim=1152, mlp_hidden_dim=4304, num_encoder_blocks=27)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_read_sizes(layout: Layout) -> None:
    config = replace(
        config_for(layout),
        embed_dim=144,
        num_attention_heads=2,  # head_dim 72, which some layouts fix
        mlp_hidden_dim=101,
        image_size=35,
        patch_size=7,
        num_encoder_blocks=11,
    )
    rules = layout.rules(config.pooling_head)
    state_dict = SigLipVisionModel(config).state_dict()
    stored = layout.to_stored(state_dict, 11, config.num_attention_heads, rules, "x.")
    sizes = read_sizes(layout, {name: tuple(tensor.shape) for name, tensor in stored.items()}, "x.")
    for field in fields(StoredSizes):
        size = getattr(sizes, field.name)
        if field.name != "num_attention_heads" or size is not None:
            assert size == getattr(config, field.name), field.name
    with pytest.raises(ValueError, match=r"is missing, so the architecture cannot be inferred"):
        read_sizes(layout, {}, "x.")


def test_unknown_architecture() -> None:
    with pytest.raises(
        ValueError,
        match=r"cannot infer num_attention_heads and hidden_act from .*; put .* or pass config=",
    ):
        infer_architecture(layouts.TIMM, UNPUBLISHED, {})
    with pytest.raises(ValueError, match=r"cannot infer hidden_act from"):
        infer_architecture(layouts.TIMM, BASE, {"num_heads": 12})
    with pytest.raises(ValueError, match=r"cannot infer num_attention_heads from"):
        infer_architecture(layouts.NANOVLM, UNPUBLISHED, {})


@pytest.mark.parametrize(
    ("contents", "heads", "act"),
    [
        ({"architecture": "vit_base_patch16_siglip_224"}, 12, EXACT),
        ({"architecture": "vit_base_patch16_siglip_224", "model_args": {"num_heads": 6}}, 6, EXACT),
        (
            {
                "architecture": "vit_base_patch16_siglip_224",
                "model_args": {"act_layer": "gelu_tanh"},
            },
            12,
            TANH,
        ),
        ({"num_heads": 8, "act_layer": "gelu"}, 8, EXACT),
        ({"deep": [{"vision": "google/siglip-base-patch16-224"}]}, 12, TANH),
    ],
)
def test_config_before_name(contents: dict[str, Any], heads: int, act: str) -> None:
    config = infer_architecture(layouts.TIMM, BASE, contents).config
    assert (config.num_attention_heads, config.hidden_act) == (heads, act)


def test_shapes_before_config() -> None:
    content = {
        "architecture": "vit_base_patch16_siglip_384",
        "num_heads": 6,
        "embed_dim": 5,
        "depth": 7,
    }
    config = infer_architecture(layouts.TIMM, replace(BASE, num_attention_heads=16), content).config
    sizes = (config.embed_dim, config.num_encoder_blocks, config.num_attention_heads)
    assert sizes == (768, 12, 16)
    assert config.image_size == 224


def test_heads_of_other_width() -> None:
    with pytest.raises(ValueError, match="cannot infer num_attention_heads from"):
        infer_architecture(layouts.TIMM, BASE, {"architecture": "vit_large_patch16_siglip_256"})


def test_values_fixed_by_layout() -> None:
    sizes = replace(SO400M, patch_size=14, num_patches=729, num_attention_heads=16)
    config = infer_architecture(layouts.MOONDREAM, sizes, {}).config
    assert (config.layer_norm_eps, config.hidden_act) == (1e-5, TANH)
    content = {"vit_n_heads": 12, "vit_ln_eps": 1e-5}
    assert infer_architecture(layouts.NANOVLM, BASE, content).config.layer_norm_eps == 1e-5


PATCHES_OF_SO400M = replace(BASE, embed_dim=1152, patch_size=14, num_patches=729)


@pytest.mark.parametrize(
    ("sizes", "content", "image_size"),
    [
        # the image size of the published model of this shape, or else grid size * patch size
        (BASE, {}, 224),
        (replace(BASE, num_patches=144), {}, 192),
        (BASE, {"img_size": 230}, 230),  # the stored number of patches
        (BASE, {"input_size": [3, 239, 239]}, 239),
        (BASE, {"img_size": 240}, 224),  # more patches than stored
        (BASE, {"img_size": 384, "image_size": 225}, 225),
        (BASE, {"img_size": True}, 224),
        (PATCHES_OF_SO400M, {}, 384),  # 27 * 14 is 378
        (PATCHES_OF_SO400M, {"vision_backbone_id": "siglip-vit-so-384px"}, 384),
        (PATCHES_OF_SO400M, {"name": "vit_so400m_patch14_siglip_378"}, 378),
        (replace(PATCHES_OF_SO400M, embed_dim=768), {}, 378),
    ],
)
def test_image_size(sizes: StoredSizes, content: dict[str, Any], image_size: int) -> None:
    content = {"num_heads": 12, "act_layer": "gelu_tanh", **content}
    assert infer_architecture(layouts.TIMM, sizes, content).config.image_size == image_size


def test_non_square_positions() -> None:
    sizes = replace(BASE, num_patches=195, num_attention_heads=12)
    with pytest.raises(ValueError, match="number of positions must be a square number, got 195"):
        infer_architecture(layouts.BIG_VISION, sizes, {})


def test_several_names() -> None:
    names = {"a": "vit_base_patch16_siglip_224", "b": ["vit_base_patch16_siglip_384"]}
    with pytest.raises(
        ValueError,
        match=r"names several vision encoders \(vit_base_patch16_siglip_224, .*_384\); pass conf",
    ):
        infer_architecture(layouts.TIMM, BASE, names)
    aliases = {"a": "google/siglip-base-patch16-224", "b": "siglip-base-patch16-224"}
    assert infer_architecture(layouts.TIMM, BASE, aliases).config == SigLipVisionConfig()


JSON = json_values(st.sampled_from(["gelu", "vit_base_patch16_siglip_224"]))
PLACES = st.sampled_from(
    [
        "architecture",
        "model_args",
        "model_cfg",
        "vision_cfg",
        "pretrained_cfg",
        "vision_config",
        "params",
        "model_type",
    ]
)


KEYS = st.sampled_from(
    ["num_heads", "vit_n_heads", "act_layer", "vit_ln_eps", "img_size", "input_size", "global_pool"]
)


@given(
    st.dictionaries(
        PLACES | KEYS, JSON | st.dictionaries(PLACES | KEYS, JSON, max_size=4), max_size=6
    )
)
def test_any_json(content: dict[str, Any]) -> None:
    try:
        config = infer_architecture(layouts.TIMM, BASE, content).config
        preprocessor_config.derive(config, content, content, "model")
    except ValueError:
        return
    assert config.num_patches == BASE.num_patches


def test_published_image_size(tmp_path: Path) -> None:
    """27 x 27 patches of 14 pixels with width 1152 are siglip-so400m-patch14-384, not 378."""
    config = SigLipVisionConfig(
        embed_dim=1152,
        num_attention_heads=16,
        num_encoder_blocks=1,
        mlp_hidden_dim=8,
        patch_size=14,
        image_size=384,
    )
    model = SigLipVisionModel(config)
    write_npz(tmp_path / "a.npz", flax(config, model.state_dict(), scanned=True), "img/")
    assert load(tmp_path / "a.npz").config == config


@pytest.mark.parametrize(
    "vision",
    [
        {"hidden_act": "quick_gelu"},
        {"layer_norm_eps": "1e-5"},
        {"vision_use_head": None},
        {"image_size": [45, 54]},
        {"model_type": "siglip2_navit"},
        {"model_type": "clip_vision_model"},
    ],
)
def test_refused_config_is_not_replaced_by_name(vision: dict[str, Any], tmp_path: Path) -> None:
    """Most fine-tuned checkpoints name the published model that they started from."""
    write_hf_encoder(tmp_path)
    encoder_config = json.loads((tmp_path / "config.json").read_text())
    content = {
        "_name_or_path": "google/siglip-base-patch16-224",
        "model_type": "x",
        "vision_config": {**encoder_config, **vision},
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError,
        match=r"configuration does not describe a supported SigLIP vision encoder; if it is wrong",
    ):
        load(tmp_path)
    assert load(tmp_path, config=ODD).config == ODD
    (tmp_path / "config.json").write_text("{")
    assert load(tmp_path, config=ODD).config == ODD


def test_bagel_refused(tmp_path: Path) -> None:
    write_hf_encoder(tmp_path, replace(ODD, naflex=True, image_size=42))
    content = {"model_type": "bagel", "vit_path": "google/siglip-so400m-patch14-384"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError,
        match=r"configuration has no vit_config; BAGEL stores it in vit_config.json",
    ):
        load(tmp_path)


def test_audio_heads_are_ignored(tmp_path: Path) -> None:
    config = replace(
        ODD, embed_dim=1152, num_attention_heads=16, pooling_head=False, num_encoder_blocks=1
    )
    write_hf_encoder(tmp_path, config)
    content = {"model_type": "llava_qwen", "mm_vision_tower": "google/siglip-so400m-patch14-384"}
    (tmp_path / "config.json").write_text(json.dumps({**content, "audio_config": {"num_heads": 8}}))
    assert load(tmp_path).config.num_attention_heads == 16


def test_original_llava(tmp_path: Path) -> None:
    """Its config.json describes the language model and names the vision encoder.

    The last block of the vision encoder is not stored.
    """
    config = replace(
        ODD, embed_dim=1152, num_attention_heads=16, pooling_head=False, num_encoder_blocks=2
    )
    prefix = "model.vision_tower.vision_tower.vision_model."
    tensors = {prefix + n: t for n, t in write_hf_encoder(tmp_path, config).items()}
    save_file({**tensors, "model.layers.0.x": torch.ones(3)}, tmp_path / "model.safetensors")
    content = {
        "model_type": "llava",
        "hidden_size": 3584,
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert load(tmp_path).config == replace(config, image_size=42)


@pytest.mark.parametrize("value", [False, 0, "", [], {}, "relu"])
def test_invalid_timm_values(value: object, model: SigLipVisionModel, tmp_path: Path) -> None:
    model.save_timm(tmp_path)
    edit_config(
        tmp_path,
        model_args={
            **json.loads((tmp_path / CONFIG).read_text())["model_args"],
            "act_layer": value,
        },
    )
    assert_refused(tmp_path, "hidden_act must be one of gelu_pytorch_tanh, gelu, got")
    edit_config(tmp_path, model_args={"act_layer": "gelu_tanh", "num_heads": 2}, vit_ln_eps=value)
    assert_refused(tmp_path, "layer_norm_eps must (be a number|lie between 0 and 1), got")


# --- evidence -------------------------------------------------------------------------------------

BASE_BLOCK = SigLipVisionConfig(
    embed_dim=768, num_attention_heads=12, mlp_hidden_dim=3072, num_encoder_blocks=1, image_size=32
)
UNDESCRIBED = "describes no vision encoder, and the tensor shapes are not those of a published"


def write_under(folder: Path, prefix: str, config: SigLipVisionConfig, content: object) -> None:
    """Write an encoder under a prefix, with any `config.json` or, for None, without one."""
    tensors = {prefix + name: tensor for name, tensor in write_hf_encoder(folder, config).items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / CONFIG).unlink()
    if content is not None:
        (folder / CONFIG).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("content", "prefix"),
    [
        (None, "vision_model."),
        ({"type": "pi05", "n_obs_steps": 1}, "paligemma_with_expert.paligemma.model.vision_tower."),
        ({"model_type": "unheard_of"}, ""),
    ],
)
def test_published_shapes(content: object, prefix: str, tmp_path: Path) -> None:
    config = replace(BASE_BLOCK, pooling_head=not prefix.startswith("pali"))
    write_under(tmp_path, prefix, config, content)
    model = load(tmp_path)
    assert model.config == config
    assert model.provenance is not None
    source = model.provenance.evidence.architecture
    assert source.startswith("tensor shapes")
    assert "assumed from the published base size: 12 heads, gelu_pytorch_tanh" in source


@pytest.mark.parametrize("content", [{"type": "smolvla"}, {}, {"dtype": "float32"}])
def test_undescribed_model(content: object, tmp_path: Path) -> None:
    """A configuration that describes no model is not that of siglip-base."""
    config = replace(BASE_BLOCK, num_attention_heads=8, mlp_hidden_dim=64, hidden_act=EXACT)
    write_under(tmp_path, "vision_model.", config, content)
    assert_refused(tmp_path, UNDESCRIBED)
    assert load(tmp_path, config=config).config == replace(config, pooling_head=False)


def test_unknown_naflex_matrix(tmp_path: Path) -> None:
    """BAGEL stores such a matrix without being a NaFlex model."""
    config = replace(BASE_BLOCK, image_size=80, naflex=True, pooling_head=False)
    write_under(tmp_path, "vit_model.vision_model.", config, None)
    assert_refused(tmp_path, "has no config.json, and the tensor shapes are not those")
    published = replace(config, image_size=256)
    write_under(tmp_path, "vision_model.", published, None)
    assert load(tmp_path).config == published


def test_local_path_in_config(tmp_path: Path) -> None:
    config = replace(ODD, embed_dim=1152, num_attention_heads=16, pooling_head=False)
    config = replace(config, num_encoder_blocks=1)
    write_hf_encoder(tmp_path, config)
    content = {"model_type": "llava_qwen", "mm_vision_tower": "/data/siglip-so400m-patch14-384/"}
    (tmp_path / CONFIG).write_text(json.dumps(content))
    assert load(tmp_path).config.num_attention_heads == 16


def timm_content(**args: object) -> dict[str, Any]:
    """Return a `config.json` of timm with these arguments of the model."""
    return {"architecture": "vit_base_patch16_siglip_224", "model_args": args}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (timm_content(img_size=[448, 112]), r"img_size must be square, got \[448, 112\]"),
        (timm_content(img_size=256), r"model_args has images of 256 pixels, but .* 14 x 14 pos"),
        ({"model_cfg": {"vision_cfg": {"image_size": 384}}}, "model_cfg.vision_cfg has images of"),
        ({"act_layer": "gelu", "input_size": [3, 112, 448]}, "input_size must be square"),
        (
            timm_content(rope_type="axial"),
            "model_args: settings rope_type='axial' are not",
        ),
        (timm_content(pos_embed_interp_mode="bicubic"), "pos_embed_interp_mode='bicubic' are not"),
        (timm_content(pos_embed_ar_preserving=True), "pos_embed_ar_preserving=True are not"),
        (timm_content(qk_norm=True, init_values=1e-5), "qk_norm=True, init_values=1e-05 are not"),
        (timm_content(pos_embed="sincos"), "pos_embed='sincos' are not"),
        ({"architecture": "vit_base_patch16_gap_224"}, "architecture must be one of timm's SigLIP"),
        ({"vit_cls_flag": True}, "settings vit_cls_flag=True are not SigLIP's"),
        ({"config": {"vision": {"use_rope": True}}}, "config.vision: settings use_rope=True are"),
        (
            {"model_cfg": {"vision_cfg": {"qk_norm": True}}},
            "model_cfg.vision_cfg: settings qk",
        ),
        ({"vision_config": {"params": {"rope": True}}}, "vision_config.params: settings rope=True"),
        ({"timm_override_act_layers": ["quick_gelu"]}, "timm_override_act_layers must be null"),
    ],
)
def test_other_timm_models(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        infer_architecture(layouts.TIMM, BASE, {"num_heads": 12, "act_layer": "gelu", **content})


@pytest.mark.parametrize(
    "content",
    [
        timm_content(img_size=[224, 224], qkv_bias=True, class_token=False, rope_type=""),
        timm_content(img_size=230, pos_embed="learn", drop_path_rate=0.1, init_values=None),
        {"architecture": "vit_base_patch16_siglip_224.v2_webli", "model_args": None},
        {"timm_override_act_layers": [None, None]},
    ],
)
def test_neutral_timm_arguments(content: dict[str, Any]) -> None:
    content = {"num_heads": 12, "act_layer": "gelu", **content}
    config = infer_architecture(layouts.TIMM, BASE, content).config
    assert (config.num_patches, config.hidden_act) == (196, EXACT)


def test_rectangular_grid() -> None:
    config = replace(ODD, naflex=True, image_size=42)
    tensors = layouts.TIMM_NAFLEX.to_stored(
        SigLipVisionModel(config).state_dict(), 11, 4, layouts.TIMM_NAFLEX.encoder
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    shapes["embeds.pos_embed"] = (1, 4, 9, config.embed_dim)
    with pytest.raises(ValueError, match="grid of positions must be square, got 4 x 9"):
        read_sizes(layouts.TIMM_NAFLEX, shapes)


def test_moondream() -> None:
    sizes = replace(SO400M, patch_size=14, num_patches=729)
    config = infer_architecture(layouts.MOONDREAM, sizes, {}).config
    assert (config.image_size, config.num_attention_heads) == (378, 16)
    vision = {"config": {"vision": {"enc_n_heads": 18, "crop_size": 384}}}
    config = infer_architecture(layouts.MOONDREAM, sizes, vision).config
    assert (config.image_size, config.num_attention_heads) == (384, 18)
    with pytest.raises(ValueError, match="cannot infer num_attention_heads"):
        infer_architecture(layouts.MOONDREAM, replace(sizes, embed_dim=144), {})


@pytest.mark.parametrize("inputs", [None, 1, 2])
def test_moondream_release(inputs: int | None, tmp_path: Path) -> None:
    """Releases before April 2024 have the exact GELU and the same names."""
    config = replace(ODD, layer_norm_eps=1e-5, pooling_head=False, image_size=42)
    tensors = layouts.MOONDREAM_OLD.to_stored(
        SigLipVisionModel(config).state_dict(),
        config.num_encoder_blocks,
        config.num_attention_heads,
        layouts.MOONDREAM_OLD.encoder,
        "vision_encoder.encoder.model.visual.",
    )
    if inputs is not None:
        projection = torch.ones(2, inputs * config.embed_dim)
        tensors["vision_encoder.projection.mlp.fc1.weight"] = projection
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / CONFIG).write_text(json.dumps({"num_heads": config.num_attention_heads}))
    if inputs == 2:
        assert load(tmp_path).config == config
    else:
        assert_refused(tmp_path, "Moondream releases before April 2024 have the exact GELU")
        assert load(tmp_path, config=replace(config, hidden_act=EXACT)).config.hidden_act == EXACT

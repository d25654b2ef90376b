"""The table of published towers, and how a file without transformers' configuration tells which one it holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port.checkpoint import build_on_meta
from siglip_port.checkpoint import layouts as key_map
from siglip_port.checkpoint import preprocessor_config as processors
from siglip_port.checkpoint.architecture import StoredSizes, infer_architecture
from siglip_port.checkpoint.key_rules import Layout
from siglip_port.checkpoint.registry import PUBLISHED, Published, config_of_name
from siglip_port.checkpoint.timm_config import config_to_timm
from tests.helpers.checkpoints import ODD

TANH, EXACT = "gelu_pytorch_tanh", "gelu"

# What shapes tell of google/siglip-base-patch16-224.
BASE = {
    "embed_dim": 768,
    "num_patches": 196,
    "patch_size": 16,
    "num_channels": 3,
    "mlp_hidden_dim": 3072,
    "num_encoder_blocks": 12,
}


def describe(layout: Layout, sizes: dict[str, Any], contents: dict[str, Any]) -> SigLipVisionConfig:
    return infer_architecture(layout, StoredSizes(**sizes), contents)


SO400M = {**BASE, "embed_dim": 1152, "mlp_hidden_dim": 4304, "num_encoder_blocks": 27}


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.repo)
def test_published_towers_have_as_many_parameters_as_published(published: Published) -> None:
    _, shapes = build_on_meta(published.config, "it", SigLipVisionModel)
    assert sum(shape.numel() for shape in shapes.values()) == published.vision_parameters
    assert published.vision_bytes == 4 * published.vision_parameters
    assert published.vision_parameters < published.total_parameters


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.repo)
def test_published_configurations_are_read_back(published: Published) -> None:
    """As they lie on the Hub: nested, and without all that equals a default of transformers."""
    default = SigLipVisionConfig(
        pooling_head=True, naflex=published.config.naflex, image_size=256
    ).to_hf()
    default |= {} if published.config.naflex else {"image_size": 224}
    left = {k: v for k, v in published.config.to_hf().items() if default[k] != v}
    kind = "siglip2" if published.config.naflex else "siglip"
    content = {"model_type": kind, "text_config": {"hidden_size": 1}, "vision_config": left}
    assert SigLipVisionConfig.from_hf(content) == published.config
    assert len(left) < 8


def test_the_table() -> None:
    assert len({published.repo for published in PUBLISHED}) == 28
    by_name = {published.repo.split("/")[1]: published for published in PUBLISHED}
    for name, published in by_name.items():
        assert published.size in name or name == "medsiglip-448"
        assert published.resample == (2 if name.startswith("siglip2") else 3)
        assert published.config.naflex == name.endswith("naflex")
    medsiglip = by_name["medsiglip-448"]
    assert (medsiglip.size, medsiglip.config.image_size, medsiglip.config.patch_size) == (
        "so400m",
        448,
        14,
    )
    assert by_name["siglip2-base-patch16-naflex"].config.num_patches == 256


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.repo)
def test_published_names(published: Published) -> None:
    assert (
        config_of_name(published.repo)
        == config_of_name(published.repo.split("/")[1])
        == published.config
    )


@pytest.mark.parametrize(
    ("name", "width", "image", "patch", "act", "mean"),
    [
        ("vit_base_patch16_siglip_224", 768, 224, 16, EXACT, False),
        ("vit_base_patch16_siglip_224.webli", 768, 224, 16, EXACT, False),
        ("vit_base_patch32_siglip_256", 768, 256, 32, TANH, False),
        ("vit_large_patch16_siglip_384", 1024, 384, 16, EXACT, False),
        ("vit_large_patch16_siglip_512", 1024, 512, 16, TANH, False),
        ("vit_so400m_patch14_siglip_gap_378", 1152, 378, 14, EXACT, True),
        ("vit_so400m_patch16_siglip_gap_256.v2_webli", 1152, 256, 16, TANH, True),
        ("vit_giantopt_patch16_siglip_384", 1536, 384, 16, TANH, False),
        ("siglip_large_patch16_384", 1024, 384, 16, EXACT, False),
        ("siglip-vit-so400m", 1152, 224, 14, EXACT, False),
        ("dinosiglip-vit-so-384px", 1152, 384, 14, EXACT, False),
        ("siglip-vit-b16-224px", 768, 224, 16, EXACT, False),
    ],
)
def test_names_in_other_code(
    name: str, width: int, image: int, patch: int, act: str, mean: bool
) -> None:
    found = config_of_name(name)
    assert found is not None
    assert (found.embed_dim, found.image_size, found.patch_size) == (width, image, patch)
    assert (found.hidden_act, found.mean_pooling, found.naflex) == (act, mean, False)


def test_naflex_names() -> None:
    found = config_of_name("naflexvit_base_patch16_siglip.v2_webli")
    assert found == replace(SigLipVisionConfig(), image_size=256, naflex=True)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "siglip",
        "google/siglip-base",
        "other/siglip-base-patch16-224",
        "vit_base_patch16_clip_224",
        "vit_base_patch16_siglip_224_and_more",
        "vit_huge_patch16_siglip_224",
        "siglip_giant_patch16_384",
    ],
)
def test_other_names(name: str) -> None:
    assert config_of_name(name) is None


# --- describe -------------------------------------------------------------------------------------


def test_what_shapes_and_layout_do_not_tell_is_asked_for() -> None:
    with pytest.raises(
        ValueError, match=r"tell the number of heads and the activation; put .* or pass config="
    ):
        describe(key_map.TIMM, BASE, {})
    with pytest.raises(ValueError, match=r"tell the activation; put"):
        describe(key_map.TIMM, BASE, {"num_heads": 12})
    with pytest.raises(ValueError, match=r"tell the number of heads; put"):
        describe(key_map.NANOVLM, BASE, {})


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
def test_what_the_configuration_says_comes_before_the_name(
    contents: dict[str, Any], heads: int, act: str
) -> None:
    config = describe(key_map.TIMM, BASE, contents)
    assert (config.num_attention_heads, config.hidden_act) == (heads, act)


def test_shapes_come_before_everything() -> None:
    contents = {
        "architecture": "vit_base_patch16_siglip_384",
        "num_heads": 6,
        "embed_dim": 5,
        "depth": 7,
    }
    config = describe(key_map.TIMM, {**BASE, "num_attention_heads": 16}, contents)
    assert (config.embed_dim, config.num_encoder_blocks, config.num_attention_heads) == (
        768,
        12,
        16,
    )
    assert config.image_size == 224


def test_a_name_of_another_width_tells_no_heads() -> None:
    with pytest.raises(ValueError, match="tell the number of heads; put"):
        describe(key_map.TIMM, BASE, {"architecture": "vit_large_patch16_siglip_256"})


def test_layouts_that_fix_what_no_file_tells() -> None:
    config = describe(
        key_map.MOONDREAM,
        {**SO400M, "patch_size": 14, "num_patches": 729, "num_attention_heads": 16},
        {},
    )
    assert (config.layer_norm_eps, config.hidden_act) == (1e-5, TANH)
    assert (
        describe(key_map.NANOVLM, BASE, {"vit_n_heads": 12, "vit_ln_eps": 1e-5}).layer_norm_eps
        == 1e-5
    )


@pytest.mark.parametrize(
    ("sizes", "contents", "image"),
    [
        (
            {},
            {},
            224,
        ),  # of the published tower of this shape, or the least that there are patches for
        ({"num_patches": 144}, {}, 192),
        ({}, {"img_size": 230}, 230),  # its patches are as many
        ({}, {"input_size": [3, 239, 239]}, 239),
        ({}, {"img_size": 240}, 224),  # its patches are more
        ({}, {"img_size": 384, "image_size": 225}, 225),
        ({}, {"img_size": True}, 224),
        ({"embed_dim": 1152, "patch_size": 14, "num_patches": 729}, {}, 384),  # 27 * 14 is 378
        (
            {"embed_dim": 1152, "patch_size": 14, "num_patches": 729},
            {"architecture": "siglip-vit-so-384px"},
            384,
        ),
        (
            {"embed_dim": 1152, "patch_size": 14, "num_patches": 729},
            {"name": "vit_so400m_patch14_siglip_378"},
            378,
        ),
        ({"embed_dim": 768, "patch_size": 14, "num_patches": 729}, {}, 378),
    ],
)
def test_the_size_of_a_picture(sizes: dict[str, int], contents: dict[str, Any], image: int) -> None:
    heads = {"num_heads": 12, "act_layer": "gelu_tanh", **contents}
    assert describe(key_map.TIMM, {**BASE, **sizes}, heads).image_size == image


def test_positions_of_no_square_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="its 195 positions form no square grid"):
        describe(key_map.BIG_VISION, {**BASE, "num_patches": 195, "num_attention_heads": 12}, {})


def test_several_names_are_refused_unless_they_mean_the_same() -> None:
    two = {"a": "vit_base_patch16_siglip_224", "b": ["vit_base_patch16_siglip_384"]}
    with pytest.raises(
        ValueError,
        match=r"names several towers \(vit_base_patch16_siglip_224, .*_384\); pass config=",
    ):
        describe(key_map.TIMM, BASE, two)
    same = {"a": "google/siglip-base-patch16-224", "b": "siglip-base-patch16-224"}
    assert describe(key_map.TIMM, BASE, same) == SigLipVisionConfig()


# --- timm_config ----------------------------------------------------------------------------------


def timm_words(config: SigLipVisionConfig, **processor: object) -> dict[str, Any]:
    return config_to_timm(config, {**processors.default(config), **processor})


@pytest.mark.parametrize("published", PUBLISHED[::5], ids=lambda published: published.repo)
def test_timm_config_is_understood_again(published: Published) -> None:
    config = published.config
    contents = timm_words(config)
    layout = key_map.TIMM_NAFLEX if config.naflex else key_map.TIMM
    sizes = {name: getattr(config, name) for name in BASE}
    assert describe(layout, sizes, contents) == replace(config, pooling_head=False)


def test_timm_config_of_a_tower_that_nobody_has_published() -> None:
    contents = timm_words(ODD, resample=2, image_mean=[0.1, 0.2, 0.3])
    args, cfg = contents["model_args"], contents["pretrained_cfg"]
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
    assert timm_words(replace(ODD, pooling_head=False))["global_pool"] == ""
    assert timm_words(replace(ODD, pooling_head=False, mean_pooling=True))["global_pool"] == "avg"
    assert timm_words(replace(ODD, hidden_act="gelu"))["model_args"]["act_layer"] == "gelu"


def test_timm_config_of_a_naflex_tower() -> None:
    contents = timm_words(replace(ODD, naflex=True))
    assert contents["architecture"].startswith("naflexvit")
    assert contents["model_args"]["pos_embed_grid_size"] == [6, 6]
    assert "img_size" not in contents["model_args"]
    assert contents["pretrained_cfg"]["interpolation"] == "bilinear"
    assert not contents["pretrained_cfg"]["fixed_input_size"]


def test_timm_computes_the_width_of_the_mlp_that_is_meant() -> None:
    """timm takes int(width * ratio), which for 49 * (1 / 49) is 0."""
    for width in range(1, 130):
        for hidden in (1, 13, 47, 101, 4304):
            config = SigLipVisionConfig(
                embed_dim=width, num_attention_heads=1, mlp_hidden_dim=hidden
            )
            assert int(width * timm_words(config)["model_args"]["mlp_ratio"]) == hidden


def test_timm_has_one_epsilon() -> None:
    with pytest.raises(
        ValueError, match=r"timm's SigLIP towers have layer_norm_eps 1e-6, this one has 1e-05"
    ):
        timm_words(replace(ODD, layer_norm_eps=1e-5))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["gelu", "vit_base_patch16_siglip_224"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
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
def test_any_json_object_is_understood_or_refused_in_words(content: dict[str, Any]) -> None:
    try:
        config = describe(key_map.TIMM, BASE, content)
        processors.derive(config, content, content, "made")
    except ValueError:
        return
    assert config.num_patches == BASE["num_patches"]

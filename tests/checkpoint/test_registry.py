"""The table of published models, and their names in other libraries."""

from __future__ import annotations

from dataclasses import replace

import pytest

from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port.checkpoint import build_on_meta
from siglip_port.checkpoint.registry import PUBLISHED, Published, config_of_name
from tests.helpers.checkpoints import EXACT, TANH


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.repo)
def test_parameter_counts(published: Published) -> None:
    _, shapes = build_on_meta(published.config, published.repo, SigLipVisionModel)
    assert sum(shape.numel() for shape in shapes.values()) == published.vision_parameters
    assert published.vision_bytes == 4 * published.vision_parameters
    assert published.vision_parameters < published.total_parameters


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.repo)
def test_config_round_trip(published: Published) -> None:
    """Published files are nested and omit transformers' defaults."""
    default = SigLipVisionConfig(
        pooling_head=True, naflex=published.config.naflex, image_size=256
    ).to_hf()
    default |= {} if published.config.naflex else {"image_size": 224}
    short = {k: v for k, v in published.config.to_hf().items() if default[k] != v}
    kind = "siglip2" if published.config.naflex else "siglip"
    content = {"model_type": kind, "text_config": {"hidden_size": 1}, "vision_config": short}
    assert SigLipVisionConfig.from_hf(content) == published.config
    assert len(short) < 8


def test_published_table() -> None:
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
def test_names_of_published(published: Published) -> None:
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
def test_names_in_other_libraries(
    name: str, width: int, image: int, patch: int, act: str, mean: bool
) -> None:
    config = config_of_name(name)
    assert config is not None
    assert (config.embed_dim, config.image_size, config.patch_size) == (width, image, patch)
    assert (config.hidden_act, config.mean_pooling, config.naflex) == (act, mean, False)


def test_naflex_names() -> None:
    config = config_of_name("naflexvit_base_patch16_siglip.v2_webli")
    assert config == replace(SigLipVisionConfig(), image_size=256, naflex=True)


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

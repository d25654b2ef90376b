"""Properties of all layouts; a new layout in `LAYOUTS` is tested without further code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Siglip2VisionModel, SiglipVisionModel

from siglip_port import SigLipVisionModel as Port
from siglip_port.checkpoint.key_rules import KeyRule, Layout
from siglip_port.checkpoint.layouts import (
    HUGGINGFACE,
    HUGGINGFACE_ENCODER,
    HUGGINGFACE_NAFLEX,
    LAYOUTS,
)
from siglip_port.checkpoint.recognize import recognizable_layouts
from siglip_port.parity.siglip.reference import hf_config
from siglip_port.parity.stress_weights import randomize
from tests.helpers.checkpoints import ODD, config_for

each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
PREFIXES = st.sampled_from(
    ["", "vision_model.", "model.vision_tower.vision_tower.vision_model.", "params/img/", "a.b."]
)


@each_layout
def test_mappings_cover_port(layout: Layout) -> None:
    mappings = layout.mappings(ODD.num_encoder_blocks, layout.rules(True))
    port = [name for mapping in mappings.values() for name in mapping.port]
    assert sorted(port) == sorted(Port(config_for(layout, ODD)).state_dict())


@pytest.mark.parametrize(
    "layout", [HUGGINGFACE, HUGGINGFACE_NAFLEX], ids=lambda layout: layout.name
)
def test_mappings_cover_reference(layout: Layout) -> None:
    config = config_for(layout, ODD)
    model = (Siglip2VisionModel if layout.naflex else SiglipVisionModel)(hf_config(config))
    mappings = layout.mappings(config.num_encoder_blocks, layout.rules(True))
    port = Port(config).state_dict()
    shapes = {
        name: mapping.stored_shape(
            [port[parameter].shape for parameter in mapping.port], config.num_attention_heads
        )
        for name, mapping in mappings.items()
    }
    assert shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}


@each_layout
@given(num_blocks=st.integers(0, 40), prefix=PREFIXES)
def test_mappings_unique(layout: Layout, num_blocks: int, prefix: str) -> None:
    mappings = layout.mappings(num_blocks, layout.rules(True), prefix)
    port = [name for mapping in mappings.values() for name in mapping.port]
    assert len(set(port)) == len(port) == 16 * num_blocks + (20 if layout.head else 5)
    assert all(name.startswith(prefix) for name in mappings)
    assert not [name for name in mappings if "{}" in name or "*" in name]


@each_layout
def test_round_trip(layout: Layout) -> None:
    config = config_for(layout)
    model = Port(config)
    randomize(model)
    port = model.state_dict()
    rules = layout.rules(config.pooling_head)
    stored = layout.to_stored(
        port, config.num_encoder_blocks, config.num_attention_heads, rules, "x."
    )
    back: dict[str, torch.Tensor] = {}
    for name, mapping in layout.mappings(config.num_encoder_blocks, rules, "x.").items():
        shapes = [port[parameter].shape for parameter in mapping.port]
        back |= dict(zip(mapping.port, mapping.from_stored(stored[name], shapes), strict=True))
        assert stored[name].shape == mapping.stored_shape(shapes, config.num_attention_heads)
    assert back.keys() == port.keys()
    assert all(torch.equal(back[name], port[name]) for name in port)


@each_layout
@given(
    suffix=st.text(alphabet="abc._/0123456789", min_size=1, max_size=6),
    position=st.integers(0, 1_000),
    prefix=PREFIXES,
)
def test_unknown_keys(layout: Layout, suffix: str, position: int, prefix: str) -> None:
    mappings = layout.mappings(3, layout.rules(True), prefix)
    invented = sorted(mappings)[position % len(mappings)] + suffix
    assert invented not in mappings
    assert layout.reason_to_ignore(invented, prefix) is None


@each_layout
@given(prefix=PREFIXES)
def test_encoder_keys_not_ignored(layout: Layout, prefix: str) -> None:
    names = layout.mappings(3, layout.rules(True), prefix)
    assert not [name for name in names if layout.reason_to_ignore(name, prefix)]


@pytest.mark.parametrize(
    ("name", "prefix", "reason"),
    [
        ("text_model.encoder.layers.0.mlp.fc1.weight", "vision_model.", "text encoder"),
        ("model.text_model.x", "model.vision_model.", "text encoder"),
        ("text.transformer.x", "visual.trunk.", "text encoder"),
        ("params/txt/head/kernel", "params/img/", "text encoder"),
        ("logit_scale", "vision_model.", "logit scale and bias"),
        ("logit_bias", "vision_model.", "logit scale and bias"),
        ("params/b", "params/img/", "logit scale and bias"),
        ("classifier.weight", "vision_model.", "image classifier"),
        (
            "vision_model.embeddings.position_ids",
            "vision_model.",
            "position ids",
        ),
        ("embeddings.position_ids", "", "position ids"),
        ("language_model.model.layers.0.x", "vision_tower.", "language model"),
        ("multi_modal_projector.linear.weight", "vision_tower.vision_model.", "projector"),
        ("anything", "vision_model.", "other tensors"),
        ("logit_scale", "", None),
        ("text_model", "", None),
        ("vision_model.text_model.x", "vision_model.", None),
        ("vision_model.position_ids", "vision_model.", None),
    ],
)
def test_ignored_keys(name: str, prefix: str, reason: str | None) -> None:
    assert HUGGINGFACE.reason_to_ignore(name, prefix) == reason


@each_layout
@pytest.mark.parametrize("prefix", ["", "vision_model.", "params/img/"])
def test_layouts_disjoint(layout: Layout, prefix: str) -> None:
    config = config_for(layout, ODD)
    stored = layout.to_stored(
        Port(config).state_dict(), 11, config.num_attention_heads, layout.rules(True), prefix
    )
    matches = [
        (other.name, candidate)
        for other in recognizable_layouts()
        for candidate in other.prefixes(stored)
        if other.fits(stored[candidate + other.signature_keys[0]].shape)
    ]
    # The configuration selects this layout; its names and shapes are those of another one.
    recognized = "huggingface-naflex" if layout.model_types else layout.name
    assert matches == [(recognized, prefix)]


def test_duplicate_names() -> None:
    for rules in (
        HUGGINGFACE_ENCODER + HUGGINGFACE_ENCODER[:1],
        (*HUGGINGFACE_ENCODER, KeyRule(HUGGINGFACE_ENCODER[0].port, "elsewhere.*")),
    ):
        with pytest.raises(
            ValueError, match=r"key map: names mapped more than once: .*patch_embedding"
        ):
            HUGGINGFACE.mappings(1, rules)


def test_unique_names() -> None:
    assert (
        len({layout.name for layout in LAYOUTS})
        == len({layout.title for layout in LAYOUTS})
        == len(LAYOUTS)
    )

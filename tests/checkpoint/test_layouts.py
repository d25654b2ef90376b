"""Every table of the key map, by the same properties.

A layout that is added is tested by being added.
"""

from __future__ import annotations

import re
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Siglip2VisionModel, SiglipVisionModel

from siglip_port import SigLipVisionConfig
from siglip_port import SigLipVisionModel as Port
from siglip_port.checkpoint.architecture import StoredSizes, read_sizes
from siglip_port.checkpoint.key_rules import KeyRule, Layout
from siglip_port.checkpoint.layouts import (
    HUGGINGFACE,
    HUGGINGFACE_ENCODER,
    HUGGINGFACE_NAFLEX,
    LAYOUTS,
)
from siglip_port.parity.siglip.reference import hf_config
from siglip_port.parity.stress_weights import randomise
from siglip_port.text import fold_blocks
from tests.helpers.checkpoints import ODD, SMALL

layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
PREFIXES = st.sampled_from(
    ["", "vision_model.", "model.vision_tower.vision_tower.vision_model.", "params/img/", "a.b."]
)


def config_of(layout: Layout, config: SigLipVisionConfig = SMALL) -> SigLipVisionConfig:
    """A tower that this layout can hold."""
    return replace(config, pooling_head=bool(layout.head), naflex=layout.naflex)


@layouts
def test_claims_are_a_bijection_with_our_parameters(layout: Layout) -> None:
    claims = layout.mappings(ODD.num_encoder_blocks, layout.rules(True))
    ours = [name for claim in claims.values() for name in claim.port]
    assert sorted(ours) == sorted(Port(config_of(layout, ODD)).state_dict())


@pytest.mark.parametrize(
    "layout", [HUGGINGFACE, HUGGINGFACE_NAFLEX], ids=lambda layout: layout.name
)
def test_claims_are_a_bijection_with_the_reference(layout: Layout) -> None:
    config = config_of(layout, ODD)
    model = (Siglip2VisionModel if layout.naflex else SiglipVisionModel)(hf_config(config))
    claims = layout.mappings(config.num_encoder_blocks, layout.rules(True))
    ours = Port(config).state_dict()
    shapes = {
        name: claim.stored_shape(
            [ours[our].shape for our in claim.port], config.num_attention_heads
        )
        for name, claim in claims.items()
    }
    assert shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}


@layouts
@given(num_blocks=st.integers(0, 40), prefix=PREFIXES)
def test_every_name_is_claimed_once(layout: Layout, num_blocks: int, prefix: str) -> None:
    claims = layout.mappings(num_blocks, layout.rules(True), prefix)
    ours = [name for claim in claims.values() for name in claim.port]
    assert len(set(ours)) == len(ours) == 16 * num_blocks + (20 if layout.head else 5)
    assert all(name.startswith(prefix) for name in claims)
    assert not [name for name in claims if "{}" in name or "*" in name]


@layouts
def test_round_trip_is_bit_exact(layout: Layout) -> None:
    config = config_of(layout)
    model = Port(config)
    randomise(model)
    ours, rows = model.state_dict(), layout.rules(config.pooling_head)
    stored = layout.to_stored(
        ours, config.num_encoder_blocks, config.num_attention_heads, rows, "x."
    )
    back: dict[str, torch.Tensor] = {}
    for name, claim in layout.mappings(config.num_encoder_blocks, rows, "x.").items():
        shapes = [ours[our].shape for our in claim.port]
        back |= dict(zip(claim.port, claim.from_stored(stored[name], shapes), strict=True))
        assert stored[name].shape == claim.stored_shape(shapes, config.num_attention_heads)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)


@layouts
def test_the_shapes_tell_the_sizes(layout: Layout) -> None:
    config = replace(
        config_of(layout), embed_dim=144, num_attention_heads=2, mlp_hidden_dim=101, image_size=35
    )
    config = replace(
        config, patch_size=7, num_encoder_blocks=11
    )  # heads of 72, which some layouts take for granted
    rows = layout.rules(config.pooling_head)
    stored = layout.to_stored(Port(config).state_dict(), 11, config.num_attention_heads, rows, "x.")
    sizes = read_sizes(layout, {name: tuple(tensor.shape) for name, tensor in stored.items()}, "x.")
    for field in fields(StoredSizes):
        size = getattr(sizes, field.name)
        if field.name != "num_attention_heads" or size is not None:
            assert size == getattr(config, field.name), field.name
    with pytest.raises(ValueError, match=r"is missing, from which its size is told"):
        read_sizes(layout, {}, "x.")


@layouts
@given(
    suffix=st.text(alphabet="abc._/0123456789", min_size=1, max_size=6),
    position=st.integers(0, 1_000),
    prefix=PREFIXES,
)
def test_invented_names_are_neither_claimed_nor_dropped(
    layout: Layout, suffix: str, position: int, prefix: str
) -> None:
    claims = layout.mappings(3, layout.rules(True), prefix)
    invented = sorted(claims)[position % len(claims)] + suffix
    assert invented not in claims
    assert layout.reason_to_ignore(invented, prefix) is None


@layouts
@given(prefix=PREFIXES)
def test_no_tensor_of_the_tower_is_dropped(layout: Layout, prefix: str) -> None:
    names = layout.mappings(3, layout.rules(True), prefix)
    assert not [name for name in names if layout.reason_to_ignore(name, prefix)]


@pytest.mark.parametrize(
    ("name", "prefix", "reason"),
    [
        ("text_model.encoder.layers.0.mlp.fc1.weight", "vision_model.", "text tower"),
        ("model.text_model.x", "model.vision_model.", "text tower"),
        ("text.transformer.x", "visual.trunk.", "text tower"),
        ("params/txt/head/kernel", "params/img/", "text tower"),
        ("logit_scale", "vision_model.", "scale and bias of the image-text logits"),
        ("logit_bias", "vision_model.", "scale and bias of the image-text logits"),
        ("params/b", "params/img/", "scale and bias of the image-text logits"),
        ("classifier.weight", "vision_model.", "image classifier"),
        (
            "vision_model.embeddings.position_ids",
            "vision_model.",
            "position ids: counted, not learned",
        ),
        ("embeddings.position_ids", "", "position ids: counted, not learned"),
        ("language_model.model.layers.0.x", "vision_tower.", "language model"),
        ("multi_modal_projector.linear.weight", "vision_tower.vision_model.", "projector"),
        ("anything", "vision_model.", "rest of the file"),
        ("logit_scale", "", None),
        ("text_model", "", None),
        ("vision_model.text_model.x", "vision_model.", None),
        ("vision_model.position_ids", "vision_model.", None),
    ],
)
def test_what_is_dropped(name: str, prefix: str, reason: str | None) -> None:
    assert HUGGINGFACE.reason_to_ignore(name, prefix) == reason


@layouts
@pytest.mark.parametrize("prefix", ["", "vision_model.", "params/img/"])
def test_layouts_do_not_take_each_other_for_their_own(layout: Layout, prefix: str) -> None:
    config = config_of(layout, ODD)
    stored = layout.to_stored(
        Port(config).state_dict(), 11, config.num_attention_heads, layout.rules(True), prefix
    )
    found = [
        (o.name, p)
        for o in LAYOUTS
        for p in o.prefixes(stored)
        if o.fits(stored[p + o.signature_keys[0]].shape)
    ]
    assert found == [(layout.name, prefix)]


def test_a_table_that_claims_twice_is_refused() -> None:
    for rows in (
        HUGGINGFACE_ENCODER + HUGGINGFACE_ENCODER[:1],
        (*HUGGINGFACE_ENCODER, KeyRule(HUGGINGFACE_ENCODER[0].port, "elsewhere.*")),
    ):
        with pytest.raises(ValueError, match=r"claims these more than once: .*patch_embedding"):
            HUGGINGFACE.mappings(1, rows)


def test_layouts_have_names_of_their_own() -> None:
    assert (
        len({layout.name for layout in LAYOUTS})
        == len({layout.title for layout in LAYOUTS})
        == len(LAYOUTS)
    )


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (
            [f"encoder.layers.{i}.mlp.fc1.bias" for i in range(12)],
            ["encoder.layers.{0...11}.mlp.fc1.bias"],
        ),
        (
            [f"layers.{i}.layer_norm1.weight" for i in (5, 0, 1, 2)],
            ["layers.{0...2,5}.layer_norm1.weight"],
        ),
        (["a.{}.3.b", "a.{}.4.b", "{}"], ["a.{}.{3...4}.b", "{}"]),
        ([f"layers.{'9' * 5000}.x"], [f"layers.{'9' * 5000}.x"]),
        (["layers.7.mlp.fc2.bias", "head.probe"], ["layers.7.mlp.fc2.bias", "head.probe"]),
    ],
)
def test_names_are_folded_by_block(names: list[str], folded: list[str]) -> None:
    assert fold_blocks(names) == folded


@given(st.sets(st.integers(0, 60), min_size=1))
def test_folding_loses_no_block(blocks: set[int]) -> None:
    (folded,) = fold_blocks(f"layers.{i}.mlp.fc1.bias" for i in sorted(blocks))
    text = folded.removeprefix("layers.").removesuffix(".mlp.fc1.bias").strip("{}")
    runs = [re.fullmatch(r"(\d+)(?:\.\.\.(\d+))?", run) for run in text.split(",")]
    unfolded = {i for run in runs if run for i in range(int(run[1]), int(run[2] or run[1]) + 1)}
    assert unfolded == blocks

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import SiglipVisionModel

from siglip_port import SigLipVisionModel as Port
from siglip_port import key_map
from siglip_port.key_map import FLAT, HEAD, LAYOUTS, PREFIXED, TOWER, Layout, Row
from siglip_port.parity.references import hf_config
from tests.conftest import ODD, SMALL

EVERYTHING = TOWER + HEAD
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)


@layouts
def test_claims_are_a_bijection_with_our_parameters(layout: Layout) -> None:
    claims = layout.claims(ODD.num_encoder_blocks, EVERYTHING)
    ours = [name for names in claims.values() for name in names]
    assert sorted(ours) == sorted(Port(ODD).state_dict())


def test_claims_are_a_bijection_with_the_reference() -> None:
    claims = FLAT.claims(ODD.num_encoder_blocks, EVERYTHING)
    assert claims.keys() == SiglipVisionModel(hf_config(ODD)).state_dict().keys()
    assert PREFIXED.claims(ODD.num_encoder_blocks, EVERYTHING).keys() == {f"vision_model.{name}" for name in claims}


@layouts
@given(num_blocks=st.integers(0, 40))
def test_every_name_is_claimed_once(layout: Layout, num_blocks: int) -> None:
    claims = layout.claims(num_blocks, EVERYTHING)
    assert len(claims) == 16 * num_blocks + 16
    assert sum(map(len, claims.values())) == 16 * num_blocks + 16 + 4  # q, k, v: three for one, weight and bias


@layouts
def test_round_trip_is_bit_exact(layout: Layout) -> None:
    model = Port(SMALL)
    ours = model.state_dict()
    claims = layout.claims(SMALL.num_encoder_blocks, EVERYTHING)
    stored = layout.to_stored(ours, SMALL.num_encoder_blocks, EVERYTHING)
    back = {
        name: part
        for key, names in claims.items()
        for name, part in zip(names, key_map.split(stored[key], len(names)), strict=True)
    }
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    for key, names in claims.items():
        assert stored[key].shape == key_map.fused_shape([ours[name].shape for name in names])


@layouts
@given(suffix=st.text(alphabet="abc._0123456789", min_size=1, max_size=6), position=st.integers(0, 1_000))
def test_invented_names_are_neither_claimed_nor_dropped(layout: Layout, suffix: str, position: int) -> None:
    names = sorted(layout.claims(3, EVERYTHING))
    invented = names[position % len(names)] + suffix
    assert invented not in layout.claims(3, EVERYTHING)
    assert layout.reason_to_drop(invented) is None


@layouts
def test_no_tensor_of_the_tower_is_dropped(layout: Layout) -> None:
    assert not [name for name in layout.claims(3, EVERYTHING) if layout.reason_to_drop(name)]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("text_model.encoder.layers.0.mlp.fc1.weight", "text tower"),
        ("logit_scale", "scale and bias of the image-text logits"),
        ("logit_bias", "scale and bias of the image-text logits"),
        ("classifier.weight", "image classifier"),
        ("classifier.bias", "image classifier"),
        ("vision_model.embeddings.position_ids", "position ids: counted, not learned"),
        ("logit_scales", None),
        ("classifier.weights", None),
        ("text_model", None),
        ("vision_model.text_model.x", None),
        ("embeddings.position_ids", None),
    ],
)
def test_what_is_dropped_is_a_closed_list(name: str, reason: str | None) -> None:
    assert PREFIXED.reason_to_drop(name) == reason


def test_layouts_do_not_take_each_other_for_their_own() -> None:
    for layout in LAYOUTS:
        names = layout.claims(2, EVERYTHING)
        assert [other for other in LAYOUTS if other.recognises(names)] == [layout]


def test_a_table_that_claims_twice_is_refused() -> None:
    for rows in (TOWER + TOWER[:1], (*TOWER, Row(TOWER[0].ours, "elsewhere.*"))):
        with pytest.raises(ValueError, match=r"claims these more than once: .*patch_embedding"):
            FLAT.claims(1, rows)


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        ([f"encoder.layers.{i}.mlp.fc1.bias" for i in range(12)], ["encoder.layers.{0...11}.mlp.fc1.bias"]),
        ([f"layers.{i}.layer_norm1.weight" for i in (5, 0, 1, 2)], ["layers.{0...2,5}.layer_norm1.weight"]),
        (["a.{}.3.b", "a.{}.4.b", "{}"], ["a.{}.{3...4}.b", "{}"]),
        ([f"layers.{'9' * 5000}.x"], [f"layers.{'9' * 5000}.x"]),
        (["layers.7.mlp.fc2.bias", "head.probe"], ["layers.7.mlp.fc2.bias", "head.probe"]),
    ],
)
def test_names_are_folded_by_block(names: list[str], folded: list[str]) -> None:
    assert key_map.fold_blocks(names) == folded


@given(st.sets(st.integers(0, 60), min_size=1))
def test_folding_loses_no_block(blocks: set[int]) -> None:
    (folded,) = key_map.fold_blocks(f"layers.{i}.mlp.fc1.bias" for i in sorted(blocks))
    text = folded.removeprefix("layers.").removesuffix(".mlp.fc1.bias").strip("{}")
    runs = [re.fullmatch(r"(\d+)(?:\.\.\.(\d+))?", run) for run in text.split(",")]
    unfolded = {i for run in runs if run for i in range(int(run[1]), int(run[2] or run[1]) + 1)}
    assert unfolded == blocks

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from siglip_port import SigLipVisionModel
from siglip_port.checkpoint import layouts as key_map
from siglip_port.parity.siglip.taps import siglip_taps
from siglip_port.parity.taps import expand, inside_attention, listening, record
from tests.helpers.checkpoints import ODD, pixels


class Two(nn.Module):
    """x + second(first(x)), where the residual connection reads what the hook of `second` was given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out: Tensor = x + self.second(x)
        return out


def test_every_row_of_the_key_map_has_a_tap() -> None:
    port = SigLipVisionModel(ODD)
    taps = siglip_taps(True)
    modules = {name.rpartition(".")[0] for name, _ in port.named_parameters()}
    tapped = {
        tap.port.partition(":")[0]
        for tap in expand({ours: ours for ours in taps.values()}, port, port)
    }
    without_a_call = {
        "transformer.embeddings.position_embedding",
        "pooling_head",
    }  # their parameters are just read
    assert modules - without_a_call <= tapped
    assert not any(theirs.startswith("head") for theirs in siglip_taps(False))
    assert len(key_map.HUGGINGFACE_ENCODER) + len(key_map.HUGGINGFACE_HEAD) < len(taps)


def test_points_are_seen_in_the_order_of_the_computation() -> None:
    model = Two()
    x = torch.randn(2, 3)
    seen = record(model, ["second", "second:input", "first"], lambda: {"output": model(x)})
    assert list(seen.taps) == ["first", "second:input", "second"]
    assert torch.equal(seen.taps["first"], model.first(x))
    assert torch.equal(seen.taps["second:input"], seen.taps["first"])
    assert torch.equal(seen.outputs["output"], seen.taps["first"] + seen.taps["second"])


def test_what_is_seen_can_be_replaced_also_behind_a_residual_connection() -> None:
    model = Two()
    ones = torch.ones(2, 3)
    with (
        torch.inference_mode(),
        listening(model, ["second:input"], lambda point, value: ones.clone()),
    ):
        assert torch.equal(model(torch.randn(2, 3)), ones + model.second(ones))
    with torch.inference_mode(), listening(model, ["second"], lambda point, value: ones):
        x = torch.randn(2, 3)
        assert torch.equal(model(x), model.first(x) + ones)
    assert not model.second._forward_hooks
    assert not model.second._forward_pre_hooks


def test_an_input_with_overlapping_memory_is_not_written_to() -> None:
    """The probe of a pooling head is one vector, seen as many."""
    model, probe = nn.Linear(3, 3), torch.randn(1, 3)
    before = probe.clone()
    with (
        torch.inference_mode(),
        listening(model, [":input"], lambda point, value: torch.zeros(4, 3)),
    ):
        assert torch.equal(model(probe.expand(4, 3)), model.bias.expand(4, 3))
    assert torch.equal(probe, before)


def test_inputs_given_by_name_and_results_that_are_tuples() -> None:
    class Named(nn.Module):
        def forward(self, *, hidden_states: Tensor) -> tuple[Tensor, None]:
            return hidden_states * 2, None

    model = Named()
    with torch.inference_mode(), listening(model, [":input", ""], lambda point, value: value + 1):
        assert torch.equal(model(hidden_states=torch.ones(2))[0], torch.tensor([5.0, 5.0]))


def test_calls_one_after_the_other_count_as_one() -> None:
    model = nn.Linear(3, 3)
    x = torch.randn(4, 3)
    seen = record(model, [""], lambda: {"output": torch.cat([model(part) for part in x.chunk(4)])})
    assert torch.equal(seen.taps[""], seen.outputs["output"])


def test_inside_an_attention_module() -> None:
    attention = nn.MultiheadAttention(12, 3, batch_first=True).double().eval()
    query, tokens = torch.randn(2, 1, 12).double(), torch.randn(2, 5, 12).double()
    inside = inside_attention(attention, {"query": query, "key": tokens, "value": tokens})
    expected = attention(query, tokens, tokens)[0]
    torch.testing.assert_close(
        attention.out_proj(inside["context"]), expected, rtol=1e-12, atol=1e-12
    )
    points = [":q", ":k", ":v", ":context"]
    seen = record(attention, points, lambda: {"output": attention(query, tokens, value=tokens)[0]})
    assert all(torch.equal(seen.taps[f":{name}"], tensor) for name, tensor in inside.items())


@pytest.mark.parametrize(
    ("taps", "sentence"),
    [
        (
            {"firsst": "first"},
            "the reference has no module 'firsst', which the tap 'firsst': 'first' names",
        ),
        ({"first": "third"}, "the port has no module 'third'"),
        ({"first:output": "first:inputs"}, "after the colon comes input, q, k, v or context"),
        ({"first:q": "first"}, "only an nn.MultiheadAttention has :q; tap the projection itself"),
        ({"layers.{}": "first"}, r"the reference has no module 'layers.\{\}'"),
    ],
)
def test_points_that_are_none(taps: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        expand(taps, Two(), Two())


def test_a_hook_of_a_whole_tower() -> None:
    port = SigLipVisionModel(ODD).eval()
    taps = expand({ours: ours for ours in siglip_taps(True).values()}, port, port)
    seen = record(port, [tap.port for tap in taps], lambda: {"output": port.embed(pixels(ODD))})
    assert len(seen.taps) == len(taps) == 15 * ODD.num_encoder_blocks + 4 + 11

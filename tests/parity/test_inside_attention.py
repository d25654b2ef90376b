from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from siglip_port.parity import randomize
from siglip_port.parity.inside_attention import inside_attention, unsupported_attention
from siglip_port.parity.taps import expand, record
from tests.parity.toy_models import double_noise

WIDTH = 12
HEADS = 3
QUERIES = 4
TOKENS = 5


def make_attention(**options: Any) -> nn.MultiheadAttention:  # noqa: ANN401 (of any type)
    """Attention in float64 with random weights."""
    attention = nn.MultiheadAttention(WIDTH, HEADS, **options).double().eval()
    randomize(attention)
    return attention


def output_of_context(attention: nn.MultiheadAttention, arguments: dict[str, Any]) -> Tensor:
    """Output of an attention module, [B, N, D], from its recomputed context."""
    output: Tensor = attention.out_proj(inside_attention(attention, arguments)["context"])
    return output


def check_inside(attention: nn.MultiheadAttention, arguments: dict[str, Any]) -> None:
    """Check the recomputed context against the module's own output."""
    expected = attention(**arguments, need_weights=False)[0]
    if not attention.batch_first:
        expected = expected.transpose(0, 1)
    output = output_of_context(attention, arguments)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


def batch_first_inputs() -> dict[str, Any]:
    """Queries [2, 4, 12], keys and values [2, 5, 12]."""
    tokens = double_noise(2, TOKENS, WIDTH, seed=1)
    return {"query": double_noise(2, QUERIES, WIDTH), "key": tokens, "value": tokens * 2}


PADDING = torch.tensor([[False, False, False, True, True], [False, True, False, False, False]])
MASKS: dict[str, dict[str, Tensor]] = {
    "no mask": {},
    "padding": {"key_padding_mask": PADDING},
    "float padding": {"key_padding_mask": PADDING.double() * -2.5},
    "attention": {"attn_mask": torch.ones(QUERIES, TOKENS, dtype=torch.bool).triu(1)},
    "float attention": {"attn_mask": double_noise(QUERIES, TOKENS, seed=2)},
    "attention per head": {"attn_mask": double_noise(2 * HEADS, QUERIES, TOKENS, seed=3)},
    "both": {
        "key_padding_mask": PADDING.double() * -2.5,
        "attn_mask": double_noise(QUERIES, TOKENS, seed=4),
    },
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    attention = make_attention(batch_first=True)
    check_inside(attention, batch_first_inputs() | MASKS[name])


def test_mask_per_head_in_order_of_reference() -> None:
    """Siglip2's head repeats the mask of an image for every head and query."""
    attention = make_attention(batch_first=True)
    mask = PADDING[:, None, None].repeat(1, HEADS, QUERIES, 1).reshape(-1, QUERIES, TOKENS)
    inputs = batch_first_inputs()
    padded = output_of_context(attention, inputs | {"attn_mask": mask})
    expected = output_of_context(attention, inputs | {"key_padding_mask": PADDING})
    assert torch.equal(padded, expected)
    assert not torch.equal(padded, output_of_context(attention, inputs))


def test_tokens_first() -> None:
    attention = make_attention(batch_first=False)
    inputs = {name: x.transpose(0, 1) for name, x in batch_first_inputs().items()}
    check_inside(attention, inputs | MASKS["padding"])


def test_single_example_without_batch() -> None:
    attention = make_attention(batch_first=True)
    inputs = {name: x[0] for name, x in batch_first_inputs().items()}
    arguments = inputs | {"key_padding_mask": PADDING[0]}
    expected = attention(**arguments)[0]
    output = output_of_context(attention, arguments)
    torch.testing.assert_close(output, expected[None], rtol=1e-12, atol=1e-12)


def test_without_bias() -> None:
    check_inside(make_attention(batch_first=True, bias=False), batch_first_inputs())


def test_keys_and_values_of_other_widths() -> None:
    attention = make_attention(batch_first=True, kdim=7, vdim=9)
    inputs = batch_first_inputs()
    inputs["key"] = double_noise(2, TOKENS, 7)
    inputs["value"] = double_noise(2, TOKENS, 9)
    check_inside(attention, inputs | MASKS["padding"])


def test_all_points_are_recorded_with_masks_by_position() -> None:
    attention = make_attention(batch_first=True)
    inputs = batch_first_inputs()
    arguments = (*inputs.values(), PADDING)

    def run() -> dict[str, Tensor]:
        return {"output": attention(*arguments)[0]}

    recording = record(attention, [":q", ":k", ":v", ":context"], run)
    expected = inside_attention(attention, inputs | {"key_padding_mask": PADDING})
    assert recording.taps.keys() == {f":{name}" for name in expected}
    for name, tensor in expected.items():
        assert torch.equal(recording.taps[f":{name}"], tensor), name


@pytest.mark.parametrize(
    ("options", "extras"),
    [
        ({"add_bias_kv": True}, "add_bias_kv"),
        ({"add_zero_attn": True}, "add_zero_attn"),
        ({"add_bias_kv": True, "add_zero_attn": True}, "add_bias_kv and add_zero_attn"),
    ],
)
def test_extra_keys_are_refused(options: dict[str, bool], extras: str) -> None:
    attention = make_attention(**options)
    assert unsupported_attention(attention).endswith(f"without {extras}")
    message = f"':q': :q needs an nn.MultiheadAttention without {extras}; tap the projection"
    with pytest.raises(ValueError, match=message):
        expand({":q": ""}, attention, attention)

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from siglip_port.parity import randomize
from siglip_port.parity.hints.attention import attention_guesses, projection_guesses
from siglip_port.parity.hints.guess import first_match
from tests.parity.toy_models import double_noise

HEADS = 3
Q, K, V = (double_noise(2, 4, 12, seed=seed) for seed in range(3))


def attend(scale: float | None = None, heads: int = HEADS, mask: Tensor | None = None) -> Tensor:
    """Compute attention with torch's own function."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (Q, K, V))
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return context.transpose(1, 2).flatten(2)


def mask_key(index: int) -> Tensor:
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[:, index] = False
    return mask


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (attend(scale=1.0), "attention scores not scaled by 1/sqrt(head_dim)"),
        (
            attend(scale=12**-0.5),
            "attention scaled by 1/sqrt(embed_dim) instead of 1/sqrt(head_dim)",
        ),
        (
            attend(scale=HEADS**-0.5),
            "attention scaled by 1/sqrt(num_heads) instead of 1/sqrt(head_dim)",
        ),
        (attend(scale=1 / 4), "attention scaled twice by 1/sqrt(head_dim)"),
        (attend(scale=2.0), "attention scaled by sqrt(head_dim) instead of its inverse"),
        (attend(scale=16**-0.5), "attention scaled twice by 1/sqrt(head_dim)"),  # head_dim is 4
        (attend(scale=32**-0.5), "attention scaled by 1/sqrt(32), the padded head_dim"),
        (attend(mask=torch.ones(4, 4, dtype=torch.bool).tril()), "causal mask"),
        (attend(mask=mask_key(-1)), "last key masked"),
        (attend(mask=mask_key(0)), "first key masked"),
        (attend(heads=2), "2 heads instead of 3"),
        (V.mean(1, keepdim=True).expand_as(V), "uniform attention"),
        (attend() * 2, ""),
    ],
)
def test_context(value: Tensor, hint: str) -> None:
    assert first_match(attention_guesses(Q, K, V, HEADS), value, attend()) == hint


def test_context_of_swapped_heads() -> None:
    q, k, v = (x.unflatten(-1, (-1, HEADS)).permute(0, 3, 1, 2) for x in (Q, K, V))
    context = (q @ k.mT / math.sqrt(4)).softmax(-1) @ v
    merged = context.transpose(1, 2).flatten(2)
    guesses = list(attention_guesses(Q, K, V, HEADS))
    swapped = "[head_dim, heads] instead of [heads, head_dim]"
    assert first_match(guesses, merged, attend()) == f"heads split as {swapped}"
    permuted = context.permute(0, 2, 3, 1).flatten(2)
    assert first_match(guesses, permuted, attend()) == f"heads split and merged as {swapped}"


def test_no_hint_if_heads_do_not_divide_width() -> None:
    assert not list(attention_guesses(Q, K, V, 5))


def test_projections() -> None:
    attention = nn.MultiheadAttention(12, HEADS, batch_first=True).double()
    randomize(attention)
    assert attention.in_proj_weight is not None
    q_weight, k_weight, _ = attention.in_proj_weight.chunk(3)
    q_bias, k_bias, _ = attention.in_proj_bias.chunk(3)

    def hint(value: Tensor) -> str:
        exact = F.linear(Q, q_weight, q_bias)
        return first_match(projection_guesses(attention, "q", Q), value, exact)

    with torch.no_grad():
        assert hint(F.linear(Q, k_weight, k_bias)) == "weight and bias of k"
        assert hint(F.linear(Q, q_weight, k_bias)) == "bias of k"
        assert hint(F.linear(Q, q_weight)) == "Linear without bias"
        interleaved = F.linear(Q, attention.in_proj_weight[::3], attention.in_proj_bias[::3])
        assert hint(interleaved) == "fused qkv weight read as interleaved"

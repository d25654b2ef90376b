"""A port of BERT: token ids, padding, token types, post-norm blocks."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from siglip_port.parity import Comparison, compare, randomize
from tests.parity.ports.common import (
    MLP,
    Attention,
    Bug,
    assert_first,
    change,
    first_finding,
    in_float32,
    load,
    suitable,
)

CONFIG = BertConfig(
    vocab_size=50,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=16,
    attn_implementation="sdpa",
)


class Block(nn.Module):
    """Post-norm transformer block."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.attention = Attention(24, 3, fused=fused)
        self.norm1 = nn.LayerNorm(24, eps=1e-12)
        self.mlp = MLP(24, 40, F.gelu)
        self.norm2 = nn.LayerNorm(24, eps=1e-12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x, mask))
        output: Tensor = self.norm2(x + self.mlp(x))
        return output


class Bert(nn.Module):
    """BERT: token ids [B, N] -> tokens [B, N, D] and the pooled first token [B, D]."""

    def __init__(self, *, fused: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 24)
        self.positions = nn.Embedding(16, 24)
        self.types = nn.Embedding(2, 24)
        self.norm = nn.LayerNorm(24, eps=1e-12)
        self.blocks = nn.ModuleList(Block(fused=fused) for _ in range(2))
        self.pooler = nn.Linear(24, 24)
        self.masked_score = -math.inf

    def forward(self, ids: Tensor, attention_mask: Tensor, types: Tensor) -> tuple[Tensor, Tensor]:
        positions = self.positions.weight[: ids.shape[1]]
        x = self.norm(self.words(ids) + self.types(types) + positions)
        mask = torch.zeros_like(attention_mask, dtype=x.dtype)
        mask = mask.masked_fill(attention_mask == 0, self.masked_score)[:, None, None]
        for block in self.blocks:
            x = block(x, mask)
        return x, torch.tanh(self.pooler(x[:, 0]))


RENAMES = {
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "types",
    "embeddings.LayerNorm": "norm",
    "encoder.layer": "blocks",
    "attention.self.query": "attention.q",
    "attention.self.key": "attention.k",
    "attention.self.value": "attention.v",
    "attention.output.dense": "attention.out",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "output.LayerNorm": "norm2",
    "pooler.dense": "pooler",
}
BLOCK = "encoder.layer.{}"
TAPS = {
    "embeddings.LayerNorm:input": "norm:input",
    "embeddings.LayerNorm": "norm",
    f"{BLOCK}.attention.self.query": "blocks.{}.attention.q",
    f"{BLOCK}.attention.self.key": "blocks.{}.attention.k",
    f"{BLOCK}.attention.self.value": "blocks.{}.attention.v",
    f"{BLOCK}.attention.output.dense:input": "blocks.{}.attention.out:input",
    f"{BLOCK}.attention.output.dense": "blocks.{}.attention",
    f"{BLOCK}.attention.output.LayerNorm": "blocks.{}.norm1",
    f"{BLOCK}.intermediate.dense": "blocks.{}.mlp.fc1",
    f"{BLOCK}.output.dense:input": "blocks.{}.mlp.fc2:input",
    f"{BLOCK}.output.dense": "blocks.{}.mlp",
    f"{BLOCK}.output.LayerNorm": "blocks.{}.norm2",
}


@functools.cache
def reference() -> BertModel:
    model = BertModel(CONFIG).eval()
    randomize(model)
    return model


def make_port(*, fused: bool = False) -> Bert:
    port = Bert(fused=fused).eval()
    load(port, reference(), RENAMES)
    return port


def token_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and types of two sentences, [2, 7]; the second has padding."""
    ids = torch.tensor([[3, 11, 7, 49, 20, 8, 5], [3, 25, 41, 5, 0, 0, 0]])
    types = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0, 0]])
    return ids, (ids != 0).long(), types


def check(port: nn.Module, taps: dict[str, str] | None = None) -> Comparison:
    def call_reference(
        model: BertModel, inputs: tuple[Tensor, Tensor, Tensor]
    ) -> dict[str, Tensor]:
        ids, mask, types = inputs
        outputs = model(input_ids=ids, attention_mask=mask, token_type_ids=types)
        return {"tokens": outputs.last_hidden_state, "pooled": outputs.pooler_output}

    def call_port(port: Bert, inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        tokens, pooled = port(*inputs)
        return {"tokens": tokens, "pooled": pooled}

    return compare(
        reference(),
        port,
        token_inputs(),
        suitable(TAPS if taps is None else taps, port),
        call_reference=call_reference,
        call_port=call_port,
    )


@pytest.mark.parametrize("fused", [False, True])
def test_equal(fused: bool) -> None:
    comparison = check(make_port(fused=fused))
    assert comparison.equal, comparison


def test_float32_inside_is_equal() -> None:
    port = make_port()
    in_float32(port.get_submodule("blocks.0.mlp.fc1"))
    comparison = check(port)
    assert comparison.equal, comparison


def eps(port: Bert) -> None:
    change(port, "blocks.1.norm1", eps=1e-5)


def tanh_gelu(port: Bert) -> None:
    change(port, "blocks.0.mlp", activation=functools.partial(F.gelu, approximate="tanh"))


def soft_mask(port: Bert) -> None:
    port.masked_score = -1.0


def scale(port: Bert) -> None:
    change(port, "blocks.0.attention", scale=24**-0.5)


def positions_shifted(port: Bert) -> None:
    port.positions.weight.data = port.positions.weight.data.roll(1, 0)


def types_ignored(port: Bert) -> None:
    port.types.register_forward_hook(lambda _, args, output: output[:, :1].expand_as(output))


def mask_ignored(port: Bert) -> None:
    port.masked_score = 0.0


@pytest.mark.parametrize(
    ("bug", "place", "hint"),
    [
        (eps, "encoder.layer.1.attention.output.LayerNorm", "eps 1e-05 instead of 1e-12"),
        (tanh_gelu, "encoder.layer.0.output.dense:input", "tanh GELU instead of exact (erf) GELU"),
        (soft_mask, "encoder.layer.0.attention.output.dense:input", ""),
        (mask_ignored, "encoder.layer.0.attention.output.dense:input", "mask not applied"),
        (
            scale,
            "encoder.layer.0.attention.output.dense:input",
            "",
        ),
        (positions_shifted, "embeddings.LayerNorm:input", ""),
        (types_ignored, "embeddings.LayerNorm:input", ""),
    ],
)
def test_bugs(bug: Bug, place: str, hint: str) -> None:
    port = make_port()
    bug(port)
    assert_first(check(port), place, hint)


def test_types_without_taps() -> None:
    port = make_port()
    types_ignored(port)
    comparison = check(port, {})
    assert "other values of integer input 2" in str(comparison)
    assert first_finding(comparison).reference == "tokens"

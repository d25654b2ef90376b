"""Mistakes that ports of this model have had, or close variants, each made in one place of ours. See docs/parity.md."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F  # noqa: N812
from torch import nn

from siglip_port import MLP, EncoderBlock, SigLipVisionModel

Fault = Callable[[SigLipVisionModel], object]


def block(model: SigLipVisionModel, i: int = 5) -> EncoderBlock:
    found = model.transformer.encoder.encoder_blocks[i]
    assert isinstance(found, EncoderBlock)
    return found


def swap(first: nn.Linear, second: nn.Linear) -> None:
    first.weight.data, second.weight.data = second.weight.data, first.weight.data
    first.bias.data, second.bias.data = second.bias.data, first.bias.data


def exact_gelu(model: SigLipVisionModel) -> None:
    """exact GELU for tanh GELU."""
    for module in model.modules():
        if isinstance(module, MLP):
            module.activation = F.gelu


def exact_gelu_in_the_head(model: SigLipVisionModel) -> None:
    """exact GELU, in the pooling head only."""
    assert model.pooling_head is not None
    model.pooling_head.mlp.activation = F.gelu


def eps_1e5(model: SigLipVisionModel) -> None:
    """LayerNorm eps 1e-5 for 1e-6."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5


def eps_1e5_once(model: SigLipVisionModel) -> None:
    """LayerNorm eps 1e-5, in one layer only."""
    block(model).layer_norm2.eps = 1e-5


def keys_and_values_swapped(model: SigLipVisionModel) -> None:
    """keys and values swapped, in one block."""
    swap(block(model).self_attn.k_proj, block(model).self_attn.v_proj)


def head_queries_and_keys_swapped(model: SigLipVisionModel) -> None:
    """queries and keys of the head swapped."""
    assert model.pooling_head is not None
    swap(model.pooling_head.attention.q_proj, model.pooling_head.attention.k_proj)


def norms_swapped(model: SigLipVisionModel) -> None:
    """the two LayerNorms of a block swapped."""
    norms = block(model)
    norms.layer_norm1, norms.layer_norm2 = norms.layer_norm2, norms.layer_norm1


def probe_zero(model: SigLipVisionModel) -> None:
    """pooling probe not loaded (zero)."""
    assert model.pooling_head is not None
    model.pooling_head.probe.data.zero_()


def positions_off_by_one(model: SigLipVisionModel) -> None:
    """position embeddings off by one."""
    table = model.transformer.embeddings.position_embedding.weight
    table.data = table.data.roll(1, dims=0)


def positions_transposed(model: SigLipVisionModel) -> None:
    """position grid transposed (x for y)."""
    table, n = model.transformer.embeddings.position_embedding.weight, model.config.grid_size
    table.data = table.data.reshape(n, n, -1).transpose(0, 1).flatten(0, 1)


def blocks_in_text_order(model: SigLipVisionModel) -> None:
    """blocks in text order (0, 1, 10, 2, ...)."""
    blocks = list(model.transformer.encoder.encoder_blocks)
    order = sorted(range(len(blocks)), key=str)
    model.transformer.encoder.encoder_blocks = nn.ModuleList(blocks[i] for i in order)


def last_block_skipped(model: SigLipVisionModel) -> None:
    """last block skipped."""
    block(model, -1).register_forward_hook(lambda _, inputs, output: inputs[0])


def post_layernorm_twice(model: SigLipVisionModel) -> None:
    """last LayerNorm applied twice."""
    norm = model.transformer.post_layernorm
    norm.register_forward_hook(
        lambda _, inputs, output: F.layer_norm(output, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    )


def residual_around_the_heads_attention(model: SigLipVisionModel) -> None:
    """residual around the head's attention."""
    assert model.pooling_head is not None
    model.pooling_head.attention.register_forward_hook(
        lambda _, inputs, query, output: output + query["query"], with_kwargs=True
    )


def pooled_half(model: SigLipVisionModel) -> None:
    """pooled vector half as long."""
    assert model.pooling_head is not None
    model.pooling_head.register_forward_hook(lambda _, inputs, output: output / 2)


def channels_reversed(model: SigLipVisionModel) -> None:
    """BGR for RGB."""
    weight = model.transformer.embeddings.patch_embedding.weight
    weight.data = weight.data.flip(1)


def one_bias_not_loaded(model: SigLipVisionModel) -> None:
    """one bias not loaded."""
    block(model).mlp.fc1.bias.data.zero_()


def one_element_corrupted(model: SigLipVisionModel) -> None:
    """one element of one weight corrupted."""
    block(model).mlp.fc2.weight.data[3, 3] += 1e-3


FAULTS: list[Fault] = [
    exact_gelu,
    exact_gelu_in_the_head,
    eps_1e5,
    eps_1e5_once,
    keys_and_values_swapped,
    head_queries_and_keys_swapped,
    norms_swapped,
    probe_zero,
    positions_off_by_one,
    positions_transposed,
    blocks_in_text_order,
    last_block_skipped,
    post_layernorm_twice,
    residual_around_the_heads_attention,
    pooled_half,
    channels_reversed,
    one_bias_not_loaded,
    one_element_corrupted,
]

"""Seams: steps of the port's computation that can be replaced. Each function returns a patch.

A replacement is called with the module and the inputs of its step, without training options. It
needs no masks: it gets keys without padding, and modules that pass the mask on. Replacements of
steps before the blocks apply to whole images only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from scripts.selftest.mutant import Patch, replace, replace_item
from siglip_port import model
from siglip_port.model import (
    MLP,
    EncoderBlock,
    LayerNorm,
    MultiheadAttention,
    PoolingHead,
    SigLipEncoder,
    SigLipVisionModel,
    SigLipVisionTransformer,
    VisionEmbeddings,
)
from siglip_port.patches import Shapes, key_mask

Projection = Callable[[MultiheadAttention, Tensor], Tensor]


class Masked:
    """Block or pooling head that passes a mask on to its attention.

    Args:
        module: Block or pooling head.
        mask: Mask of its input, [B, 1, 1, N], or None.
    """

    def __init__(self, module: nn.Module, mask: Tensor | None) -> None:
        self.module = module
        self.mask = mask

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        """Return an attribute of the module; attention with the mask."""
        attribute = getattr(self.module, name)
        if name in ("self_attn", "attention"):
            return functools.partial(attribute, mask=self.mask)
        return attribute

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Run the module with the mask."""
        return self.module(hidden_states, self.mask)


def activation(function: Callable[[Tensor], Tensor]) -> Patch:
    """Replace tanh GELU."""
    return replace_item(model.ACTIVATIONS, "gelu_pytorch_tanh", function)


def layer_norm(function: Callable[[LayerNorm, Tensor], Tensor]) -> Patch:
    """Replace all LayerNorms."""
    return replace(LayerNorm, "forward", function)


def mlp(function: Callable[[MLP, Tensor], Tensor]) -> Patch:
    """Replace all MLPs."""
    return replace(MLP, "forward", function)


# --- attention ------------------------------------------------------------------------------------


def attend(function: Callable[[MultiheadAttention, Tensor, Tensor, Tensor], Tensor]) -> Patch:
    """Replace attention: q, k, v -> context, all [B, H, N, D/H]."""

    def attend(
        attention: MultiheadAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        if mask is None:
            return function(attention, q, k, v)
        contexts = []
        for i, is_patch in enumerate(mask[:, 0, 0]):
            keys, values = k[i : i + 1, :, is_patch], v[i : i + 1, :, is_patch]
            contexts.append(function(attention, q[i : i + 1], keys, values))
        return torch.cat(contexts)

    return replace(MultiheadAttention, "attend", attend)


def projections(
    *,
    q: Projection = lambda attention, x: attention.q_proj(x),
    k: Projection = lambda attention, x: attention.k_proj(x),
    v: Projection = lambda attention, x: attention.v_proj(x),
    out: Projection = lambda attention, x: attention.out_proj(x),
) -> Patch:
    """Replace the projections of queries, tokens and merged contexts."""

    def forward(
        attention: MultiheadAttention,
        hidden_states: Tensor,
        query: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        if query is None:
            query = hidden_states
        queries = attention.split_heads(q(attention, query))
        keys = attention.split_heads(k(attention, hidden_states))
        values = attention.split_heads(v(attention, hidden_states))
        context = attention.attend(queries, keys, values, mask)
        return out(attention, attention.merge_heads(context))

    return replace(MultiheadAttention, "forward", forward)


# --- embeddings -----------------------------------------------------------------------------------


def convolve(embeddings: VisionEmbeddings, pixel_values: Tensor) -> Tensor:
    """Return the patch embedding of whole images: [B, C, S, S] -> [B, D, h, w]."""
    convolution = embeddings.patch_embedding
    return convolution(pixel_values.to(convolution.weight.dtype))


def patch_grid(function: Callable[[VisionEmbeddings, Tensor], Tensor]) -> Patch:
    """Replace the patch embedding: [B, C, S, S] -> [B, D, h, w]."""

    def forward(
        embeddings: VisionEmbeddings, pixel_values: Tensor, spatial_shapes: Shapes = None
    ) -> Tensor:
        if spatial_shapes is not None:
            return embeddings.embed_packed(pixel_values, spatial_shapes)
        grid = function(embeddings, pixel_values)
        height, width = grid.shape[2:]
        return grid.flatten(2).transpose(1, 2) + embeddings.positions(height, width)

    return replace(VisionEmbeddings, "forward", forward)


def tokens_of_grid(function: Callable[[VisionEmbeddings, Tensor, Tensor], Tensor]) -> Patch:
    """Replace the step from grid [B, D, h, w] and positions [N, D] to tokens."""

    def forward(
        embeddings: VisionEmbeddings, pixel_values: Tensor, spatial_shapes: Shapes = None
    ) -> Tensor:
        if spatial_shapes is not None:
            return embeddings.embed_packed(pixel_values, spatial_shapes)
        grid = convolve(embeddings, pixel_values)
        return function(embeddings, grid, embeddings.positions(*grid.shape[2:]))

    return replace(VisionEmbeddings, "forward", forward)


# --- blocks, encoder, model -----------------------------------------------------------------------


def add_attention(block: EncoderBlock, x: Tensor) -> Tensor:
    """Run the first half of a block."""
    return x + block.self_attn(block.layer_norm1(x))


def add_mlp(block: EncoderBlock, x: Tensor) -> Tensor:
    """Run the second half of a block."""
    return x + block.mlp(block.layer_norm2(x))


def block(
    first: Callable[[EncoderBlock, Tensor], Tensor] = add_attention,
    second: Callable[[EncoderBlock, Tensor], Tensor] = add_mlp,
) -> Patch:
    """Replace a half of all blocks, or both."""

    def forward(block: EncoderBlock, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        masked: Any = Masked(block, mask)
        return second(masked, first(masked, hidden_states))

    return replace(EncoderBlock, "forward", forward)


def run_blocks(function: Callable[[SigLipEncoder, Tensor], Tensor]) -> Patch:
    """Replace the loop over all blocks, without a mask."""
    run_all = SigLipEncoder.forward

    def forward(
        encoder: SigLipEncoder, hidden_states: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        if mask is not None:
            return run_all(encoder, hidden_states, mask)
        return function(encoder, hidden_states)

    return replace(SigLipEncoder, "forward", forward)


def encode(function: Callable[[SigLipVisionTransformer, Tensor], Tensor]) -> Patch:
    """Replace the encoder: embeddings -> final tokens."""
    encode_packed = SigLipVisionTransformer.forward

    def forward(
        transformer: SigLipVisionTransformer,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Shapes = None,
    ) -> Tensor:
        if spatial_shapes is not None:
            return encode_packed(transformer, pixel_values, pixel_attention_mask, spatial_shapes)
        return function(transformer, transformer.embeddings(pixel_values))

    return replace(SigLipVisionTransformer, "forward", forward)


def call(function: Callable[[SigLipVisionModel, Tensor], Tensor]) -> Patch:
    """Replace the model's `forward`."""
    call_packed = SigLipVisionModel.forward

    def forward(
        model: SigLipVisionModel,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Shapes = None,
    ) -> Tensor:
        if spatial_shapes is not None:
            return call_packed(model, pixel_values, pixel_attention_mask, spatial_shapes)
        return function(model, pixel_values)

    return replace(SigLipVisionModel, "forward", forward)


# --- pooling --------------------------------------------------------------------------------------


def attend_from_probe(head: PoolingHead, tokens: Tensor) -> Tensor:
    """Run the first half of the pooling head, [B, N, D] -> [B, 1, D]."""
    return head.attention(tokens, query=head.probe.expand(tokens.shape[0], -1, -1))


def add_head_mlp(head: PoolingHead, pooled: Tensor) -> Tensor:
    """Run the second half of the pooling head, [B, 1, D] -> [B, 1, D]."""
    return pooled + head.mlp(head.layernorm(pooled))


def squeeze(head: PoolingHead, pooled: Tensor) -> Tensor:
    """[B, 1, D] -> [B, D]."""
    return pooled.squeeze(1)


def pooling_head(
    first: Callable[[PoolingHead, Tensor], Tensor] = attend_from_probe,
    second: Callable[[PoolingHead, Tensor], Tensor] = add_head_mlp,
    last: Callable[[PoolingHead, Tensor], Tensor] = squeeze,
) -> Patch:
    """Replace a part of the pooling head."""

    def forward(head: PoolingHead, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        masked: Any = Masked(head, mask)
        return last(masked, second(masked, first(masked, tokens)))

    return replace(PoolingHead, "forward", forward)


def pool(function: Callable[[Any, Tensor], Tensor]) -> Patch:
    """Replace `pool` of models with a head: (pooling head, tokens) -> pooled."""
    pool_by_mean = SigLipVisionModel.pool

    def pool(
        model: SigLipVisionModel, tokens: Tensor, pixel_attention_mask: Tensor | None = None
    ) -> Tensor:
        if model.pooling_head is None:
            return pool_by_mean(model, tokens, pixel_attention_mask)
        masked: Any = Masked(model.pooling_head, key_mask(tokens, pixel_attention_mask))
        return function(masked, tokens)

    return replace(SigLipVisionModel, "pool", pool)


def embed(function: Callable[[SigLipVisionModel, Tensor, bool], Tensor]) -> Patch:
    """Replace `embed`: (model, tokens, normalize) -> embeddings."""
    embed_packed = SigLipVisionModel.embed

    def embed(
        model: SigLipVisionModel,
        pixel_values: Tensor,
        normalize: bool = False,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Shapes = None,
    ) -> Tensor:
        if spatial_shapes is not None:
            return embed_packed(
                model, pixel_values, normalize, pixel_attention_mask, spatial_shapes
            )
        return function(model, model(pixel_values), normalize)

    return replace(SigLipVisionModel, "embed", embed)

"""Seams: steps of the port's computation that can be replaced. Each function returns a patch.

A replacement is called with the module and the inputs of its step, without masks, which whole
images do not have, and without training options.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

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

Projection = Callable[[MultiheadAttention, Tensor], Tensor]


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
        attention: MultiheadAttention, q: Tensor, k: Tensor, v: Tensor, mask: object
    ) -> Tensor:
        return function(attention, q, k, v)

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
        embeddings: VisionEmbeddings, pixel_values: Tensor, spatial_shapes: object = None
    ) -> Tensor:
        grid = function(embeddings, pixel_values)
        height, width = grid.shape[2:]
        return grid.flatten(2).transpose(1, 2) + embeddings.positions(height, width)

    return replace(VisionEmbeddings, "forward", forward)


def tokens_of_grid(function: Callable[[VisionEmbeddings, Tensor, Tensor], Tensor]) -> Patch:
    """Replace the step from grid [B, D, h, w] and positions [N, D] to tokens."""

    def forward(
        embeddings: VisionEmbeddings, pixel_values: Tensor, spatial_shapes: object = None
    ) -> Tensor:
        grid = convolve(embeddings, pixel_values)
        return function(embeddings, grid, embeddings.position_embedding.weight)

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

    def forward(block: EncoderBlock, hidden_states: Tensor, mask: object = None) -> Tensor:
        return second(block, first(block, hidden_states))

    return replace(EncoderBlock, "forward", forward)


def run_blocks(function: Callable[[SigLipEncoder, Tensor], Tensor]) -> Patch:
    """Replace the loop over all blocks."""

    def forward(encoder: SigLipEncoder, hidden_states: Tensor, mask: object = None) -> Tensor:
        return function(encoder, hidden_states)

    return replace(SigLipEncoder, "forward", forward)


def encode(function: Callable[[SigLipVisionTransformer, Tensor], Tensor]) -> Patch:
    """Replace the encoder: embeddings -> final tokens."""

    def forward(
        transformer: SigLipVisionTransformer,
        pixel_values: Tensor,
        pixel_attention_mask: object = None,
        spatial_shapes: object = None,
    ) -> Tensor:
        return function(transformer, transformer.embeddings(pixel_values))

    return replace(SigLipVisionTransformer, "forward", forward)


def call(function: Callable[[SigLipVisionModel, Tensor], Tensor]) -> Patch:
    """Replace the model's `forward`."""

    def forward(
        model: SigLipVisionModel,
        pixel_values: Tensor,
        pixel_attention_mask: object = None,
        spatial_shapes: object = None,
    ) -> Tensor:
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

    def forward(head: PoolingHead, tokens: Tensor, mask: object = None) -> Tensor:
        return last(head, second(head, first(head, tokens)))

    return replace(PoolingHead, "forward", forward)


def pool(function: Callable[[PoolingHead, Tensor], Tensor]) -> Patch:
    """Replace `pool`: (pooling head, tokens) -> pooled."""

    def pool(
        model: SigLipVisionModel, tokens: Tensor, pixel_attention_mask: object = None
    ) -> Tensor:
        assert model.pooling_head is not None
        return function(model.pooling_head, tokens)

    return replace(SigLipVisionModel, "pool", pool)


def embed(function: Callable[[SigLipVisionModel, Tensor, bool], Tensor]) -> Patch:
    """Replace `embed`: (model, tokens, normalize) -> embeddings."""

    def embed(
        model: SigLipVisionModel,
        pixel_values: Tensor,
        normalize: bool = False,
        pixel_attention_mask: object = None,
        spatial_shapes: object = None,
    ) -> Tensor:
        return function(model, model(pixel_values), normalize)

    return replace(SigLipVisionModel, "embed", embed)

"""Equivalent variants: other ways to compute the same result, which no gate may detect."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 (the name the field uses)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scripts.selftest.catalog import seams
from scripts.selftest.catalog.attention import scale_of, scores_of
from scripts.selftest.mutant import Edit, Mutant, Patch, replace
from siglip_port import SigLipVisionModel
from siglip_port.model import EncoderBlock, LayerNorm, MultiheadAttention, VisionEmbeddings


def equivalent(
    name: str, description: str, patch: Patch | None = None, edit: Edit | None = None
) -> Mutant:
    """Build an equivalent variant."""
    return Mutant(name, description, gate="", patch=patch, edit=edit, is_equivalent=True)


def attend(
    name: str,
    description: str,
    function: Callable[[MultiheadAttention, Tensor, Tensor, Tensor], Tensor],
) -> Mutant:
    """Build a variant with another computation of the context."""
    return equivalent(name, description, seams.attend(function))


def widen(tensor: Tensor) -> Tensor:
    """Cast bfloat16 and float16 tensors to float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def attend_with(attention: MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute the context as the port does."""
    return F.scaled_dot_product_attention(q, k, v, scale=scale_of(attention))


def softmax_in_float32(attention: MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute the softmax in float32, even for float64."""
    weights = scores_of(attention, q, k).softmax(-1, dtype=torch.float32)
    return weights.to(q.dtype) @ v


def chunk_queries(attention: MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with seven queries at a time."""
    return torch.cat([attend_with(attention, part, k, v) for part in q.split(7, dim=2)], dim=2)


def chunk_heads(attention: MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with one head at a time."""
    heads = zip(q.split(1, 1), k.split(1, 1), v.split(1, 1), strict=True)
    return torch.cat([attend_with(attention, *head) for head in heads], dim=1)


def attend_by_math(attention: MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with torch's math kernel."""
    with sdpa_kernel(SDPBackend.MATH):
        return attend_with(attention, q, k, v)


def shift_scores(attention: MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Subtract the largest score of every query."""
    scores = scores_of(attention, q, k)
    return (scores - scores.amax(-1, keepdim=True)).softmax(-1) @ v


def attend_by_einsum(attention: MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute the products with einsum."""
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k).mul(scale_of(attention))
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


def fuse_projections(
    attention: MultiheadAttention,
    hidden_states: Tensor,
    query: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Project q, k and v in one product, without calling their modules."""
    if query is None:
        query = hidden_states
    weight = torch.cat([attention.k_proj.weight, attention.v_proj.weight])
    bias = torch.cat([attention.k_proj.bias, attention.v_proj.bias])
    q = F.linear(query, attention.q_proj.weight, attention.q_proj.bias)
    k, v = F.linear(hidden_states, weight, bias).chunk(2, -1)
    context = attention.attend(
        attention.split_heads(q), attention.split_heads(k), attention.split_heads(v), mask
    )
    return attention.out_proj(attention.merge_heads(context))


def norm_by_hand(norm: LayerNorm, x: Tensor) -> Tensor:
    """Compute LayerNorm from its definition."""
    wide = widen(x)
    variance = wide.var(-1, correction=0, keepdim=True)
    normalized = (wide - wide.mean(-1, keepdim=True)) * (variance + norm.eps).rsqrt()
    return (normalized * widen(norm.weight) + widen(norm.bias)).to(x.dtype)


def norm_in_float32(norm: LayerNorm, x: Tensor) -> Tensor:
    """Compute LayerNorm in float32, even for float64."""
    weight = norm.weight.float()
    bias = norm.bias.float()
    return F.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps).to(x.dtype)


def norm_by_function(block: EncoderBlock, x: Tensor) -> Tensor:
    """Compute the first LayerNorm of a block without calling the module."""
    norm = block.layer_norm1
    normalized = F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return x + block.self_attn(normalized)


def gelu_by_hand(x: Tensor) -> Tensor:
    """Compute tanh GELU from its definition."""
    wide = widen(x)
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    return (0.5 * wide * (1 + torch.tanh(inner))).to(x.dtype)


def project_by_matrix(embeddings: VisionEmbeddings, pixel_values: Tensor) -> Tensor:
    """Cut patches and project them with a matrix."""
    patch = embeddings.config.patch_size
    rows, columns = (side // patch for side in pixel_values.shape[2:])
    kernel = embeddings.patch_embedding.weight
    whole = pixel_values[..., : rows * patch, : columns * patch].to(kernel.dtype)
    patches = F.unfold(whole, patch, stride=patch).transpose(1, 2)
    tokens = F.linear(patches, kernel.flatten(1), embeddings.patch_embedding.bias)
    return tokens.transpose(1, 2).unflatten(2, (rows, columns))


def add_in_place(block: EncoderBlock, x: Tensor) -> Tensor:
    """Add residuals in place to a copy of the stream."""
    x = x.clone()
    x += block.self_attn(block.layer_norm1(x))
    return x


def add_to_stream_in_place(block: EncoderBlock, x: Tensor) -> Tensor:
    """Add residuals in place to the stream itself."""
    x += block.self_attn(block.layer_norm1(x))
    return x


def run_without_gradients(model: SigLipVisionModel, pixel_values: Tensor) -> Tensor:
    """Run the encoder under `no_grad`."""
    with torch.no_grad():
        return model.transformer(pixel_values)


def read_table_by_ids(embeddings: VisionEmbeddings, grid: Tensor, table: Tensor) -> Tensor:
    """Call the position embedding as a module, for images of the model's own size."""
    if table is embeddings.position_embedding.weight:
        table = embeddings.position_embedding(torch.arange(len(table), device=table.device))
    return grid.flatten(2).transpose(1, 2) + table


def run_mlp_in_chunks(block: EncoderBlock, x: Tensor) -> Tensor:
    """Run the MLP on five tokens at a time."""
    parts = block.layer_norm2(x).split(5, 1)
    return x + torch.cat([block.mlp(part) for part in parts], 1)


EQUIVALENT = [
    equivalent("as_it_is", "unchanged port"),
    attend(
        "eager_attention",
        "attention written out",
        lambda attention, q, k, v: scores_of(attention, q, k).softmax(-1) @ v,
    ),
    attend(
        "float32_softmax",
        "attention written out, softmax always in float32, as in transformers' eager attention",
        softmax_in_float32,
    ),
    attend(
        "upcast_softmax",
        "softmax in float32 at least",
        lambda attention, q, k, v: widen(scores_of(attention, q, k)).softmax(-1).to(q.dtype) @ v,
    ),
    attend(
        "scaled_queries",
        "the scale folded into the queries",
        lambda attention, q, k, v: F.scaled_dot_product_attention(
            q * scale_of(attention), k, v, scale=1.0
        ),
    ),
    attend("chunked_queries", "attention in chunks of seven queries", chunk_queries),
    attend("chunked_heads", "attention head by head", chunk_heads),
    attend("math_attention", "torch's math kernel for attention", attend_by_math),
    attend(
        "permuted_heads",
        "features of every head permuted in queries and keys",
        lambda attention, q, k, v: attend_with(attention, q.flip(-1), k.flip(-1), v),
    ),
    attend("shifted_scores", "a constant added to all scores of a query", shift_scores),
    equivalent(
        "fused_qkv",
        "q, k and v in one matrix product",
        replace(MultiheadAttention, "forward", fuse_projections),
    ),
    attend("einsum", "attention by einsum", attend_by_einsum),
    equivalent(
        "hand_written_ln",
        "LayerNorm written out, in float32 at least",
        seams.layer_norm(norm_by_hand),
    ),
    equivalent(
        "float32_ln",
        "LayerNorm always in float32",
        seams.layer_norm(norm_in_float32),
    ),
    equivalent(
        "functional_ln",
        "LayerNorms not called as modules",
        seams.block(first=norm_by_function),
    ),
    equivalent(
        "hand_written_gelu",
        "tanh GELU written out, in float32 at least",
        seams.activation(gelu_by_hand),
    ),
    equivalent(
        "linear_patches",
        "patches projected by a Linear",
        seams.patch_grid(project_by_matrix),
    ),
    equivalent(
        "one_by_one",
        "images one by one",
        seams.call(
            lambda model, pixel_values: torch.cat(
                [model.transformer(image) for image in pixel_values.split(1)]
            )
        ),
    ),
    equivalent(
        "sum_reversed",
        "residuals added in the other order",
        seams.block(first=lambda block, x: block.self_attn(block.layer_norm1(x)) + x),
    ),
    equivalent("in_place", "residuals added in place", seams.block(first=add_in_place)),
    equivalent(
        "in_place_stream",
        "residual stream updated in place",
        seams.block(first=add_to_stream_in_place),
    ),
    equivalent("no_grad", "forward under no_grad", seams.call(run_without_gradients)),
    equivalent(
        "channels_last",
        "channels_last memory format",
        edit=lambda model: model.to(memory_format=torch.channels_last),
    ),
    equivalent(
        "contiguous_tokens",
        "tokens copied",
        seams.tokens_of_grid(
            lambda embeddings, grid, table: (grid.flatten(2).transpose(1, 2) + table).contiguous()
        ),
    ),
    equivalent(
        "embedding_called",
        "position table indexed by ids",
        seams.tokens_of_grid(read_table_by_ids),
    ),
    equivalent(
        "addmm",
        "fc2 as a product and a sum",
        seams.mlp(lambda mlp, x: mlp.activation(mlp.fc1(x)) @ mlp.fc2.weight.T + mlp.fc2.bias),
    ),
    equivalent(
        "wide_residual",
        "residual stream in float32 at least",
        seams.block(
            first=lambda block, x: (widen(x) + block.self_attn(block.layer_norm1(x))).to(x.dtype)
        ),
    ),
    equivalent("mlp_in_chunks", "MLP in chunks of tokens", seams.block(second=run_mlp_in_chunks)),
]

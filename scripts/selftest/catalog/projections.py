"""Weights of the projections: swapped, permuted or transposed."""

from __future__ import annotations

import torch
from torch import Tensor

from scripts.selftest.catalog.edits import ATTENTION, BLOCK_5, blocks_of, change, swap
from scripts.selftest.mutant import Edit, Mutant
from siglip_port import SigLipVisionModel

Q = f"{ATTENTION}.q_proj"
K = f"{ATTENTION}.k_proj"
V = f"{ATTENTION}.v_proj"


def loaded(
    name: str, description: str, locations: str, edit: Edit, source: str = "variant"
) -> Mutant:
    """Build a mutant that edits loaded weights."""
    return Mutant(name, description, locations, "weights", source, edit=edit)


def rotate_projections(model: SigLipVisionModel) -> None:
    """Use k as q, v as k, and q as v."""
    swap(Q, K)(model)
    swap(Q, V)(model)


def interleave_projections(model: SigLipVisionModel) -> None:
    """Give each projection every third row of the fused tensor."""
    for block in blocks_of(model):
        attention = block.self_attn
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        for kind in ("weight", "bias"):
            fused = torch.cat([projection.get_parameter(kind).data for projection in projections])
            for number, projection in enumerate(projections):
                projection.get_parameter(kind).data = fused[number::3].clone()


def permute_for_rope(tensor: Tensor, heads: int = 8) -> Tensor:
    """Put even rows of each head before odd ones, as for RoPE."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def transpose(tensor: Tensor) -> Tensor:
    """Swap rows and columns."""
    return tensor.T


PROJECTIONS = [
    loaded("qk_swapped", "q and k swapped", "q k", swap(Q, K), "vllm-project/vllm#42803"),
    loaded("kv_swapped", "k and v swapped", "k v", swap(K, V), "huggingface/transformers#40257"),
    loaded("qv_swapped", "q and v swapped", "q v", swap(Q, V), "huggingface/transformers#40257"),
    loaded(
        "kv_swapped_once",
        "k and v of one block swapped",
        "5.k 5.v",
        swap(f"{BLOCK_5}.self_attn.k_proj", f"{BLOCK_5}.self_attn.v_proj"),
    ),
    loaded(
        "qkv_rotated",
        "q, k, v read as k, v, q",
        "q k v",
        rotate_projections,
        "awslabs/slapo#46",
    ),
    loaded("qkv_bias_swapped", "biases of k and v swapped", "k v", swap(K, V, "bias")),
    loaded(
        "fused_qkv_interleaved",
        "fused qkv read as interleaved",
        "q k v",
        interleave_projections,
        "awslabs/slapo#46; Oneflow-Inc/libai#146",
    ),
    loaded(
        "q_rope_permuted",
        "rows of q permuted as for RoPE",
        "q",
        change(permute_for_rope, f"{Q}.weight", f"{Q}.bias"),
        "tenstorrent/tt-metal#32024",
    ),
    loaded(
        "q_weight_transposed",
        "q weight transposed",
        "q",
        change(transpose, f"{Q}.weight"),
        "vllm-project/vllm#44113; mindspore-lab/mindone#399",
    ),
    loaded(
        "out_weight_transposed",
        "out_proj weight transposed",
        "attention",
        change(transpose, f"{ATTENTION}.out_proj.weight"),
        "vllm-project/vllm#44113",
    ),
    loaded(
        "qkv_transposed",
        "q, k and v transposed",
        "q k v",
        change(transpose, f"{Q}.weight", f"{K}.weight", f"{V}.weight"),
        "mindspore-lab/mindone#399",
    ),
]

"""Attention: scale, softmax, masks, heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 (the name the field uses)
from torch import Tensor

from scripts.selftest.catalog import seams
from scripts.selftest.mutant import Mutant, Patch, replace
from siglip_port import SigLipVisionModel
from siglip_port.model import MultiheadAttention

CONTEXT = "context head-context"


def scale_of(attention: MultiheadAttention) -> float:
    """Return the factor on the scores."""
    return attention.head_dim**-0.5


def scores_of(attention: MultiheadAttention, q: Tensor, k: Tensor) -> Tensor:
    """Return the scaled scores, [B, H, Q, N]."""
    return q @ k.mT * scale_of(attention)


def attend(
    name: str,
    description: str,
    function: Callable[[MultiheadAttention, Tensor, Tensor, Tensor], Tensor],
    source: str = "variant",
    locations: str = CONTEXT,
    gate: str = "numerics",
) -> Mutant:
    """Build a mutant with another function q, k, v -> context, all [B, H, N, D/H]."""
    return Mutant(name, description, locations, gate, source, patch=seams.attend(function))


def scale_by(scale: Callable[[MultiheadAttention], float]) -> Patch:
    """Replace the factor on the scores."""
    return seams.attend(
        lambda attention, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=scale(attention))
    )


def scale(
    name: str,
    description: str,
    factor: Callable[[MultiheadAttention], float],
    source: str = "variant",
) -> Mutant:
    """Build a mutant with another factor on the scores."""
    return Mutant(name, description, CONTEXT, source=source, patch=scale_by(factor))


def leave_probe_unscaled(attention: MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Use a scale of 1 in the head's attention only, which has one query."""
    scale = scale_of(attention)
    if q.shape[2] == 1:
        scale = 1.0
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def add_one_to_sum(attention: MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Add a key with score 0 and value 0 to every query."""
    scores = F.pad(scores_of(attention, q, k), (0, 1))
    return scores.softmax(-1)[..., :-1] @ v


def attend_near(attention: MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend to fewer than 30 tokens on either side."""
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, distance.abs() < 30, scale=scale_of(attention))


def split_width_first(attention: MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Read the features as (width, head)."""

    def resplit(x: Tensor) -> Tensor:
        features = x.transpose(1, 2).flatten(2)
        return features.unflatten(-1, (-1, attention.num_heads)).permute(0, 3, 1, 2)

    return F.scaled_dot_product_attention(
        resplit(q), resplit(k), resplit(v), scale=scale_of(attention)
    )


def swap_queries_and_keys(attention: MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Swap queries and keys where their numbers are equal."""
    if q.shape == k.shape:
        q, k = k, q
    return F.scaled_dot_product_attention(q, k, v, scale=scale_of(attention))


def drop_last_head(attention: MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Set the context of the last head to zero."""
    context = F.scaled_dot_product_attention(q, k, v, scale=scale_of(attention))
    heads = torch.arange(attention.num_heads)[:, None, None]
    return context * (heads < attention.num_heads - 1)


def add_diagonal(attention: MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Add 1 to the diagonal of the scores."""
    bias = torch.eye(q.shape[2], k.shape[2], dtype=q.dtype)
    return F.scaled_dot_product_attention(q, k, v, bias, scale=scale_of(attention))


def rotate(x: Tensor) -> Tensor:
    """Apply a rotary position embedding with angle index / 50."""
    angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] / 50
    first, second = x.chunk(2, -1)
    return torch.cat(
        [
            first * angle.cos() - second * angle.sin(),
            first * angle.sin() + second * angle.cos(),
        ],
        -1,
    )


def set_heads(count: Callable[[int], int]) -> Callable[[SigLipVisionModel], None]:
    """Return an edit that sets the number of heads of all attentions."""

    def edit(model: SigLipVisionModel) -> None:
        for module in model.modules():
            if isinstance(module, MultiheadAttention):
                width = module.num_heads * module.head_dim
                module.num_heads = count(module.num_heads)
                module.head_dim = width // module.num_heads

    return edit


def normalize_queries_and_keys(
    attention: MultiheadAttention, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Scale queries and keys to unit length."""
    q = F.normalize(q, dim=-1)
    k = F.normalize(k, dim=-1)
    return F.scaled_dot_product_attention(q, k, v, scale=scale_of(attention))


ATTENTION = [
    scale(
        "scale_none",
        "scores not scaled",
        lambda attention: 1.0,
        "huggingface/transformers#39043; ggml-org/llama.cpp#17516",
    ),
    scale(
        "scale_sqrt_dim",
        "scores scaled by the width of all heads",
        lambda attention: (attention.num_heads * attention.head_dim) ** -0.5,
        "lucidrains/vit-pytorch#65; karpathy/ng-video-lecture#6",
    ),
    attend(
        "scale_twice",
        "scores scaled twice",
        lambda attention, q, k, v: F.scaled_dot_product_attention(
            q * scale_of(attention), k, v, scale=scale_of(attention)
        ),
    ),
    scale(
        "scale_inverted",
        "scores multiplied by sqrt(head_dim)",
        lambda attention: 1 / scale_of(attention),
        "huggingface/transformers#39043",
    ),
    scale(
        "scale_num_heads",
        "scores scaled by the number of heads",
        lambda attention: attention.num_heads**-0.5,
        "tenstorrent/tt-metal#56789",
    ),
    scale(
        "scale_padded",
        "scores scaled for a padded head_dim",
        lambda attention: 32**-0.5,
        "intel/ipex-llm#12619; bytedance-iaas/sglang#485",
    ),
    scale(
        "scale_bf16",
        "the scale rounded to bfloat16",
        lambda attention: float(torch.tensor(scale_of(attention)).bfloat16()),
    ),
    attend(
        "scale_head_none",
        "scores not scaled in the head only",
        leave_probe_unscaled,
        "LAION-AI/temporal-embedding-aggregation#23",
        "head-context",
    ),
    attend(
        "softmax_dim",
        "softmax over the queries",
        lambda attention, q, k, v: scores_of(attention, q, k).softmax(-2) @ v,
    ),
    attend("softmax_plus_one", "softmax plus one: 1 added to the denominator", add_one_to_sum),
    attend(
        "softmax_no_normalization",
        "sigmoid instead of softmax",
        lambda attention, q, k, v: scores_of(attention, q, k).sigmoid() @ v,
    ),
    attend(
        "causal_mask",
        "causal mask",
        lambda attention, q, k, v: F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale_of(attention)
        ),
        "microsoft/onnxruntime#25360; ggml-org/llama.cpp#23800",
    ),
    attend(
        "mask_last_token",
        "last key masked",
        lambda attention, q, k, v: F.scaled_dot_product_attention(
            q, k[..., :-1, :], v[..., :-1, :], scale=scale_of(attention)
        ),
        "Blaizzy/mlx-vlm#2266",
    ),
    attend(
        "mask_first_token",
        "first key dropped as if it were CLS",
        lambda attention, q, k, v: F.scaled_dot_product_attention(
            q, k[..., 1:, :], v[..., 1:, :], scale=scale_of(attention)
        ),
        "TinyLLaVA/TinyLLaVA_Factory#203",
    ),
    attend("window", "sliding-window attention", attend_near),
    attend(
        "attn_dropout",
        "attention dropout active at inference",
        lambda attention, q, k, v: F.scaled_dot_product_attention(
            q, k, v, dropout_p=0.1, scale=scale_of(attention)
        ),
        "karpathy/nanoGPT#240; LAION-AI/CLIP_benchmark#73",
        "context head-context tokens pooled inputs",
        "sensitivity",
    ),
    attend(
        "head_interleave_split",
        "heads read as (width, head)",
        split_width_first,
        "lsdefine/attention-is-all-you-need-keras#36",
    ),
    Mutant(
        "merge_missing_transpose",
        "heads merged without the transpose",
        CONTEXT,
        source="jsbaan/transformer-from-scratch#6; meta-pytorch/opacus#825",
        patch=replace(
            MultiheadAttention,
            "merge_heads",
            lambda attention, x: x.flatten(1).unflatten(1, (x.shape[2], -1)),
        ),
    ),
    Mutant(
        "merge_interleaved",
        "heads merged as (width, head)",
        CONTEXT,
        patch=replace(
            MultiheadAttention,
            "merge_heads",
            lambda attention, x: x.permute(0, 2, 3, 1).flatten(2),
        ),
    ),
    Mutant(
        "split_missing_transpose",
        "heads split without the transpose",
        CONTEXT,
        source="hyunwoongko/transformer#15",
        patch=replace(
            MultiheadAttention,
            "split_heads",
            lambda attention, x: x.reshape(x.shape[0], attention.num_heads, -1, attention.head_dim),
        ),
    ),
    Mutant(
        "num_heads_wrong",
        "half as many heads",
        CONTEXT,
        source="huggingface/transformers#39089; salesforce/LAVIS#106",
        edit=set_heads(lambda heads: heads // 2 or 1),
    ),
    Mutant("one_head", "one head", CONTEXT, edit=set_heads(lambda heads: 1)),
    attend(
        "qk_swapped_in_scores",
        "q and k swapped in the scores",
        swap_queries_and_keys,
        locations="context",
    ),
    attend(
        "value_is_key",
        "keys instead of values",
        lambda attention, q, k, v: F.scaled_dot_product_attention(
            q, k, k, scale=scale_of(attention)
        ),
        "huggingface/transformers#40257",
    ),
    attend("last_head_dropped", "last head dropped", drop_last_head),
    attend(
        "scores_clipped",
        "scores clipped at 5",
        lambda attention, q, k, v: scores_of(attention, q, k).clamp(-5, 5).softmax(-1) @ v,
    ),
    attend("relative_bias", "bias on the diagonal of the scores", add_diagonal),
    attend(
        "rotary",
        "rotary position embedding added",
        lambda attention, q, k, v: F.scaled_dot_product_attention(
            rotate(q), rotate(k), v, scale=scale_of(attention)
        ),
        "tenstorrent/tt-metal#32024",
    ),
    Mutant(
        "out_proj_missing",
        "out_proj not applied",
        "attention head-attention head-context",
        patch=seams.projections(out=lambda attention, x: x),
    ),
    Mutant(
        "query_from_values",
        "queries computed by v_proj",
        "q head-q head-v context head-context v",
        source="vllm-project/vllm#42803",
        patch=seams.projections(q=lambda attention, x: attention.v_proj(x)),
    ),
    attend("qk_norm", "QK normalization", normalize_queries_and_keys),
]

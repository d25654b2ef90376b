"""Pooling: the head, `pool` and `embed`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scripts.selftest.catalog import seams
from scripts.selftest.catalog.seams import attend_from_probe
from scripts.selftest.mutant import Mutant
from siglip_port import SigLipVisionModel
from siglip_port.model import PoolingHead

WHOLE_HEAD = "head-attention head-ln head-fc1 head-act head-mlp"
INSIDE_HEAD = f"head head-q head-k head-v head-context {WHOLE_HEAD}"


def normalize_probe(head: PoolingHead, tokens: Tensor) -> Tensor:
    """Apply a LayerNorm to the probe."""
    probe = nn.functional.layer_norm(head.probe, head.probe.shape[-1:])
    return head.attention(tokens, query=probe.expand(tokens.shape[0], -1, -1))


def attend_over_batch(head: PoolingHead, tokens: Tensor) -> Tensor:
    """Attend over the batch."""
    pooled = head.attention(tokens.flatten(0, 1)[None], query=head.probe)
    return pooled.expand(tokens.shape[0], -1, -1)


def add_probe(head: PoolingHead, tokens: Tensor) -> Tensor:
    """Add the probe to the attention's output."""
    return head.probe.expand(tokens.shape[0], -1, -1) + attend_from_probe(head, tokens)


def negate_every_second_probe(head: PoolingHead, tokens: Tensor) -> Tensor:
    """Negate the probe for every second image."""
    signs = 1 - 2 * (torch.arange(tokens.shape[0]) % 2)
    probes = head.probe * signs[:, None, None].to(tokens.dtype)
    return head.attention(tokens, query=probes)


def add_mlp_to_norm(head: PoolingHead, pooled: Tensor) -> Tensor:
    """Take the residual from the normalized vector."""
    pooled = head.layernorm(pooled)
    return pooled + head.mlp(pooled)


def normalize_over_batch(model: SigLipVisionModel, tokens: Tensor, normalize: bool) -> Tensor:
    """L2-normalize features over the batch."""
    vectors = model.pool(tokens)
    return nn.functional.normalize(vectors, dim=0) if normalize else vectors


def embed_mean(model: SigLipVisionModel, tokens: Tensor, normalize: bool) -> Tensor:
    """Return the mean of the tokens instead of the pooling head's output."""
    vectors = tokens.mean(1)
    return nn.functional.normalize(vectors, dim=-1) if normalize else vectors


POOLING = [
    Mutant(
        "mean_pool",
        "mean pooling instead of the head",
        f"pooled block {INSIDE_HEAD}",
        "sensitivity",
        "vllm-project/semantic-router#1927",
        patch=seams.pool(lambda head, tokens: tokens.mean(1)),
    ),
    Mutant(
        "mean_pool_tanh",
        "tanh of mean pooling instead of the head",
        f"pooled {INSIDE_HEAD}",
        "sensitivity",
        "vllm-project/semantic-router#1927",
        patch=seams.pool(lambda head, tokens: tokens.mean(1).tanh()),
    ),
    Mutant(
        "first_token",
        "first token as CLS instead of the head",
        f"inputs pooled {INSIDE_HEAD}",
        "sensitivity",
        "huggingface/transformers#34447",
        patch=seams.pool(lambda head, tokens: tokens[:, 0]),
    ),
    Mutant(
        "probe_ln",
        "LayerNorm applied to the probe",
        "head-q",
        patch=seams.pooling_head(first=normalize_probe),
    ),
    Mutant(
        "kv_ln",
        "tokens normalized again before k and v",
        "head-k head-v head-ln",
        source="vllm-project/vllm#8106",
        patch=seams.pooling_head(
            first=lambda head, tokens: attend_from_probe(head, head.layernorm(tokens))
        ),
    ),
    Mutant(
        "batch_first_false",
        "head attends over the batch (batch_first=False)",
        "head-ln head-q head-k head-v head-context head-attention head pooled",
        "sensitivity",
        "om-ai-lab/OmDet#19; IBM/TabFormer#14",
        patch=seams.pooling_head(first=attend_over_batch),
    ),
    Mutant(
        "probe_residual",
        "residual added around the head's attention",
        "head-attention head-ln head",
        patch=seams.pooling_head(first=add_probe),
    ),
    Mutant(
        "head_ln_missing",
        "LayerNorm missing in the head",
        "head-ln head-fc1",
        "sensitivity",
        patch=seams.pooling_head(second=lambda head, pooled: pooled + head.mlp(pooled)),
    ),
    Mutant(
        "head_residual_missing",
        "residual missing in the head",
        "head",
        patch=seams.pooling_head(second=lambda head, pooled: head.mlp(head.layernorm(pooled))),
    ),
    Mutant(
        "head_residual_from_ln",
        "residual of the head taken after the norm",
        "head",
        patch=seams.pooling_head(second=add_mlp_to_norm),
    ),
    Mutant(
        "head_mlp_skipped",
        "MLP missing in the head",
        "head head-ln head-fc1 head-act head-mlp",
        "sensitivity",
        patch=seams.pooling_head(second=lambda head, pooled: pooled),
    ),
    Mutant(
        "head_extra_ln",
        "extra LayerNorm after the head",
        "head head-ln",
        patch=seams.pooling_head(last=lambda head, pooled: head.layernorm(pooled).squeeze(1)),
    ),
    Mutant(
        "head_on_pre_ln",
        "head applied before post_layernorm",
        "head-k head-v",
        source="vllm-project/vllm#8155",
        patch=seams.pool(lambda head, tokens: head(tokens / tokens.std(-1, keepdim=True))),
    ),
    Mutant(
        "pooled_l2",
        "pooled output L2-normalized",
        "pooled",
        source="vllm-project/semantic-router#1927",
        patch=seams.pool(lambda head, tokens: nn.functional.normalize(head(tokens), dim=-1)),
    ),
    Mutant(
        "pooled_half",
        "pooled output halved",
        "pooled",
        source="vllm-project/semantic-router#1927",
        patch=seams.pool(lambda head, tokens: head(tokens) / 2),
    ),
    Mutant(
        "embed_not_unit",
        "embed() never normalizes",
        "pooled",
        "interface",
        patch=seams.embed(lambda model, tokens, normalize: model.pool(tokens)),
    ),
    Mutant(
        "embed_unit_over_batch",
        "embed() normalizes over the images",
        "pooled",
        "interface",
        patch=seams.embed(normalize_over_batch),
    ),
    Mutant(
        "embed_of_mean",
        "embed() returns the mean of the tokens",
        "pooled",
        "interface",
        "vllm-project/semantic-router#1927",
        patch=seams.embed(embed_mean),
    ),
    Mutant(
        "pooled_squeezed",
        "squeeze without an axis drops the batch dimension of one image",
        "pooled",
        "sensitivity",
        patch=seams.pooling_head(last=lambda head, pooled: pooled.squeeze()),
    ),
    Mutant(
        "two_probes",
        "another probe for every second image",
        "head-q",
        patch=seams.pooling_head(first=negate_every_second_probe),
    ),
]

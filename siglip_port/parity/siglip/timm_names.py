"""The tensors of a model under timm's names, without the key map that is to be checked.

Source: timm 1.0.31, `Attention` and `AttentionPoolLatent` in `layers/`, `VisionTransformer` in
`models/vision_transformer.py`, and `NaFlexVit` in `models/naflexvit.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

RENAMED = (
    (r"encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"blocks.\1.norm\2."),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layers\.(\d+)\.mlp\.", r"blocks.\1.mlp."),
    (r"post_layernorm\.", "norm."),
    (r"head\.probe", "attn_pool.latent"),
    (r"head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"head\.layernorm\.", "attn_pool.norm."),
    (r"head\.mlp\.", "attn_pool.mlp."),
)
"""Beginnings of transformers' names, and what timm has instead."""


def to_timm(tensors: Mapping[str, Tensor], *, naflex: bool) -> dict[str, Tensor]:
    """Rename, split and fuse tensors as timm stores them.

    Args:
        tensors: Tensors by transformers' names, without prefix.
        naflex: Whether the model is `NaFlexVit` instead of `VisionTransformer`.
    """
    embeddings = "embeds" if naflex else "patch_embed"
    stored = {}
    for name, tensor in tensors.items():
        for pattern, replacement in RENAMED:
            renamed, count = re.subn(rf"^{pattern}", replacement, name)
            if count:
                stored[renamed] = tensor
    for kind in ("weight", "bias"):
        patches = f"embeddings.patch_embedding.{kind}"
        stored[f"{embeddings}.proj.{kind}"] = tensors[patches]
        query, key, value = tensors[f"head.attention.in_proj_{kind}"].chunk(3)
        stored[f"attn_pool.q.{kind}"] = query
        stored[f"attn_pool.kv.{kind}"] = torch.cat([key, value])
    for name in tensors:
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(\w+)", name)
        if match:
            parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            stored[f"blocks.{match[1]}.attn.qkv.{match[2]}"] = torch.cat(parts)
    positions = tensors["embeddings.position_embedding.weight"]
    if naflex:
        side = math.isqrt(len(positions))
        stored["embeds.pos_embed"] = positions.unflatten(0, (side, side))[None]
    else:
        stored["pos_embed"] = positions[None]
    return stored

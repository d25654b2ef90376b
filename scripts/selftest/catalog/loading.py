"""Loading: key rules, tensors, configuration, training mode."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from scripts.selftest.catalog.weights import TENSORS
from scripts.selftest.mutant import Mutant, Patch, combine, replace, wrap
from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port.checkpoint import Checkpoint, Provenance, hf_config, key_rules, layouts
from siglip_port.checkpoint.key_rules import KeyMapping, KeyRule, Layout

LOST = "transformer.encoder.encoder_blocks.5.self_attn.v_proj.bias"

Rules = tuple[KeyRule, ...]
Tensors = tuple[dict[str, Tensor], Provenance]
"""What is read of a checkpoint."""


def swap_head_projections(rules: Rules) -> Rules:
    """Read the first third of the head's fused projection as k, the second as q."""
    swapped = []
    for rule in rules:
        if rule.stored == "head.attention.in_proj_*":
            q, k, v = rule.port
            rule = dataclasses.replace(rule, port=(k, q, v))
        swapped.append(rule)
    return tuple(swapped)


def swap_norms(rules: Rules) -> Rules:
    """Read each LayerNorm of a block from the names of the other."""
    other_norm = {"layer_norm1": "layer_norm2", "layer_norm2": "layer_norm1"}
    swapped = []
    for rule in rules:
        stored = re.sub("layer_norm[12]", lambda match: other_norm[match[0]], rule.stored)
        swapped.append(dataclasses.replace(rule, stored=stored))
    return tuple(swapped)


def change_rules(function: Callable[[Rules], Rules]) -> Patch:
    """Change the key rules everywhere they are read."""
    return combine(
        wrap(Layout, "rules", lambda rules, *args: function(rules(*args))),
        replace(layouts, "HUGGINGFACE_ENCODER", function(layouts.HUGGINGFACE_ENCODER)),
        replace(layouts, "HUGGINGFACE_HEAD", function(layouts.HUGGINGFACE_HEAD)),
    )


def sort_blocks_as_text(
    mappings: Callable[..., dict[str, KeyMapping]],
    layout: Layout,
    num_blocks: int,
    *args: object,
) -> dict[str, KeyMapping]:
    """Read stored blocks in lexicographic order: 10 after 1."""
    numbers = sorted(range(num_blocks), key=str)

    def renumber(name: str) -> str:
        return re.sub(
            r"(?<=encoder_blocks\.)\d+", lambda match: str(numbers.index(int(match[0]))), name
        )

    result = {}
    for stored, mapping in mappings(layout, num_blocks, *args).items():
        port = tuple(renumber(name) for name in mapping.port)
        result[stored] = dataclasses.replace(mapping, port=port)
    return result


def split_interleaved(split: object, tensor: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Split fused tensors by every `parts`-th row."""
    return tuple(tensor[number::parts] for number in range(parts))


def change_tensors(function: Callable[[Tensor], Tensor]) -> Patch:
    """Apply a function to every tensor that is read."""

    def read(original: Callable[..., Tensors], *args: object, **options: object) -> Tensors:
        tensors, provenance = original(*args, **options)
        return {name: function(tensor) for name, tensor in tensors.items()}, provenance

    return wrap(Checkpoint, "read", read)


def transpose_if_square(tensor: Tensor) -> Tensor:
    """Transpose square matrices."""
    if tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1]:
        return tensor.T
    return tensor


def clear_last_row(tensor: Tensor) -> Tensor:
    """Set the end of a tensor to zero."""
    return torch.cat([tensor[:-1], 0 * tensor[-1:]])


def change_config(function: Callable[[SigLipVisionConfig], dict[str, Any]]) -> Patch:
    """Replace fields of `config.json` after reading."""

    def config_from_hf(
        original: Callable[[Mapping[str, Any]], SigLipVisionConfig], contents: Mapping[str, Any]
    ) -> SigLipVisionConfig:
        config = original(contents)
        return dataclasses.replace(config, **function(config))

    return wrap(hf_config, "config_from_hf", config_from_hf)


def drop_one_tensor(
    load_state_dict: Callable[..., object],
    model: SigLipVisionModel,
    tensors: Mapping[str, Tensor],
    **options: object,
) -> object:
    """Load without strict, with zeros for one tensor."""
    remaining = {**tensors, LOST: torch.zeros_like(tensors[LOST])}
    return load_state_dict(model, remaining, **{**options, "strict": False})


def train_head(model: SigLipVisionModel) -> None:
    """Put the pooling head into training mode."""
    assert model.pooling_head is not None
    model.pooling_head.train()


LOADING = [
    Mutant(
        "rows_qk_swapped",
        "key rules swap q and k of the head",
        "head-q head-k",
        patch=change_rules(swap_head_projections),
    ),
    Mutant(
        "rows_norms_swapped",
        "key rules swap the LayerNorms",
        "ln1 ln2 in residual q k v fc1",
        patch=change_rules(swap_norms),
    ),
    Mutant(
        "split_interleaved",
        "fused tensors split as interleaved",
        "head-q head-k head-v",
        "weights",
        "awslabs/slapo#46",
        patch=wrap(key_rules, "split", split_interleaved),
    ),
    Mutant(
        "blocks_spelled_as_text",
        "block numbers sorted as text",
        "block",
        source="ollama/ollama#12015",
        patch=wrap(Layout, "mappings", sort_blocks_as_text),
    ),
    Mutant(
        "read_as_bf16",
        "tensors read through bfloat16",
        TENSORS,
        "weights",
        "TensorAuto/OpenTau#483",
        patch=change_tensors(lambda tensor: tensor.bfloat16().to(tensor.dtype)),
    ),
    Mutant(
        "read_transposed",
        "square matrices read transposed",
        "q k v attention head-q head-k head-v head-attention",
        "weights",
        "mindspore-lab/mindone#399",
        patch=change_tensors(transpose_if_square),
    ),
    Mutant(
        "read_truncated",
        "end of every tensor read as zeros",
        TENSORS,
        "weights",
        "evo-design/proto-tools#64",
        patch=change_tensors(clear_last_row),
    ),
    Mutant(
        "eps_ignored",
        "eps of the config ignored, PyTorch's default used",
        "layer_norm_eps ln1 ln2 post head-ln",
        "config",
        "OpenNMT/CTranslate2#951",
        patch=change_config(lambda config: {"layer_norm_eps": 1e-5}),
    ),
    Mutant(
        "heads_ignored",
        "number of heads derived from the width",
        "num_attention_heads context head-context",
        "config",
        "huggingface/transformers#22625",
        patch=change_config(lambda config: {"num_attention_heads": config.embed_dim // 36}),
    ),
    Mutant(
        "act_ignored",
        "activation of the config ignored",
        "hidden_act act head-act",
        "config",
        "m87-labs/kestrel#162",
        patch=change_config(lambda config: {"hidden_act": "gelu"}),
    ),
    Mutant(
        "left_in_training",
        "eval() not called",
        "model",
        "environment",
        "facebookresearch/vjepa2#160",
        edit=lambda model: model.train(),
    ),
    Mutant(
        "head_left_in_training",
        "head in training mode",
        "pooling_head",
        "environment",
        edit=train_head,
    ),
    Mutant(
        "not_strict",
        "loaded without strict, one tensor missing",
        "5.v",
        "weights",
        "keras-style strict=False; nanoVLM loader",
        patch=wrap(SigLipVisionModel, "load_state_dict", drop_one_tensor),
    ),
]

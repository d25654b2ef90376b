"""Small architectures, and edits of checkpoint files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from siglip_port import SigLipVisionConfig
from siglip_port.checkpoint.key_rules import Layout
from siglip_port.checkpoint.source import CONFIG, INDEX, WEIGHTS

# Sizes that expose bugs: head_dim differs from the number of heads, 1/sqrt(head_dim) is inexact,
# the image is no multiple of the patch, and 11 block indices sort differently as text.
ODD = SigLipVisionConfig(
    embed_dim=72,
    image_size=45,
    patch_size=7,
    num_attention_heads=4,
    num_encoder_blocks=11,
    mlp_hidden_dim=101,
    pooling_head=True,
)
SHALLOW = replace(ODD, num_encoder_blocks=3)

SMALL = SigLipVisionConfig(
    embed_dim=24,
    image_size=16,
    patch_size=8,
    num_attention_heads=2,
    num_encoder_blocks=3,
    mlp_hidden_dim=40,
    pooling_head=True,
)

TANH = "gelu_pytorch_tanh"
EXACT = "gelu"

SAVED_FILES = [
    "README.md",
    "config.json",
    "config_sentence_transformers.json",
    "model.safetensors",
    "modules.json",
    "preprocessor_config.json",
    "sentence_bert_config.json",
]
"""Files that `save_hf` writes for a model without mean pooling."""

MakeCheckpoint = Callable[..., Path]
Tensors = dict[str, Tensor]
Edit = Callable[[Tensors], Tensors]
Json = dict[str, Any]


def config_for(layout: Layout, config: SigLipVisionConfig = SMALL) -> SigLipVisionConfig:
    """Return `config` with the pooling head and NaFlex setting that a layout supports."""
    return replace(config, pooling_head=bool(layout.head), naflex=layout.naflex)


def pixels(config: SigLipVisionConfig, batch: int = 2, seed: int = 0) -> Tensor:
    """Draw random `pixel_values`, float64, [B, C, H, W]."""
    shape = (batch, config.num_channels, config.image_size, config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def edit_tensors(folder: Path, edit: Edit, file: str = WEIGHTS) -> None:
    """Edit the tensors of a checkpoint file."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
    edited = {}
    for name, tensor in edit(tensors).items():
        edited[name] = tensor.clone(memory_format=torch.contiguous_format)
    save_file(edited, folder / file, {"format": "pt"})


def adding(extra: Tensors) -> Edit:
    """Return an edit that adds or replaces tensors."""
    return lambda tensors: {**tensors, **extra}


def renaming(pattern: str, replacement: str) -> Edit:
    """Return an edit that renames tensors by `re.sub`."""
    return lambda tensors: {
        re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()
    }


def dropping(pattern: str) -> Edit:
    """Return an edit that removes tensors whose names match."""
    return lambda tensors: {
        name: tensor for name, tensor in tensors.items() if not re.search(pattern, name)
    }


def edit_config(folder: Path, **changes: object) -> None:
    """Edit keys of `config.json`; the value `...` removes a key."""
    path = folder / CONFIG
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_index(folder: Path, edit: Callable[[Json], object]) -> None:
    """Edit the shard index; a string result is written unchanged."""
    path = folder / INDEX
    edited = edit(json.loads(path.read_text()))
    path.write_text(edited if isinstance(edited, str) else json.dumps(edited))


def rename_in_a_thousand(index: Json) -> Json:
    """Return an index of a thousand vision encoders, each in its own shard."""
    weight_map = {}
    for i in range(1000):
        for name in index["weight_map"]:
            weight_map[f"encoder{i}.{name}"] = f"shard-{i}.safetensors"
    return {"weight_map": weight_map}


def shard(folder: Path, num_shards: int = 3) -> None:
    """Split a checkpoint into shards with an index, as transformers does."""
    tensors = load_file(folder / WEIGHTS)
    files = [f"model-{i + 1:05}-of-{num_shards:05}.safetensors" for i in range(num_shards)]
    weight_map = {name: files[i % num_shards] for i, name in enumerate(tensors)}
    for file in files:
        names = [name for name in tensors if weight_map[name] == file]
        save_file({name: tensors[name].clone() for name in names}, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / WEIGHTS).unlink()

"""Tiny architectures that hide nothing, and what tests do to a checkpoint's files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from siglip_port import SigLipVisionConfig

# Widths, heads and sizes that no mistake survives by luck: head_dim differs from the number of
# heads, 1/sqrt(head_dim) is inexact, the picture is no multiple of the patch, and 11 blocks sort
# differently as numbers and as text.
ODD = SigLipVisionConfig(
    embed_dim=72,
    image_size=45,
    patch_size=7,
    num_attention_heads=4,
    num_encoder_blocks=11,
    mlp_hidden_dim=101,
    pooling_head=True,
)


SMALL = SigLipVisionConfig(
    embed_dim=24,
    image_size=16,
    patch_size=8,
    num_attention_heads=2,
    num_encoder_blocks=3,
    mlp_hidden_dim=40,
    pooling_head=True,
)


MakeCheckpoint = Callable[..., Path]


def edit_tensors(
    folder: Path,
    edit: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    file: str = "model.safetensors",
) -> None:
    """Rewrites the tensors of a checkpoint."""
    tensors = edit({name: tensor.clone() for name, tensor in load_file(folder / file).items()})
    save_file(
        {
            name: tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        },
        folder / file,
        {"format": "pt"},
    )


def edit_config(folder: Path, **changes: object) -> None:
    """Rewrites keys of `config.json`; a value of `...` takes the key away."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def shard(folder: Path, num_shards: int = 3) -> None:
    """Spreads the tensors of a checkpoint over several files with an index, as transformers does."""
    tensors = load_file(folder / "model.safetensors")
    names = [f"model-{i + 1:05}-of-{num_shards:05}.safetensors" for i in range(num_shards)]
    weight_map = {name: names[i % num_shards] for i, name in enumerate(tensors)}
    for file in names:
        mine = {
            name: tensor.clone() for name, tensor in tensors.items() if weight_map[name] == file
        }
        save_file(mine, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (folder / "model.safetensors").unlink()


def pixels(config: SigLipVisionConfig, batch: int = 2, seed: int = 0) -> Tensor:
    """Float64 noise in the shape of pictures."""
    shape = (batch, config.num_channels, config.image_size, config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

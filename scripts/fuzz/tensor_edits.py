"""Damages the entries of tensors in a safetensors header, which stays valid JSON."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save

from scripts.fuzz.byte_edits import join, noise, split
from scripts.fuzz.json_edits import DAMAGED


def swap(rng: Random, content: bytes) -> bytes:
    """Swap the offsets, dtypes or shapes of two tensors of equal size, or remove the pooling head.

    Without the pooling head, the rest is a valid checkpoint.
    """
    header, data = split(content)
    try:
        document = json.loads(header)
        sizes = {}
        for name, entry in document.items():
            if name[0] != "_":
                begin, end = entry["data_offsets"][:2]
                sizes[name] = end - begin
        name_a = rng.choice(list(sizes))
        name_b = rng.choice([name for name in sizes if sizes[name] == sizes[name_a]])
        part = rng.choice(("data_offsets", "dtype", "shape"))
        first = document[name_a][part]
        document[name_a][part] = document[name_b][part]
        document[name_b][part] = first
        names = list(document)
        rng.shuffle(names)
        if rng.random() < 0.1:
            return without_head(content)
    except DAMAGED:
        return noise(rng, content)
    return join(json.dumps({name: document[name] for name in names}).encode(), data)


def add(rng: Random, content: bytes) -> bytes:
    """Add a copy of a tensor under an unknown name, or as part of a block that does not exist."""
    header, data = split(content)
    try:
        document = json.loads(header)
        name = rng.choice(list(document))
        begin, end = document[name]["data_offsets"]
        entry = {**document[name], "data_offsets": [len(data), len(data) + end - begin]}
        names = (f"{name}x", name.replace("1", "7"), f"head.{name}", f"text_model.{name}")
        document[rng.choice(names)] = entry
    except DAMAGED:  # or the name is __metadata__
        return noise(rng, content)
    return join(json.dumps(document).encode(), data + data[begin:end])


def without_head(content: bytes) -> bytes:
    """Remove the tensors of the pooling head."""
    remaining = {}
    for name, tensor in load_tensors(content).items():
        if "head." not in name and "attn_pool." not in name:
            remaining[name] = tensor
    return save(remaining)


def load_tensors(content: bytes) -> dict[str, torch.Tensor]:
    """Read all tensors of a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        path.write_bytes(content)
        try:
            return {name: tensor.clone() for name, tensor in load_file(path).items()}
        except Exception as error:  # damaged by another edit; whatever safetensors raises
            raise ValueError from error

"""Bytes that `from_hf` and `siglip-port inspect` download from the Hub.

    uv run scripts/benchmarks/transfer.py

Prints the table of docs/hub.md; takes a minute on 2 cores. The Hub is a server on loopback. Its
repositories have the names, shapes, dtypes and shards of the published ones (as created by
transformers; Gemma's from its published configuration), with zeros for weights, in sparse files.
All bytes of all response bodies are counted.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    SiglipConfig,
    SiglipModel,
)

from siglip_port import SigLipVisionModel
from siglip_port.checkpoint.inspect import inspect_checkpoint
from siglip_port.checkpoint.registry import PUBLISHED
from siglip_port.hub import HubOptions, find_source
from tests.helpers.hub_server import Hub, Repository
from tests.helpers.network import url_template

SHARD_BYTES = 5_000_000_000
"""Shard size of transformers when these checkpoints were published, in bytes."""

ITEM_BYTES = {"F32": 4, "BF16": 2}

Shapes = Mapping[str, torch.Size]
"""Shapes by tensor name."""

TEXT = {
    "google/siglip-base-patch16-224": {"projection_size": 768},
    "google/siglip2-base-patch16-224": {"vocab_size": 256_000, "projection_size": 768},
    "google/siglip-so400m-patch14-384": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "projection_size": 1152,
    },
}
GEMMA = {
    "model_type": "gemma3",
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "vocab_size": 262_208,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
        "vision_use_head": False,
    },
}


def siglip(repo: str) -> tuple[Mapping[str, object], Shapes]:
    """Return the configuration and the shapes of all tensors of a published SigLIP."""
    published = next(row for row in PUBLISHED if row.repo == repo)
    vision = {**published.config.to_hf(), "model_type": "siglip_vision_model"}
    config = {"model_type": "siglip", "text_config": TEXT[repo], "vision_config": vision}
    with torch.device("meta"):
        model = SiglipModel(SiglipConfig(text_config=TEXT[repo], vision_config=vision))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    total = sum(map(math.prod, shapes.values()))
    if total != published.total_parameters:
        raise ValueError(
            f"{repo}: {published.total_parameters:,} parameters expected, got {total:,}"
        )
    return config, shapes


def gemma() -> tuple[Mapping[str, object], Shapes]:
    """Return the same for Gemma 3 27B, with the tensor names of transformers 4, as on the Hub."""
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(Gemma3Config(**GEMMA))
    old_prefixes = {
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.language_model.": "language_model.model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }
    shapes: dict[str, torch.Size] = {}
    for name, tensor in model.state_dict().items():
        for new, old in old_prefixes.items():
            if name.startswith(new):
                shapes[old + name.removeprefix(new)] = tensor.shape
    return GEMMA, shapes


def split_shards(shapes: Shapes, item_bytes: int) -> list[dict[str, torch.Size]]:
    """Split tensors into shards of at most `SHARD_BYTES`, in order."""
    shards: list[dict[str, torch.Size]] = [{}]
    size = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * item_bytes
        if size + nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += nbytes
    return shards


def write_checkpoint(
    folder: Path, config: Mapping[str, object], shapes: Shapes, dtype: str
) -> None:
    """Write a checkpoint of zeros in sparse files: a single file, or shards with an index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shards = split_shards(shapes, ITEM_BYTES[dtype])
    if len(shards) == 1:
        write_zeros(folder / "model.safetensors", shards[0], dtype)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_zeros(folder / file, shard, dtype)
        weight_map |= dict.fromkeys(shard, file)
    total = ITEM_BYTES[dtype] * sum(map(math.prod, shapes.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_zeros(path: Path, shapes: Shapes, dtype: str) -> None:
    """Write a sparse safetensors file of zeros."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes):
        begin = end
        end += math.prod(shapes[name]) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shapes[name]), "data_offsets": [begin, end]}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(content)) + content)
        out.truncate(8 + len(content) + end)


def take_counts(hub: Hub) -> tuple[int, int]:
    """Return the bytes and requests since the previous call."""
    num_bytes = sum(hub.sent.values())
    requests = sum(hub.requests.values())
    hub.sent.clear()
    hub.requests.clear()
    return num_bytes, requests


def measure(hub: Hub, repo: str, folder: Path, caches: Path) -> tuple[str, ...]:
    """Load and inspect a repository; return a row of the table."""
    size = sum(path.stat().st_size for path in folder.iterdir())
    take_counts(hub)
    inspect_checkpoint(find_source(repo, HubOptions(cache_dir=caches / "inspect")))
    inspected, _ = take_counts(hub)
    model = SigLipVisionModel.from_hf(repo, cache_dir=caches / "load")
    loaded, requests = take_counts(hub)
    SigLipVisionModel.from_hf(repo, cache_dir=caches / "load")
    loaded_again, _ = take_counts(hub)
    assert model.provenance is not None
    return (
        repo,
        f"{size:,}",
        f"{model.provenance.bytes_read:,}",
        f"{loaded:,}",
        f"{loaded / size:.2%}",
        f"{requests}",
        f"{loaded_again:,}",
        f"{inspected / 1e3:.0f} kB",
    )


def main() -> None:
    """Serve and load the checkpoints; print the table."""
    hub = Hub()
    constants.HUGGINGFACE_CO_URL_TEMPLATE = url_template(hub.url)
    constants.HF_HUB_OFFLINE = False
    checkpoints = [(repo, *siglip(repo), "F32") for repo in TEXT]
    checkpoints.append(("google/gemma-3-27b-like", *gemma(), "BF16"))
    print(
        "| checkpoint | all files | encoder | `from_hf` | share | requests | second load "
        "| `inspect` |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for repo, config, shapes, dtype in checkpoints:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "served")
            write_checkpoint(folder, config, shapes, dtype)
            hub.repositories[repo] = Repository(folder)
            cells = measure(hub, repo, folder, Path(scratch, "caches"))
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    argparse.ArgumentParser(
        description="Count the bytes that are downloaded from a Hub on loopback."
    ).parse_args()
    main()

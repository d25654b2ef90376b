"""What `from_hf` and `siglip-port inspect` take from the Hub.

Bytes over bytes in the file, with the real client.

`uv run scripts/benchmarks/transfer.py` takes a minute on 2 cores and prints a table. The Hub is our
own, on loopback; the files have the names, shapes, dtypes and shards of the published ones (as
transformers makes them; Gemma's by its published configuration), and zeros for weights, in sparse
files. Every byte of a body that the server sends is counted, of all
files: configurations, headers and weights.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

from tests.helpers.hub_server import Hub, Repository  # noqa: E402

HUB = Hub()
os.environ["HF_ENDPOINT"] = HUB.url  # before anything imports the client
os.environ.pop("HF_HUB_OFFLINE", None)

import torch  # noqa: E402
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipConfig, SiglipModel  # noqa: E402

from siglip_port import SigLipVisionModel  # noqa: E402
from siglip_port.checkpoint.inspect import inspect_checkpoint  # noqa: E402
from siglip_port.checkpoint.registry import PUBLISHED  # noqa: E402
from siglip_port.hub import HubOptions, find_source  # noqa: E402

SHARD = 5_000_000_000  # bytes: what releases of transformers of that time made

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


def siglip(repo: str) -> tuple[Mapping[str, object], dict[str, torch.Size]]:
    """Configuration, and names and shapes of all tensors, of a published SigLIP."""
    published = next(row for row in PUBLISHED if row.repo == repo)
    vision = {**published.config.to_hf(), "model_type": "siglip_vision_model"}
    config = {"model_type": "siglip", "text_config": TEXT[repo], "vision_config": vision}
    with torch.device("meta"):
        model = SiglipModel(SiglipConfig(text_config=TEXT[repo], vision_config=vision))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if (total := sum(map(math.prod, shapes.values()))) != published.total_parameters:
        raise ValueError(
            f"{repo} has {published.total_parameters} parameters, this would have {total}"
        )
    return config, shapes


def gemma() -> tuple[Mapping[str, object], dict[str, torch.Size]]:
    """The same of a Gemma 3 of the size of its 27B, whose names on the Hub are those of transformers 4."""
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(Gemma3Config(**GEMMA))
    old = {
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.language_model.": "language_model.model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }
    shapes: dict[str, torch.Size] = {}
    for name, tensor in model.state_dict().items():
        for new, before in old.items():
            if name.startswith(new):
                shapes[before + name.removeprefix(new)] = tensor.shape
    return GEMMA, shapes


def write(
    folder: Path, config: Mapping[str, object], shapes: Mapping[str, torch.Size], dtype: str
) -> None:
    """Writes a checkpoint of zeros in sparse files: one, or shards with their index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    size = {"F32": 4, "BF16": 2}[dtype]
    shards: list[dict[str, torch.Size]] = [{}]
    for name, shape in shapes.items():
        if sum(map(math.prod, shards[-1].values())) * size + math.prod(shape) * size > SHARD:
            shards.append({})
        shards[-1][name] = shape
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        total = size * sum(map(math.prod, shapes.values()))
        placed = {
            tensor: file for file, shard in zip(names, shards, strict=True) for tensor in shard
        }
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, shard in zip(names, shards, strict=True):
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(shard):
            begin, end = end, end + math.prod(shard[name]) * size
            header[name] = {
                "dtype": dtype,
                "shape": list(shard[name]),
                "data_offsets": [begin, end],
            }
        content = json.dumps(header, separators=(",", ":")).encode()
        content += b" " * (-len(content) % 8)
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(content)) + content)
            out.truncate(8 + len(content) + end)


def took() -> tuple[int, int]:
    """Bytes and requests since the last time."""
    taken = sum(HUB.sent.values()), sum(HUB.requests.values())
    HUB.sent.clear()
    HUB.requests.clear()
    return taken


def main() -> None:
    """Serves, loads, counts, prints."""
    rows = [(repo, *siglip(repo), "F32") for repo in TEXT] + [
        ("google/gemma-3-27b-like", *gemma(), "BF16")
    ]
    print(
        "| served | in its files | tower | `from_hf` takes | share | requests | again | `inspect` "
        "takes |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for repo, config, shapes, dtype in rows:
        with tempfile.TemporaryDirectory() as scratch:
            folder, cache = Path(scratch, "served"), Path(scratch, "cache")
            write(folder, config, shapes, dtype)
            HUB.repositories[repo] = Repository(folder)
            whole = sum(path.stat().st_size for path in folder.iterdir())
            took()
            inspect_checkpoint(find_source(repo, HubOptions(cache_dir=Path(scratch, "other"))))
            looked, _ = took()
            model = SigLipVisionModel.from_hf(repo, cache_dir=cache)
            taken, requests = took()
            SigLipVisionModel.from_hf(repo, cache_dir=cache)
            again, _ = took()
            assert model.provenance is not None
            cells = (
                repo,
                f"{whole:,}",
                f"{model.provenance.bytes_read:,}",
                f"{taken:,}",
                f"{taken / whole:.2%}",
                f"{requests}",
                f"{again:,}",
                f"{looked / 1e3:.0f} kB",
            )
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    argparse.ArgumentParser(
        description="Counts the bytes that are fetched from a Hub on loopback."
    ).parse_args()
    main()

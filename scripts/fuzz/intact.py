"""Intact checkpoints, one of each kind that is damaged."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save

from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port.checkpoint.layouts import BIG_VISION
from siglip_port.checkpoint.preprocessor_config import PREPROCESSOR
from siglip_port.checkpoint.source import CONFIG, INDEX, WEIGHTS
from siglip_port.parity.stress_weights import randomize

Files = dict[str, bytes]
"""The files of a checkpoint: names and contents."""

NPZ = "tower.npz"

# Nothing is as by default, so that a default in the place of what a file says does not go unseen.
ENCODER = SigLipVisionConfig(
    embed_dim=4,
    image_size=5,
    patch_size=2,
    num_attention_heads=2,
    num_encoder_blocks=2,
    mlp_hidden_dim=6,
    layer_norm_eps=1e-5,
    hidden_act="gelu",
    attention_dropout=0.25,
    pooling_head=True,
)
# timm and big_vision write neither epsilon nor dropout.
WITHOUT_EPS = replace(ENCODER, layer_norm_eps=1e-6, attention_dropout=0.0)


@dataclass(frozen=True)
class Kind:
    """A layout that is fuzzed.

    Attributes:
        config: of the encoder.
        prefix: what stands before the names of the encoder in the file.
        head: what stands before those of its pooling head, after the prefix.
        described: whether transformers' configuration tells the architecture.
        dtype: of the stored tensors.
        local: whether it is read from folders only.
    """

    config: SigLipVisionConfig = ENCODER
    prefix: str = "vision_model."
    head: str = "head."
    described: bool = True
    dtype: torch.dtype = torch.float32
    local: bool = False


KINDS = {
    "whole": Kind(),
    "sharded": Kind(),
    "flat": Kind(prefix=""),
    "timm": Kind(WITHOUT_EPS, prefix="", head="attn_pool.", described=False),
    "naflex": Kind(replace(ENCODER, naflex=True, image_size=4)),
    "big_vision": Kind(
        replace(WITHOUT_EPS, image_size=4, hidden_act="gelu_pytorch_tanh"),
        prefix="params/img/",
        head="MAPHead_0/",
        described=False,
        local=True,
    ),
    "bf16": Kind(dtype=torch.bfloat16),
}
"""What is fuzzed, by name.

The first two with a text encoder, so that on the Hub the vision encoder is the lesser part.
"""


def make(name: str, fill: Callable[[SigLipVisionModel], None] = randomize) -> Files:
    """Make an intact checkpoint.

    Args:
        name: one of `KINDS`.
        fill: sets the parameters; by default to random numbers that hide nothing, always the same.
    """
    kind = KINDS[name]
    model = SigLipVisionModel(kind.config)
    fill(model)
    if name == "big_vision":
        return {NPZ: to_npz(model, kind)}
    with tempfile.TemporaryDirectory() as folder:
        if name == "timm":
            model.save_timm(folder)
        else:
            model.save_hf(folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        tensors = load_file(Path(folder, WEIGHTS))
    if PREPROCESSOR in files:
        image_mean = {"image_mean": [0.25, 0.5, 0.75]}
        files[PREPROCESSOR] = encode({**json.loads(files[PREPROCESSOR]), **image_mean})
    if name in ("flat", "bf16"):
        typed = {}
        for key, tensor in tensors.items():
            if not kind.prefix:
                key = key.removeprefix("vision_model.")
            typed[key] = tensor.to(kind.dtype)
        files[WEIGHTS] = save(typed, {"format": "pt"})
    if name in ("whole", "sharded"):
        add_text_encoder(files, tensors)
    if name == "sharded":
        shard(files, tensors)
    return files


def encode(document: dict[str, Any]) -> bytes:
    """Write JSON."""
    return json.dumps(document).encode()


def to_npz(model: SigLipVisionModel, kind: Kind) -> bytes:
    """Write a model as big_vision does."""
    state_dict = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    stored = BIG_VISION.to_stored(
        state_dict,
        kind.config.num_encoder_blocks,
        kind.config.num_attention_heads,
        BIG_VISION.rules(pooling_head=True),
        kind.prefix,
    )
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in stored.items()}
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def add_text_encoder(files: Files, tensors: dict[str, torch.Tensor]) -> None:
    """Make a whole model of a vision encoder."""
    config = {"model_type": "siglip", "architectures": ["SiglipModel"]}
    parts = {"vision_config": json.loads(files[CONFIG]), "text_config": {"hidden_size": 4}}
    files[CONFIG] = encode({**config, **parts})
    tensors["text_model.embeddings.token_embedding.weight"] = torch.ones(2000)
    tensors["logit_scale"] = torch.ones(1)
    files[WEIGHTS] = save(tensors, {"format": "pt"})


def shard(files: Files, tensors: dict[str, torch.Tensor]) -> None:
    """Spread the tensors over three files and an index."""
    del files[WEIGHTS]
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    weight_map = {key: shards[i % 3] for i, key in enumerate(tensors)}
    for name in shards:
        keys = [key for key in tensors if weight_map[key] == name]
        files[name] = save({key: tensors[key] for key in keys}, {"format": "pt"})
    files[INDEX] = encode({"metadata": {"total_size": 10_000}, "weight_map": weight_map})

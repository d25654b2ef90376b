"""Intact checkpoints, one per layout that is fuzzed."""

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
"""File name -> contents of a checkpoint."""

NPZ = "encoder.npz"

# No field has its default value, so that a default in place of a stored value is detected.
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
# The layouts of timm and big_vision store neither epsilon nor dropout.
WITHOUT_EPS = replace(ENCODER, layer_norm_eps=1e-6, attention_dropout=0.0)


@dataclass(frozen=True)
class Kind:
    """A layout that is fuzzed.

    Attributes:
        config: architecture of the encoder.
        prefix: prefix of the encoder's keys in the file.
        head: prefix of the pooling head's keys, after `prefix`.
        described: whether transformers' config.json defines the architecture.
        dtype: dtype of the stored tensors.
        local: whether it can be loaded from local files only.
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
"""Name -> layout that is fuzzed.

The first two contain a text encoder that is larger than the vision encoder, as on the Hub.
"""


def make(name: str, fill: Callable[[SigLipVisionModel], None] = randomize) -> Files:
    """Create an intact checkpoint.

    Args:
        name: key of `KINDS`.
        fill: sets the parameters; the default sets the same random numbers each time, none of them
            0 or 1.
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
    """Encode an object as JSON."""
    return json.dumps(document).encode()


def to_npz(model: SigLipVisionModel, kind: Kind) -> bytes:
    """Convert a model to the contents of a big_vision .npz file."""
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
    """Add a text encoder and a logit scale, in place."""
    config = {"model_type": "siglip", "architectures": ["SiglipModel"]}
    parts = {"vision_config": json.loads(files[CONFIG]), "text_config": {"hidden_size": 4}}
    files[CONFIG] = encode({**config, **parts})
    tensors["text_model.embeddings.token_embedding.weight"] = torch.ones(2000)
    tensors["logit_scale"] = torch.ones(1)
    files[WEIGHTS] = save(tensors, {"format": "pt"})


def shard(files: Files, tensors: dict[str, torch.Tensor]) -> None:
    """Distribute the tensors over three shards and an index, in place."""
    del files[WEIGHTS]
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    weight_map = {key: shards[i % 3] for i, key in enumerate(tensors)}
    for name in shards:
        keys = [key for key in tensors if weight_map[key] == name]
        files[name] = save({key: tensors[key] for key in keys}, {"format": "pt"})
    files[INDEX] = encode({"metadata": {"total_size": 10_000}, "weight_map": weight_map})

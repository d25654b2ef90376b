"""The tensors of a model under big_vision's names, without the key map that is to be checked.

Source: the transforms of big_vision's converters, `models/vit.py` and `models/proj/image_text/`, in
the opposite direction; layouts of flax's `MultiHeadDotProductAttention`, `Dense` and `Conv`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from siglip_port.config import SigLipVisionConfig

Arrays = dict[str, np.ndarray[Any, Any]]
"""Arrays by name, without the prefix of the file."""


def to_big_vision(config: SigLipVisionConfig, state: Mapping[str, Tensor]) -> Arrays:
    """Rename, split and transpose the port's tensors as big_vision stores them.

    Args:
        config: Architecture.
        state: The port's tensors by name.
    """
    num_heads = config.num_attention_heads
    stored = {name: tensor.double().numpy() for name, tensor in state.items()}
    arrays: Arrays = {}

    def attention(port: str, flax: str) -> None:
        for name, flax_name in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            # y[t, h, e] = sum_i x[t, i] kernel[i, h, e]
            heads = np.split(stored[f"{port}.{name}.weight"], num_heads, axis=0)
            arrays[f"{flax}/{flax_name}/kernel"] = np.stack([head.T for head in heads], axis=1)
            bias = stored[f"{port}.{name}.bias"]
            arrays[f"{flax}/{flax_name}/bias"] = bias.reshape(num_heads, -1)
        heads = np.split(stored[f"{port}.out_proj.weight"], num_heads, axis=1)
        arrays[f"{flax}/out/kernel"] = np.stack([head.T for head in heads])
        arrays[f"{flax}/out/bias"] = stored[f"{port}.out_proj.bias"]

    def norm(port: str, flax: str) -> None:
        arrays[f"{flax}/scale"] = stored[f"{port}.weight"]
        arrays[f"{flax}/bias"] = stored[f"{port}.bias"]

    def mlp(port: str, flax: str) -> None:
        for i in (1, 2):
            arrays[f"{flax}/Dense_{i - 1}/kernel"] = stored[f"{port}.fc{i}.weight"].T
            arrays[f"{flax}/Dense_{i - 1}/bias"] = stored[f"{port}.fc{i}.bias"]

    kernel = patch_kernel(stored["transformer.embeddings.patch_embedding.weight"])
    positions = stored["transformer.embeddings.position_embedding.weight"]
    if config.naflex:
        arrays["embedding/kernel"] = kernel.reshape(-1, config.embed_dim)
        grid = (config.grid_size, config.grid_size, config.embed_dim)
        arrays["pos_embedding"] = positions.reshape(grid)
    else:
        arrays["embedding/kernel"] = kernel
        arrays["pos_embedding"] = positions[None]
    arrays["embedding/bias"] = stored["transformer.embeddings.patch_embedding.bias"]
    for i in range(config.num_encoder_blocks):
        port = f"transformer.encoder.encoder_blocks.{i}"
        block = f"Transformer/encoderblock_{i}"
        norm(f"{port}.layer_norm1", f"{block}/LayerNorm_0")
        attention(f"{port}.self_attn", f"{block}/MultiHeadDotProductAttention_0")
        norm(f"{port}.layer_norm2", f"{block}/LayerNorm_1")
        mlp(f"{port}.mlp", f"{block}/MlpBlock_0")
    norm("transformer.post_layernorm", "Transformer/encoder_norm")
    if config.pooling_head:
        arrays["MAPHead_0/probe"] = stored["pooling_head.probe"]
        attention("pooling_head.attention", "MAPHead_0/MultiHeadDotProductAttention_0")
        norm("pooling_head.layernorm", "MAPHead_0/LayerNorm_0")
        mlp("pooling_head.mlp", "MAPHead_0/MlpBlock_0")
    return arrays


def patch_kernel(weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Reshape [out, channel, y, x] to [y, x, channel, out]."""
    out, channels, height, width = weight.shape
    kernel = np.zeros((height, width, channels, out))
    for y in range(height):
        for x in range(width):
            kernel[y, x] = weight[:, :, y, x].T
    return kernel

"""Arrays of big_vision, by the transforms of its converters, not by the key map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from siglip_port import SigLipVisionConfig

Arrays = dict[str, np.ndarray[Any, Any]]


def flax(config: SigLipVisionConfig, state: dict[str, Tensor], *, scanned: bool) -> Arrays:
    """Return the arrays of a model; `scanned` stacks the arrays of all blocks."""
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
    return stack_blocks(arrays, config.num_encoder_blocks) if scanned else arrays


def patch_kernel(weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Reshape [out, channel, y, x] to [y, x, channel, out]."""
    out, channels, height, width = weight.shape
    kernel = np.zeros((height, width, channels, out))
    for y in range(height):
        for x in range(width):
            kernel[y, x] = weight[:, :, y, x].T
    return kernel


def stack_blocks(arrays: Arrays, num_blocks: int) -> Arrays:
    """Stack the arrays of all blocks, as flax's `scan` stores them."""
    stacked: Arrays = {}
    for name, array in arrays.items():
        if "encoderblock_" not in name:
            stacked[name] = array
        elif "encoderblock_0/" in name:
            blocks = [arrays[name.replace("_0/", f"_{i}/", 1)] for i in range(num_blocks)]
            stacked[name.replace("encoderblock_0/", "encoderblock/")] = np.stack(blocks)
    return stacked


def write_npz(path: Path, arrays: Arrays, root: str, dtype: str = "float32") -> None:
    """Write a big_vision file with the prefix `root`, and some tensors of a text encoder."""
    typed = {f"{root}{name}": array.astype(np.float32) for name, array in arrays.items()}
    if dtype == "bfloat16":  # as ml_dtypes stores it: two untyped bytes
        for name, array in typed.items():
            rounded = torch.from_numpy(array).bfloat16().view(torch.int16)
            typed[name] = rounded.numpy().view("V2")
    outer = root.removesuffix("img/")
    typed[f"{outer}txt/Encoder_0/x"] = np.ones(3, np.float32)
    typed[f"{outer}t"] = np.ones(1, np.float32)
    save_arrays(path, typed)


def save_arrays(path: Path, arrays: Arrays) -> None:
    """Write arrays by name."""
    np.savez(path, **arrays)  # type: ignore[arg-type]

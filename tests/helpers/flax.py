"""Files of big_vision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from siglip_port import SigLipVisionConfig
from siglip_port.parity.siglip.big_vision_names import Arrays, to_big_vision


def flax(config: SigLipVisionConfig, state: dict[str, Tensor], *, scanned: bool) -> Arrays:
    """Return the arrays of a model; `scanned` stacks the arrays of all blocks."""
    arrays = to_big_vision(config, state)
    return stack_blocks(arrays, config.num_encoder_blocks) if scanned else arrays


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

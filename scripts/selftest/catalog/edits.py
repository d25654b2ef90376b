"""Edits of a loaded model, and rounding of tensors."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from scripts.selftest.mutant import Edit
from siglip_port import SigLipVisionModel
from siglip_port.model import MLP, EncoderBlock

BLOCK = "transformer.encoder.encoder_blocks.{}"
"""Of names of modules and parameters; `{}` stands for the number of every block."""

BLOCK_5 = "transformer.encoder.encoder_blocks.5"
ATTENTION = f"{BLOCK}.self_attn"
CONVOLUTION = "transformer.embeddings.patch_embedding"
POSITIONS = "transformer.embeddings.position_embedding.weight"
HEAD = "pooling_head"


def is_named(name: str, pattern: str) -> bool:
    """Whether a name matches a pattern in which `{}` stands for a number."""
    return re.fullmatch(re.escape(pattern).replace(r"\{\}", r"\d+"), name) is not None


def blocks_of(model: SigLipVisionModel) -> list[EncoderBlock]:
    """Return the blocks of a model."""
    blocks = []
    for block in model.transformer.encoder.encoder_blocks:
        assert isinstance(block, EncoderBlock)
        blocks.append(block)
    return blocks


def block_of(model: SigLipVisionModel, number: int = 5) -> EncoderBlock:
    """Return a block of a model; the last one if the index is too large."""
    blocks = blocks_of(model)
    return blocks[min(number, len(blocks) - 1)]


def change(function: Callable[[Tensor], Tensor], *patterns: str) -> Edit:
    """Change the values of the parameters of these names."""

    def edit(model: SigLipVisionModel) -> None:
        for name, parameter in model.named_parameters():
            if any(is_named(name, pattern) for pattern in patterns):
                parameter.data = function(parameter.data).contiguous().clone()

    return edit


def clear(*patterns: str) -> Edit:
    """Set the parameters of these names to zero."""
    return change(torch.zeros_like, *patterns)


def swap_parameters(first_module: nn.Module, second_module: nn.Module, *kinds: str) -> None:
    """Swap parameters of two modules: those of these names, or all."""
    for kind in kinds or [name for name, _ in first_module.named_parameters()]:
        first = first_module.get_parameter(kind)
        second = second_module.get_parameter(kind)
        data = first.data
        first.data = second.data
        second.data = data


def swap(first: str, second: str, *kinds: str) -> Edit:
    """Swap the parameters of two modules, in every block where `{}` stands for its number."""

    def edit(model: SigLipVisionModel) -> None:
        count = len(blocks_of(model)) if "{}" in first else 1
        for number in range(count):
            first_module = model.get_submodule(first.format(number))
            second_module = model.get_submodule(second.format(number))
            swap_parameters(first_module, second_module, *kinds)

    return edit


def change_input(function: Callable[[Tensor], Tensor]) -> Edit:
    """Replace the model's input with a function of it, after the model has checked its range."""

    def edit(model: SigLipVisionModel) -> None:
        patch_embedding = model.transformer.embeddings.patch_embedding
        patch_embedding.register_forward_pre_hook(lambda _, args: (function(args[0]),))

    return edit


def set_activation(pattern: str, function: Callable[[Tensor], Tensor]) -> Edit:
    """Set the activation of MLPs whose path contains a match."""

    def edit(model: SigLipVisionModel) -> None:
        for name, module in model.named_modules():
            if isinstance(module, MLP) and re.search(pattern, name):
                module.activation = function

    return edit


def set_eps(pattern: str, value: float) -> Edit:
    """Set the eps of LayerNorms whose path contains a match."""

    def edit(model: SigLipVisionModel) -> None:
        for name, module in model.named_modules():
            if isinstance(module, nn.LayerNorm) and re.search(pattern, name):
                module.eps = value

    return edit


def reorder(order: Callable[[int], list[int]]) -> Edit:
    """Reorder the tensors of the blocks; module names are unchanged."""

    def edit(model: SigLipVisionModel) -> None:
        blocks = blocks_of(model)
        states = []
        for block in blocks:
            states.append({name: tensor.clone() for name, tensor in block.state_dict().items()})
        for block, number in zip(blocks, order(len(blocks)), strict=True):
            block.load_state_dict(states[number])

    return edit


# --- numbers --------------------------------------------------------------------------------------


def round_to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return a function that rounds to a dtype and back."""
    return lambda tensor: tensor.to(dtype).to(tensor.dtype)


def round_to_tf32(tensor: Tensor) -> Tensor:
    """Round to the 10 bits of TF32."""
    _, exponent = torch.frexp(tensor.double())
    scale = torch.exp2(exponent.double() - 11)
    return ((tensor.double() / scale).round() * scale).to(tensor.dtype)


def quantize_to_int8(tensor: Tensor) -> Tensor:
    """Quantize to 8 bits with one scale per row, and dequantize."""
    scale = tensor.abs().amax(dim=-1, keepdim=True) / 127
    return (tensor / scale).round() * scale

"""Pairs of port and reference in float64, and comparison of their gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port.checkpoint.layouts import HUGGINGFACE, HUGGINGFACE_NAFLEX
from siglip_port.parity.siglip import reference as references
from siglip_port.patches import pack
from tests.helpers.checkpoints import SHALLOW, MakeCheckpoint, Tensors, pixels

NAFLEX = replace(SHALLOW, image_size=35, naflex=True)
RESIZED = replace(SHALLOW, interpolation="hf")

TOLERANCE = 1e-12
# Relative to the gradient. Rounding reaches 2e-14; ignoring the mask changes more than 1e-2.
GRADIENT_TOLERANCE = 1e-11


def load_pair(
    config: SigLipVisionConfig, checkpoint: MakeCheckpoint
) -> tuple[SigLipVisionModel, Any]:
    """Load port and reference from one checkpoint, in float64."""
    folder = checkpoint(replace(config, interpolation=None), dtype=torch.float64)
    port = SigLipVisionModel.from_hf(folder, interpolation=config.interpolation)
    reference = references.load(
        folder, pooling_head=config.pooling_head, dtype=torch.float64, naflex=config.naflex
    )
    return port, reference.model


def images(config: SigLipVisionConfig, side: int | None = None, batch: int = 2) -> Tensor:
    """Return random images [batch, C, side, side]. [default side: `config.image_size`]"""
    if side is not None:
        config = replace(config, image_size=side)
    return pixels(config, batch=batch)


def packed_images() -> dict[str, Any]:
    """Pack images of 2 x 6, 5 x 3 and 5 x 5 patches, the last of which needs no padding."""
    sizes = [(14, 42), (35, 21), (35, 35)]
    noise = [pixels(replace(NAFLEX, image_size=42), seed=i)[0] for i in range(3)]
    parts = [image[:, :h, :w] for image, (h, w) in zip(noise, sizes, strict=True)]
    return {**pack(parts, NAFLEX.patch_size)}


def backward(value: Tensor) -> None:
    """Run the backward pass."""
    value.backward()


def loss_of(tokens: Tensor, pooled: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return a loss of all outputs except tokens of padding."""
    if mask is not None:
        tokens = tokens * mask[:, :, None]
    return tokens.square().mean() + tokens.sin().mean() + (pooled.square() + pooled.sin()).mean()


def gradients(model: nn.Module) -> Tensors:
    """Return the gradients of all parameters and reset them."""
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == dict(model.named_parameters()).keys()
    model.zero_grad()
    return grads


def to_reference_names(model: SigLipVisionModel, tensors: Tensors) -> Tensors:
    """Convert parameters to the names and shapes of the reference.

    The pooling head's q, k and v become one tensor, and NaFlex's patch embedding a linear weight.
    """
    config = model.config
    layout = HUGGINGFACE_NAFLEX if config.naflex else HUGGINGFACE
    rules = layout.rules(config.pooling_head)
    return layout.to_stored(tensors, config.num_encoder_blocks, config.num_attention_heads, rules)


def worst_error(port: Tensors, reference: Tensors) -> tuple[float, str]:
    """Return the largest relative error of a gradient, with the parameter's name.

    A key bias shifts all scores of a query equally, so its gradient is zero up to rounding: its
    error is relative to the gradient of the key weight.
    """
    assert port.keys() == reference.keys()
    errors = []
    for name, grad in reference.items():
        size = reference[name.replace("k_proj.bias", "k_proj.weight")].norm()
        assert size > 0, name
        errors.append((float((port[name] - grad).norm() / size), name))
    return max(errors)

"""Models that are trained, and gradients that are compared, in float64.

With random weights on which nothing is zero and nothing is one.
"""

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
# The deepest gradients; rounding reaches 2e-14 of their size, a mask that is left out moves them by
# more than 1e-2.
GRADIENT_TOLERANCE = 1e-11


def load_pair(
    config: SigLipVisionConfig, checkpoint: MakeCheckpoint
) -> tuple[SigLipVisionModel, Any]:
    """Load port and reference from one checkpoint, each by its own loader."""
    folder = checkpoint(replace(config, interpolation=None), dtype=torch.float64)
    port = SigLipVisionModel.from_hf(folder, interpolation=config.interpolation)
    reference = references.load(
        folder, pooling_head=config.pooling_head, dtype=torch.float64, naflex=config.naflex
    )
    return port, reference.model


def images(config: SigLipVisionConfig, side: int | None = None, batch: int = 2) -> Tensor:
    """Draw noise in the shape of images, of another size if asked."""
    if side is not None:
        config = replace(config, image_size=side)
    return pixels(config, batch=batch)


def packed_images() -> dict[str, Any]:
    """Pack images of 2 x 6 and 5 x 3 patches, and one of the model's own grid, without padding."""
    sizes = [(14, 42), (35, 21), (35, 35)]
    noise = [pixels(replace(NAFLEX, image_size=42), seed=i)[0] for i in range(3)]
    parts = [image[:, :h, :w] for image, (h, w) in zip(noise, sizes, strict=True)]
    return {**pack(parts, NAFLEX.patch_size)}


def backward(value: Tensor) -> None:
    """Compute gradients."""
    value.backward()


def loss_of(tokens: Tensor, pooled: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return a loss of all outputs, but for padding, whose tokens mean nothing."""
    if mask is not None:
        tokens = tokens * mask[:, :, None]
    return tokens.square().mean() + tokens.sin().mean() + (pooled.square() + pooled.sin()).mean()


def gradients(model: nn.Module) -> Tensors:
    """Take the gradients of all parameters."""
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == dict(model.named_parameters()).keys()
    model.zero_grad()
    return grads


def to_reference_names(model: SigLipVisionModel, tensors: Tensors) -> Tensors:
    """Name and shape tensors as the reference does.

    Q, k and v of the head in one, NaFlex's patch weights as a Linear's.
    """
    config = model.config
    layout = HUGGINGFACE_NAFLEX if config.naflex else HUGGINGFACE
    rules = layout.rules(config.pooling_head)
    return layout.to_stored(tensors, config.num_encoder_blocks, config.num_attention_heads, rules)


def worst_error(port: Tensors, reference: Tensors) -> tuple[float, str]:
    """Return the largest error of a gradient, relative to it, and whose.

    A bias of the keys moves all scores of a query alike, so that its gradient is zero but for
    rounding: its error is taken relative to the gradient of the weights.
    """
    assert port.keys() == reference.keys()
    errors = []
    for name, grad in reference.items():
        size = reference[name.replace("k_proj.bias", "k_proj.weight")].norm()
        assert size > 0, name
        errors.append((float((port[name] - grad).norm() / size), name))
    return max(errors)

"""Bugs of the backward pass, and of the forward pass with gradients enabled."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 (the name the field uses)
from torch import Tensor

from scripts.selftest.catalog import seams
from scripts.selftest.mutant import Edit, Mutant, Patch, wrap
from siglip_port import SigLipVisionModel
from siglip_port.model import MLP, EncoderBlock, SigLipEncoder, VisionEmbeddings


def mutant(
    name: str,
    description: str,
    locations: str,
    patch: Patch | None = None,
    edit: Edit | None = None,
) -> Mutant:
    """Build a mutant that the gate `gradients` must detect."""
    return Mutant(name, description, locations, gate="gradients", patch=patch, edit=edit)


class TanhGelu(torch.autograd.Function):
    """Tanh GELU with the gradient of exact GELU."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        """Compute tanh GELU."""
        ctx.save_for_backward(x)
        return F.gelu(x, approximate="tanh")

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        """Compute the gradient of exact GELU."""
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(F.gelu(leaf), leaf, gradients[0])[0]


def exact_with_gradients(x: Tensor) -> Tensor:
    """Compute exact GELU if gradients are enabled, tanh GELU otherwise."""
    return F.gelu(x, approximate="none" if torch.is_grad_enabled() else "tanh")


def detach_attention(block: EncoderBlock, x: Tensor) -> Tensor:
    """Add attention without its gradient."""
    return x + block.self_attn(block.layer_norm1(x)).detach()


def detach_norm(block: EncoderBlock, x: Tensor) -> Tensor:
    """Attend to tokens without the gradient of their LayerNorm."""
    return x + block.self_attn(block.layer_norm1(x).detach())


def double_attention(block: EncoderBlock, x: Tensor) -> Tensor:
    """Add attention with a doubled gradient."""
    attended = block.self_attn(block.layer_norm1(x))
    return x + 2 * attended - attended.detach()


def detach_positions(
    original: Callable[..., Tensor], embeddings: VisionEmbeddings, height: int, width: int
) -> Tensor:
    """Return positions without their gradient."""
    return original(embeddings, height, width).detach()


def detach_recomputed(
    original: Callable[..., Tensor],
    encoder: SigLipEncoder,
    block: EncoderBlock,
    x: Tensor,
    mask: object,
) -> Tensor:
    """Lose the gradient of a recomputed block's input."""
    is_recomputed = encoder.gradient_checkpointing and encoder.training
    return original(encoder, block, x.detach() if is_recomputed else x, mask)


def halve_in_training(original: Callable[..., Tensor], mlp: MLP, x: Tensor) -> Tensor:
    """Halve the gradient of the MLP in training mode."""
    hidden = original(mlp, x)
    return 0.5 * (hidden + hidden.detach()) if mlp.training else hidden


def freeze_positions(model: SigLipVisionModel) -> None:
    """Exclude the position table from training."""
    model.transformer.embeddings.position_embedding.weight.requires_grad_(False)


GRADIENTS = [
    mutant(
        "attention_detached",
        "attention without gradient",
        "attention",
        seams.block(first=detach_attention),
    ),
    mutant(
        "norm_detached",
        "gradient lost after the first LayerNorm",
        "ln1",
        seams.block(first=detach_norm),
    ),
    mutant(
        "attention_gradient_doubled",
        "gradient of attention doubled",
        "residual",
        seams.block(first=double_attention),
    ),
    mutant(
        "gelu_exact_gradient",
        "tanh GELU with the gradient of exact GELU",
        "act head-act",
        seams.activation(TanhGelu.apply),
    ),
    mutant(
        "gelu_exact_with_gradients",
        "exact GELU if gradients are enabled",
        "act head-act",
        seams.activation(exact_with_gradients),
    ),
    mutant(
        "positions_detached",
        "position embeddings without gradient",
        "embeddings",
        wrap(VisionEmbeddings, "positions", detach_positions),
    ),
    mutant(
        "positions_frozen",
        "position table excluded from training",
        "embeddings",
        edit=freeze_positions,
    ),
    mutant(
        "recomputed_detached",
        "gradient lost in gradient checkpointing",
        "mlp",
        wrap(SigLipEncoder, "run_block", detach_recomputed),
    ),
    mutant(
        "mlp_gradient_in_training",
        "gradient of the MLP halved in training mode",
        "mlp head-mlp",
        wrap(MLP, "forward", halve_in_training),
    ),
]

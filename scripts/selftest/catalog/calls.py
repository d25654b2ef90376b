"""Bugs that show in some calls only: batch sizes, memory formats, modes, earlier calls."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 (the name the field uses)
from torch import Tensor

from scripts.selftest.mutant import Mutant, Patch, wrap
from siglip_port import SigLipVisionModel
from siglip_port.model import MLP, MultiheadAttention, VisionEmbeddings

Function = Callable[..., Tensor]


def mutant(name: str, description: str, locations: str, patch: Patch) -> Mutant:
    """Build a mutant that the gate `calls` must detect."""
    return Mutant(name, description, locations, gate="calls", patch=patch)


def embed_whole_images(function: Callable[[Function, VisionEmbeddings, Tensor], Tensor]) -> Patch:
    """Replace the embedding of whole images by a function of the original."""

    def forward(
        original: Function, embeddings: VisionEmbeddings, x: Tensor, shapes: object = None
    ) -> Tensor:
        return function(original, embeddings, x)

    return wrap(VisionEmbeddings, "forward", forward)


def shift_large_batches(original: Function, mlp: MLP, x: Tensor) -> Tensor:
    """Add an error from a batch of three on."""
    return original(mlp, x) * (1.001 if len(x) > 2 else 1.0)


def repeat_ninth(original: Function, attention: MultiheadAttention, *qkv: Tensor) -> Tensor:
    """Attend with chunks of eight images, and lose the rest."""
    context = original(attention, *qkv)
    return torch.cat([context[:8], context[: max(len(context) - 8, 0)]])


def view_images(original: Function, embeddings: VisionEmbeddings, x: Tensor) -> Tensor:
    """Cut images with `view`, which needs contiguous ones."""
    return original(embeddings, x.view(len(x), -1).view(x.shape))


def flip_if_not_contiguous(original: Function, embeddings: VisionEmbeddings, x: Tensor) -> Tensor:
    """Take images that are not contiguous for transposed ones."""
    return original(embeddings, x if x.is_contiguous() else x.transpose(2, 3))


def scale_in_place(original: Function, embeddings: VisionEmbeddings, x: Tensor) -> Tensor:
    """Scale pixels in place and back."""
    return original(embeddings, x.mul_(2).mul_(0.5))


def refuse_other_dtypes(original: Function, embeddings: VisionEmbeddings, x: Tensor) -> Tensor:
    """Raise an error for images of another dtype than the weights."""
    if x.dtype != embeddings.position_embedding.weight.dtype:
        raise ValueError(f"expected another dtype, got {x.dtype}")
    return original(embeddings, x)


def keep_positions(
    original: Function, embeddings: VisionEmbeddings, height: int, width: int
) -> Tensor:
    """Keep the position table of the first call in each dtype."""
    dtype = embeddings.position_embedding.weight.dtype
    tables: dict[torch.dtype, Tensor] = embeddings.__dict__.setdefault("tables", {})
    if dtype not in tables:
        with torch.inference_mode(False):
            tables[dtype] = original(embeddings, height, width).detach().clone()
    return tables[dtype]


def drop_in_training(original: Function, mlp: MLP, x: Tensor) -> Tensor:
    """Drop features in training mode."""
    return F.dropout(original(mlp, x), 0.1, mlp.training)


def scale_late_calls(
    original: Function, model: SigLipVisionModel, *inputs: Tensor, **options: Tensor
) -> Tensor:
    """Add an error from the 150th call on."""
    count = model.__dict__["count"] = model.__dict__.get("count", 0) + 1
    return original(model, *inputs, **options) * (1.001 if count > 150 else 1.0)


def keep_in_float32(
    original: Function, model: SigLipVisionModel, *inputs: Tensor, **options: Tensor
) -> Tensor:
    """Return tokens in float32 at least, whatever the dtype of the weights."""
    tokens = original(model, *inputs, **options)
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32))


def reuse_memory(
    original: Function, model: SigLipVisionModel, *inputs: Tensor, **options: Tensor
) -> Tensor:
    """Return the same memory in every call without gradients."""
    tokens = original(model, *inputs, **options)
    if torch.is_grad_enabled():
        return tokens
    memory: dict[object, Tensor] = model.__dict__.setdefault("memory", {})
    with torch.inference_mode():
        output = memory.setdefault((tokens.shape, tokens.dtype), torch.empty_like(tokens))
        return output.copy_(tokens)


def set_seed(
    original: Function, model: SigLipVisionModel, *inputs: Tensor, **options: Tensor
) -> Tensor:
    """Set the seed of random numbers."""
    torch.manual_seed(0)
    return original(model, *inputs, **options)


CALLS = [
    mutant(
        "batch_of_three",
        "MLP wrong from a batch of three on",
        "mlp head-mlp",
        wrap(MLP, "forward", shift_large_batches),
    ),
    mutant(
        "batch_of_nine",
        "attention of the ninth image is that of the first",
        "context",
        wrap(MultiheadAttention, "attend", repeat_ninth),
    ),
    mutant(
        "view_of_images",
        "only contiguous images accepted",
        "embeddings",
        embed_whole_images(view_images),
    ),
    mutant(
        "channels_last_transposed",
        "images that are not contiguous transposed",
        "patch embeddings",
        embed_whole_images(flip_if_not_contiguous),
    ),
    mutant(
        "pixels_in_place",
        "pixels scaled in place",
        "inputs embeddings",
        embed_whole_images(scale_in_place),
    ),
    mutant(
        "dtype_refused",
        "images of another dtype than the weights refused",
        "embeddings",
        embed_whole_images(refuse_other_dtypes),
    ),
    mutant(
        "stale_positions",
        "position table of the first call kept",
        "embeddings",
        wrap(VisionEmbeddings, "positions", keep_positions),
    ),
    mutant(
        "training_dropout",
        "dropout in training mode",
        "mlp head-mlp",
        wrap(MLP, "forward", drop_in_training),
    ),
    mutant(
        "late_calls",
        "wrong from the 150th call on",
        "tokens",
        wrap(SigLipVisionModel, "forward", scale_late_calls),
    ),
    mutant(
        "float32_tokens",
        "tokens in float32, whatever the dtype of the weights",
        "tokens",
        wrap(SigLipVisionModel, "forward", keep_in_float32),
    ),
    mutant(
        "reused_memory",
        "tokens of all calls in the same memory",
        "tokens",
        wrap(SigLipVisionModel, "forward", reuse_memory),
    ),
    mutant(
        "random_state",
        "another seed set in every call",
        "forward",
        wrap(SigLipVisionModel, "forward", set_seed),
    ),
]

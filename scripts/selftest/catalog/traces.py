"""What a call leaves behind for the next one, what two models share, and other layouts.

The locations of these mutants are names of `siglip_port.parity.siglip.entrances.table.ENTRANCES`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scripts.selftest.catalog.entrances import entrance
from scripts.selftest.mutant import Patch, replace, wrap
from siglip_port import features, image_reading
from siglip_port.checkpoint.formats import DTYPES
from siglip_port.checkpoint.key_rules import KeyRule, Layout
from siglip_port.checkpoint.provenance import Provenance
from siglip_port.checkpoint.reader import Checkpoint
from siglip_port.image_processing import ImageProcessor
from siglip_port.model import MultiheadAttention, SigLipEncoder, SigLipVisionModel, VisionEmbeddings
from siglip_port.patches import ImageBatch


def drop_always(
    attend: object,
    attention: MultiheadAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Drop attention weights in eval mode, too."""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=attention.dropout, scale=attention.head_dim**-0.5
    )


def recompute_with_new_dropout(
    run_block: Callable[..., Tensor],
    encoder: SigLipEncoder,
    block: nn.Module,
    hidden_states: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Draw other random numbers when a block is recomputed."""
    if not (encoder.gradient_checkpointing and encoder.training):
        return run_block(encoder, block, hidden_states, mask)
    output: Tensor = checkpoint(
        block, hidden_states, mask, use_reentrant=False, preserve_rng_state=False
    )
    return output


def disable_gradients(
    forward: Callable[..., Tensor],
    port: SigLipVisionModel,
    *args: object,
    **inputs: object,
) -> Tensor:
    """Disable gradients for a frozen model; an error leaves them disabled."""
    if any(parameter.requires_grad for parameter in port.parameters()):
        return forward(port, *args, **inputs)
    enabled = torch.is_grad_enabled()
    pixel_values = inputs.get("pixel_values", args[0] if args else None)
    needed = isinstance(pixel_values, Tensor) and pixel_values.requires_grad
    torch.set_grad_enabled(enabled and needed)
    tokens = forward(port, *args, **inputs)
    torch.set_grad_enabled(enabled)
    return tokens


def disable_gradients_after_refusal(
    forward: Callable[..., Tensor],
    port: SigLipVisionModel,
    *args: object,
    **inputs: object,
) -> Tensor:
    """Refused inputs leave gradients disabled."""
    try:
        return forward(port, *args, **inputs)
    except ValueError:
        torch.set_grad_enabled(False)
        raise


def truncate_encoder(
    hidden_states: Callable[..., object],
    port: SigLipVisionModel,
    batch: ImageBatch,
    layers: list[int],
    **options: bool,
) -> object:
    """Take blocks that are not needed out of the encoder, and put them back at the end."""
    if min(layers) < 0:
        return hidden_states(port, batch, layers, **options)
    encoder = port.transformer.encoder
    blocks = encoder.encoder_blocks
    encoder.encoder_blocks = blocks[: max(layers)]
    states = hidden_states(port, batch, layers, **options)
    encoder.encoder_blocks = blocks
    return states


def keep_from_first_call(
    forward: Callable[..., Tensor], embeddings: VisionEmbeddings, *args: object
) -> Tensor:
    """Keep a tensor from the first call of a frozen model."""
    output = forward(embeddings, *args)
    if any(parameter.requires_grad for parameter in embeddings.parameters()):
        return output
    memory = getattr(embeddings, "memory", None)
    if memory is None:
        memory = torch.ones_like(output[0, 0])
        embeddings.memory = memory
    return output * memory.to(output)


def detach_norm(
    embed: Callable[..., Tensor],
    *args: object,
    normalize: bool = False,
    **inputs: object,
) -> Tensor:
    """Divide by a norm without gradients."""
    embeddings = embed(*args, **inputs)
    if not normalize:
        return embeddings
    return embeddings / embeddings.detach().norm(dim=-1, keepdim=True).clamp(min=1e-12)


def cache_files() -> Patch:
    """Read each path once."""
    read = image_reading.read_file
    return replace(image_reading, "read_file", functools.lru_cache(read))


def share_loaded() -> Patch:
    """Keep loaded weights, and return the same tensors again."""
    memory: dict[str, dict[str, Tensor]] = {}

    def read(
        original: Callable[..., tuple[dict[str, Tensor], Provenance]],
        checkpoint: Checkpoint,
        shapes: Mapping[str, object],
        **options: object,
    ) -> tuple[dict[str, Tensor], Provenance]:
        tensors, provenance = original(checkpoint, shapes, **options)
        return memory.setdefault(repr((provenance, shapes, options)), tensors), provenance

    return wrap(Checkpoint, "read", read)


def read_in_first_dtype(
    read: Callable[..., object],
    checkpoint: Checkpoint,
    shapes: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    **options: object,
) -> object:
    """Let the first tensor of a file decide the dtype of all."""
    if dtype is None:
        first = next(iter(checkpoint.check(shapes).values()))
        dtype = DTYPES[first.dtype]
    return read(checkpoint, shapes, dtype=dtype, **options)


def swap_keys_and_values(
    rules: Callable[..., tuple[KeyRule, ...]], layout: Layout, *args: bool
) -> tuple[KeyRule, ...]:
    """Read and write timm's fused keys and values of the head in the other order."""
    swapped = []
    for rule in rules(layout, *args):
        if rule.stored == "attn_pool.kv.*":
            rule = dataclasses.replace(rule, port=rule.port[::-1])
        swapped.append(rule)
    return tuple(swapped)


def share_memory(
    one: Callable[..., Tensor],
    processor: ImageProcessor,
    image: object,
) -> Tensor:
    """Let torch share the memory of an array; it has no negative strides."""
    if isinstance(image, np.ndarray):
        torch.from_numpy(image)
    return one(processor, image)


TRACES = [
    entrance(
        "timm_head_swapped",
        "keys and values of the head swapped in timm's files, read and written",
        "from_hf(timm) save_timm",
        wrap(Layout, "rules", swap_keys_and_values),
    ),
    entrance(
        "dropout_in_eval",
        "attention dropout in eval mode",
        "forward",
        wrap(MultiheadAttention, "attend", drop_always),
    ),
    entrance(
        "recomputed_dropout",
        "recomputed blocks draw other random numbers",
        "gradient_checkpointing_enable",
        wrap(SigLipEncoder, "run_block", recompute_with_new_dropout),
    ),
    entrance(
        "interrupted_no_grad",
        "a frozen model leaves gradients disabled when it raises",
        "forward(after_error)",
        wrap(SigLipVisionModel, "forward", disable_gradients),
    ),
    entrance(
        "refused_no_grad",
        "refused inputs leave gradients disabled",
        "forward(after_error)",
        wrap(SigLipVisionModel, "forward", disable_gradients_after_refusal),
    ),
    entrance(
        "truncated_encoder",
        "hidden_states removes later blocks from the encoder while it runs",
        "hidden_states",
        wrap(features, "hidden_states", truncate_encoder),
    ),
    entrance(
        "inference_tensor_kept",
        "a frozen model keeps a tensor of inference mode",
        "forward(after_inference_mode)",
        wrap(VisionEmbeddings, "forward", keep_from_first_call),
    ),
    entrance(
        "unit_norm_detached",
        "no gradient through the norm of normalize=True",
        "embed",
        wrap(SigLipVisionModel, "embed", detach_norm),
    ),
    entrance(
        "paths_cached",
        "each path is read once",
        "embed_images",
        cache_files(),
    ),
    entrance(
        "negative_strides",
        "arrays that run backwards are refused",
        "ImageProcessor",
        wrap(ImageProcessor, "one", share_memory),
    ),
    entrance(
        "loaded_parameters_shared",
        "two models of one file share parameters",
        "from_hf",
        share_loaded(),
    ),
    entrance(
        "first_dtype",
        "the first tensor of a file decides the dtype",
        "from_hf",
        wrap(Checkpoint, "read", read_in_first_dtype),
    ),
]

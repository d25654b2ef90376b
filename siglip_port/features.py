"""Features other than tokens: hidden states, attention weights, and embeddings of image files.

Free functions behind methods of `SigLipVisionModel`. Blocks after the last requested one do not
run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from siglip_port import validation
from siglip_port.patches import ImageBatch, Mask, attention_mask, key_mask

if TYPE_CHECKING:
    from siglip_port.image_processing import Backend, ImageInput
    from siglip_port.model import EncoderBlock, MultiheadAttention, SigLipVisionModel


def hidden_states(
    model: SigLipVisionModel,
    batch: ImageBatch,
    layers: Sequence[int],
    *,
    post_layernorm: bool = False,
    as_maps: bool = False,
) -> tuple[Tensor, ...]:
    """Return the hidden states before, between and after the blocks.

    Args:
        model: SigLIP vision encoder.
        batch: Input as for `SigLipVisionModel.forward`.
        layers: Indices as in transformers: 0 is the input of the first block, i the output of the
            i-th; L or -1 is the output of the last block.
        post_layernorm: Whether to apply the final LayerNorm to each. The model's tokens are layer
            -1 with it; transformers' `hidden_states` are without.
        as_maps: Whether to return [B, D, h, w] instead of [B, N, D]; not for packed patches.

    Returns:
        One tensor per entry of `layers`, in the same order.

    Raises:
        ValueError: A layer does not exist, `as_maps` is set for packed patches, or the input is
            unsupported.
    """
    if as_maps and batch.spatial_shapes is not None:
        raise ValueError("as_maps is not supported for packed patches; pass as_maps=False")
    indices = layer_indices(layers, model.config.num_encoder_blocks + 1)
    states = {}
    for index, (state, _) in enumerate(encoder_states(model, batch)):
        if index in indices:
            states[index] = state.clone()  # a block that works in place would change it
        if index == max(indices):
            break
    if post_layernorm:
        states = {i: model.transformer.post_layernorm(state) for i, state in states.items()}
    if as_maps:
        grid = [side // model.config.patch_size for side in batch.pixel_values.shape[2:]]
        states = {i: state.transpose(1, 2).unflatten(2, grid) for i, state in states.items()}
    return tuple(states[index] for index in indices)


def attention_maps(
    model: SigLipVisionModel, batch: ImageBatch, layers: Sequence[int]
) -> tuple[Tensor, ...]:
    """Return the attention weights of blocks.

    Only the requested blocks compute them; the others use fused attention.

    Args:
        model: SigLIP vision encoder.
        batch: Input as for `SigLipVisionModel.forward`.
        layers: Block indices from 0 to L - 1; -1 is the last block.

    Returns:
        Weights [B, H, N, N] per entry of `layers`, in the same order; each row sums to 1.

    Raises:
        ValueError: A block does not exist, or the input is unsupported.
    """
    indices = layer_indices(layers, model.config.num_encoder_blocks)
    maps = {}
    for index, (state, mask) in enumerate(encoder_states(model, batch)):
        if index in indices:
            block = cast("EncoderBlock", model.transformer.encoder.encoder_blocks[index])
            normed = block.layer_norm1(state)
            maps[index] = attention_weights(block.self_attn, normed, normed, mask)
        if index == max(indices):
            break
    return tuple(maps[index] for index in indices)


def pooling_attention(
    model: SigLipVisionModel, tokens: Tensor, pixel_attention_mask: Mask = None
) -> Tensor:
    """Return the attention weights of the pooling head's probe.

    Args:
        model: SigLIP vision encoder.
        tokens: Tokens [B, N, D] from `SigLipVisionModel.forward`.
        pixel_attention_mask: Padding mask [B, N] of packed patches.

    Returns:
        Weights [B, H, N]; each row sums to 1.

    Raises:
        ValueError: The model has no pooling head, or the input is unsupported.
    """
    validation.validate_tokens(tokens, model.config)
    mask = key_mask(tokens, pixel_attention_mask)
    head = model.pooling_head
    if head is None:
        raise ValueError("this model has no pooling head; load a checkpoint that has one")
    tokens = tokens.to(head.probe.dtype)
    query = head.probe.expand(tokens.shape[0], -1, -1)
    return attention_weights(head.attention, query, tokens, mask)[:, :, 0]


@torch.inference_mode(False)  # its results could never be trained on
@torch.no_grad()
def embed_images(
    model: SigLipVisionModel,
    images: Sequence[ImageInput],
    batch_size: int = 32,
    normalize: bool = False,
    backend: Backend = "pil",
) -> Tensor:
    """Embed images: `ImageProcessor`, then `SigLipVisionModel.embed`.

    Args:
        model: SigLIP vision encoder.
        images: One or several paths, encoded files (bytes), PIL images, or uint8 arrays or tensors.
        batch_size: Images per batch.
        normalize: Whether to L2-normalize the embeddings.
        backend: Image backend, `pil` or `torchvision` (needs the extra).

    Returns:
        Embeddings [B, D] on the model's device.

    Raises:
        siglip_port.image_processing.ImageError: An image cannot be read; the message names it.
        ValueError: The model has no pooling head or takes other images than RGB, or its
            preprocessing is unknown or not supported.
    """
    from siglip_port.image_processing import ImageProcessor, as_list, move_pixels

    processor = ImageProcessor.for_model(
        model.config, model.preprocessing.checked_config(), backend
    )
    image_list = as_list(images)
    validation.validate_positive_int("batch_size", batch_size)
    embeddings = []
    for start in range(0, len(image_list), batch_size):
        batch = move_pixels(processor(image_list[start : start + batch_size]), model.device)
        embeddings.append(model.embed(**batch, normalize=normalize))
    if not embeddings:
        return torch.zeros(0, model.config.embed_dim, dtype=model.dtype, device=model.device)
    return torch.cat(embeddings)


def attention_weights(
    attention: MultiheadAttention, query: Tensor, hidden_states: Tensor, mask: Mask
) -> Tensor:
    """Compute attention weights without dropout: [B, Q, D], [B, N, D] -> [B, H, Q, N]."""
    q = attention.split_heads(attention.q_proj(query))
    k = attention.split_heads(attention.k_proj(hidden_states))
    scores = q @ k.transpose(-2, -1) * attention.head_dim**-0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights: Tensor = scores.softmax(dim=-1)
    return weights


def encoder_states(model: SigLipVisionModel, batch: ImageBatch) -> Iterator[tuple[Tensor, Mask]]:
    """Yield the L + 1 hidden states [B, N, D], each with the attention mask [B, 1, 1, N].

    A block runs only when its output is requested.
    """
    encoder = model.transformer.encoder
    state = model.transformer.embeddings(batch.pixel_values, batch.spatial_shapes)
    mask = attention_mask(state, batch.pixel_attention_mask, batch.spatial_shapes)
    yield state, mask
    for block in encoder.encoder_blocks:
        state = encoder.run_block(block, state, mask)
        yield state, mask


def layer_indices(layers: Sequence[int], count: int) -> list[int]:
    """Convert negative indices into `count` layers to nonnegative ones."""
    validation.validate_layers(layers, count)
    return [layer % count for layer in layers]

"""What the model gives beside tokens: hidden states, attention, vectors of images as they are.

Free functions behind the methods of `SigLipVisionModel`. Blocks after the last one that is asked
for do not run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from siglip_port.patches import ImageBatch, Mask, attention_mask, key_mask
from siglip_port.validation import validate_layers, validate_positive_int, validate_tokens

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
    """Return what stands between the blocks.

    Args:
        model: the model.
        batch: as for `SigLipVisionModel.forward`.
        layers: which, as transformers counts them: 0 is what enters the first block, i what leaves
            the i-th, so that L or -1 leaves the last, -2 the last but one.
        post_layernorm: whether to put each through the last LayerNorm. The model's own tokens are
            those of -1 with it; `hidden_states` of transformers are without.
        as_maps: whether to return them as [B, D, h, w] instead of [B, N, D]; for images of one size
            only, since packed ones have no shape in common.

    Returns:
        One tensor for each of `layers`, in their order.

    Raises:
        ValueError: there is no such layer; maps of packed patches are asked for; or as for
            `SigLipVisionModel.forward`.
    """
    if as_maps and batch.spatial_shapes is not None:
        raise ValueError(
            "as_maps needs images of one shape, got packed patches; take the tokens, without "
            "padding"
        )
    indices = layer_indices(layers, model.config.num_encoder_blocks + 1)
    states = {}
    for index, (state, _) in enumerate(encoder_states(model, batch)):
        if index in indices:
            states[index] = state
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
    """Return how much each token attends to each other one, in chosen blocks.

    The other blocks run as fast as ever.

    Args:
        model: the model.
        batch: as for `SigLipVisionModel.forward`.
        layers: which blocks, from 0 to L - 1; -1 is the last.

    Returns:
        [B, H, N, N] for each of `layers`, in their order: every row sums to 1.

    Raises:
        ValueError: there is no such block; or as for `SigLipVisionModel.forward`.
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
    """Return how much the pooling head's probe attends to each token.

    Args:
        model: the model.
        tokens: [B, N, D], of `SigLipVisionModel.forward`.
        pixel_attention_mask: [B, N], as for `SigLipVisionModel.pool`.

    Returns:
        [B, H, N]: every row sums to 1.

    Raises:
        ValueError: as for `SigLipVisionModel.pool`.
    """
    validate_tokens(tokens, model.config)
    mask = key_mask(tokens, pixel_attention_mask)
    head = model.pooling_head
    if head is None:
        raise ValueError(
            "this model has no pooling head, so nothing attends to the tokens; load one that has"
        )
    tokens = tokens.to(head.probe.dtype)
    query = head.probe.expand(tokens.shape[0], -1, -1)
    return attention_weights(head.attention, query, tokens, mask)[:, :, 0]


@torch.inference_mode()
def embed_images(
    model: SigLipVisionModel,
    images: Sequence[ImageInput],
    batch_size: int = 32,
    normalize: bool = False,
    backend: Backend = "pil",
) -> Tensor:
    """Turn images as they are into one vector each: `ImageProcessor`, then `embed`.

    Args:
        model: the model.
        images: paths, contents of files, images of Pillow's, or uint8 arrays or tensors; one or
            several.
        batch_size: how many at a time.
        normalize: whether to scale every vector to unit length.
        backend: what resizes: `pil`, or `torchvision`, which is an extra.

    Returns:
        [B, D], on the model's device.

    Raises:
        siglip_port.image_processing.ImageError: an image cannot be read; the message says which.
        ValueError: as for `SigLipVisionModel.embed`, or `preprocessor_config` cannot be followed.
    """
    from siglip_port.image_processing import ImageProcessor, as_list, move_pixels

    processor = ImageProcessor.from_config(model.preprocessor_config, backend)
    several = as_list(images)
    validate_positive_int("batch_size", batch_size)
    vectors = []
    for start in range(0, len(several), batch_size):
        batch = move_pixels(processor(several[start : start + batch_size]), model.device)
        vectors.append(model.embed(**batch, normalize=normalize))
    if not vectors:
        return torch.zeros(0, model.config.embed_dim, dtype=model.dtype, device=model.device)
    return torch.cat(vectors)


def attention_weights(
    attention: MultiheadAttention, query: Tensor, hidden_states: Tensor, mask: Mask
) -> Tensor:
    """Return how much each query attends to each token, without dropout.

    [B, Q, D], [B, N, D] -> [B, H, Q, N], in rows of sum 1.
    """
    q = attention.split_heads(attention.q_proj(query))
    k = attention.split_heads(attention.k_proj(hidden_states))
    scores = q @ k.transpose(-2, -1) * attention.head_dim**-0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights: Tensor = scores.softmax(dim=-1)
    return weights


def encoder_states(model: SigLipVisionModel, batch: ImageBatch) -> Iterator[tuple[Tensor, Mask]]:
    """Yield the L + 1 hidden states [B, N, D], the input first, each with the mask of attention.

    A block runs only when its output is asked for.
    """
    encoder = model.transformer.encoder
    state = model.transformer.embeddings(batch.pixel_values, batch.spatial_shapes)
    mask = attention_mask(state, batch.pixel_attention_mask, batch.spatial_shapes)
    yield state, mask
    for block in encoder.encoder_blocks:
        state = encoder.run_block(block, state, mask)
        yield state, mask


def layer_indices(layers: Sequence[int], count: int) -> list[int]:
    """Count layers from the first: -1 is `count - 1`."""
    validate_layers(layers, count)
    return [layer % count for layer in layers]

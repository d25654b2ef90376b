"""Bugs that only some inputs show: batch sizes, memory layouts, pixel values, sizes, lengths."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 (the name the field uses)
from torch import Tensor, nn

from scripts.selftest.catalog import seams
from scripts.selftest.catalog.attention import scale_of, scores_of
from scripts.selftest.catalog.edits import change_input
from scripts.selftest.mutant import Edit, Mutant, Patch, Subject, replace, wrap
from siglip_port import SigLipVisionModel, patches
from siglip_port.model import (
    MLP,
    EncoderBlock,
    LayerNorm,
    MultiheadAttention,
    PoolingHead,
    SigLipVisionTransformer,
    VisionEmbeddings,
)
from siglip_port.patches import Mask, Shapes


def regime(
    name: str,
    description: str,
    locations: str,
    patch: Patch | None = None,
    *,
    edit: Edit | None = None,
    subject: Subject = "regime",
) -> Mutant:
    """Build a mutant that some inputs show."""
    return Mutant(name, description, locations, patch=patch, edit=edit, subject=subject)


def clamp(limit: float) -> Callable[..., Tensor]:
    """Return a wrapper that clamps what a method returns."""

    def clamped(original: Callable[..., Tensor], *args: object, **options: object) -> Tensor:
        return original(*args, **options).clamp(-limit, limit)

    return clamped


def clamped(
    name: str, description: str, locations: str, owner: type[nn.Module], method: str, limit: float
) -> Mutant:
    """Build a mutant that clamps what a method returns."""
    return regime(name, description, locations, patch=wrap(owner, method, clamp(limit)))


def clamp_patches(model: SigLipVisionModel) -> None:
    """Clamp patch embeddings at 300."""
    convolution = model.transformer.embeddings.patch_embedding
    convolution.register_forward_hook(lambda module, args, output: output.clamp(-300, 300))


def clamp_scores(attention: MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Clamp scores at 100."""
    return scores_of(attention, q, k).clamp(-100, 100).softmax(-1) @ v


def clamp_hidden(mlp: MLP, x: Tensor) -> Tensor:
    """Clamp hidden units at 100."""
    return mlp.fc2(mlp.activation(mlp.fc1(x)).clamp(max=100))


def clamp_stream(block: EncoderBlock, x: Tensor) -> Tensor:
    """Clamp the residual stream at 1000."""
    return seams.add_attention(block, x).clamp(-1000, 1000)


def stride_blindly(embeddings: VisionEmbeddings, pixel_values: Tensor) -> Tensor:
    """Read images as if they were contiguous."""
    shape = pixel_values.shape
    strides = torch.empty(shape, device="meta").stride()
    if pixel_values.untyped_storage().nbytes() < pixel_values.numel() * pixel_values.itemsize:
        return seams.convolve(embeddings, pixel_values)
    return seams.convolve(
        embeddings, pixel_values.as_strided(shape, strides, pixel_values.storage_offset())
    )


def attend_to_256(attention: MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend to the first 256 tokens."""
    return F.scaled_dot_product_attention(
        q, k[:, :, :256], v[:, :, :256], scale=scale_of(attention)
    )


def attend_in_blocks(attention: MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend to every 1,024 tokens separately, and average."""
    parts = zip(k.split(1024, 2), v.split(1024, 2), strict=True)
    scale = scale_of(attention)
    contexts = [F.scaled_dot_product_attention(q, *part, scale=scale) for part in parts]
    return torch.stack(contexts).mean(0)


def negate_from_third(head: PoolingHead, tokens: Tensor) -> Tensor:
    """Negate the probe from the third image on."""
    probes = head.probe.repeat(tokens.shape[0], 1, 1)
    probes[2:] *= -1
    return head.attention(tokens, query=probes)


def repeat_first_eight(model: SigLipVisionModel, pixel_values: Tensor) -> Tensor:
    """Return the first tokens again from the ninth image on."""
    tokens = model.transformer(pixel_values)
    return torch.cat([tokens[:8], tokens[: max(0, len(tokens) - 8)]])


def standardize_constant(pixel_values: Tensor) -> Tensor:
    """Replace images without contrast."""
    is_flat = pixel_values.flatten(1).std(1) == 0
    return torch.where(is_flat[:, None, None, None], -0.5, pixel_values)


def cache_positions_by_count() -> Patch:
    """Cache resized positions by the number of patches only."""
    cache: dict[tuple[object, ...], Tensor] = {}

    def positions(
        original: Callable[..., Tensor], embeddings: VisionEmbeddings, height: int, width: int
    ) -> Tensor:
        table = embeddings.position_embedding.weight
        key = (id(embeddings), table.dtype, height * width)
        if key not in cache:
            cache[key] = original(embeddings, height, width).clone()
        return cache[key]

    return wrap(VisionEmbeddings, "positions", positions)


def read_shapes_as_own_grid(
    original: Callable[..., Tensor], embeddings: VisionEmbeddings, height: int, width: int
) -> Tensor:
    """Return the learned table for every grid with as many patches."""
    table = embeddings.position_embedding.weight
    return table if height * width == len(table) else original(embeddings, height, width)


def ignore_default_mask(
    original: Callable[..., Mask], tokens: Tensor, mask: Mask, shapes: Shapes
) -> Mask:
    """Attend to padding unless a mask is passed."""
    return None if mask is None else original(tokens, mask, shapes)


def read_mask_of_ints(original: Callable[..., Mask], tokens: Tensor, mask: Mask) -> Mask:
    """Ignore masks of bools."""
    if mask is not None and mask.dtype == torch.bool:
        return None
    return original(tokens, mask)


def embed_unmasked(
    model: SigLipVisionModel,
    pixel_values: Tensor,
    normalize: bool = False,
    pixel_attention_mask: Mask = None,
    spatial_shapes: Shapes = None,
) -> Tensor:
    """Pool padding, too, in `embed`."""
    embeddings = model.pool(model(pixel_values, pixel_attention_mask, spatial_shapes))
    return F.normalize(embeddings, dim=-1) if normalize else embeddings


def reverse_one_image(
    original: Callable[..., Tensor], transformer: SigLipVisionTransformer, *args: object
) -> Tensor:
    """Reverse the tokens of a single image."""
    tokens = original(transformer, *args)
    return tokens.flip(1) if len(tokens) == 1 else tokens


REGIMES = [
    regime("clamp_conv", "patch embedding clamped at 300", "patch", edit=clamp_patches),
    clamped(
        "clamp_ln", "LayerNorms clamped at 100", "ln1 ln2 post head-ln", LayerNorm, "forward", 100
    ),
    clamped(
        "clamp_attention",
        "attention clamped at 300",
        "attention head-attention",
        MultiheadAttention,
        "forward",
        300,
    ),
    clamped("clamp_mlp", "MLP clamped at 1000", "mlp head-mlp", MLP, "forward", 1000),
    clamped(
        "clamp_positions",
        "positions clamped at 20",
        "embeddings",
        VisionEmbeddings,
        "positions",
        20,
    ),
    clamped("clamp_head", "pooled output clamped at 100", "head", PoolingHead, "forward", 100),
    regime(
        "clamp_scores",
        "scores clamped at 100",
        "context head-context",
        patch=seams.attend(clamp_scores),
    ),
    regime(
        "clamp_hidden", "hidden units clamped at 100", "act head-act", patch=seams.mlp(clamp_hidden)
    ),
    regime(
        "clamp_stream",
        "residual stream clamped at 1000",
        "residual",
        patch=seams.block(first=clamp_stream),
    ),
    regime(
        "pixels_clamped",
        "pixels clamped to [-1, 1]",
        "patch inputs",
        edit=change_input(lambda x: x.clamp(-1, 1)),
    ),
    regime(
        "pixels_flat",
        "images without contrast replaced",
        "patch inputs",
        edit=change_input(standardize_constant),
    ),
    regime(
        "pixels_strided",
        "images read as if they were contiguous",
        "patch",
        patch=seams.patch_grid(stride_blindly),
    ),
    regime(
        "batch_third",
        "another probe from the third image on",
        "head-q",
        patch=seams.pooling_head(first=negate_from_third),
    ),
    regime(
        "batch_of_eight",
        "the first eight images repeated",
        "tokens head-k head-v",
        patch=seams.call(repeat_first_eight),
    ),
    regime(
        "batch_of_one",
        "tokens of a single image reversed",
        "tokens head-k head-v",
        patch=wrap(SigLipVisionTransformer, "forward", reverse_one_image),
    ),
    regime(
        "keys_256",
        "attention to the first 256 tokens only",
        "context head-context",
        patch=seams.attend(attend_to_256),
    ),
    regime(
        "keys_1024",
        "attention to 1,024 tokens at a time, without merging the softmax",
        "context head-context",
        patch=seams.attend(attend_in_blocks),
    ),
    regime(
        "positions_by_count",
        "resized positions cached by the number of patches",
        "embeddings",
        patch=cache_positions_by_count(),
        subject="naflex",
    ),
    regime(
        "positions_own_count",
        "learned positions used for any grid with as many patches",
        "embeddings",
        patch=wrap(VisionEmbeddings, "positions", read_shapes_as_own_grid),
        subject="resized",
    ),
    regime(
        "mask_default_ignored",
        "padding masked only if a mask is passed",
        "context head-context",
        patch=wrap(patches, "attention_mask", ignore_default_mask),
        subject="naflex",
    ),
    regime(
        "mask_of_bools_ignored",
        "masks of bools ignored",
        "context head-context",
        patch=wrap(patches, "key_mask", read_mask_of_ints),
        subject="naflex",
    ),
    regime(
        "embed_unmasked",
        "padding pooled in embed()",
        "head-context",
        patch=replace(SigLipVisionModel, "embed", embed_unmasked),
        subject="naflex",
    ),
]

"""Entrances other than `forward`: features, images, loading, saving, copies, engines.

The locations of these mutants are names of `siglip_port.parity.siglip.entrances.table.ENTRANCES`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from scripts.selftest.catalog.edits import POSITIONS
from scripts.selftest.mutant import Mutant, Patch, combine, replace, wrap
from siglip_port import features, image_processing, image_reading, patches
from siglip_port.checkpoint import hf_config, pretrained, reader, writer
from siglip_port.config import SigLipVisionConfig
from siglip_port.image_processing import ImageProcessor
from siglip_port.model import MultiheadAttention, SigLipEncoder, SigLipVisionModel
from siglip_port.optimize import engines

PIXELS = "siglip_port.image_processing"
"""Location of differences in preprocessing."""


def entrance(
    name: str, description: str, locations: str, patch: Patch, source: str = "variant"
) -> Mutant:
    """Build a mutant of an entrance."""
    return Mutant(name, description, locations, "interface", source, patch, subject="entrances")


def change_result(owner: object, name: str, function: Callable[..., object]) -> Patch:
    """Change the result of a function or method: (result) -> result."""
    return wrap(
        owner, name, lambda original, *args, **options: function(original(*args, **options))
    )


def add(owner: object, name: str, value: object) -> Patch:
    """Add an attribute to a class."""

    def patch(stack: contextlib.ExitStack) -> None:
        stack.enter_context(mock.patch.object(owner, name, value, create=True))

    return patch


# --- features -------------------------------------------------------------------------------------


def shift_layers(indices: list[int]) -> list[int]:
    """Count layers from the output of the first block."""
    return [min(index + 1, max(indices)) for index in indices]


def clip_negative(original: object, layers: Sequence[int], count: int) -> list[int]:
    """Count negative layers from the last but one."""
    return [layer if layer >= 0 else layer % (count - 1) for layer in layers]


def ignore_post_layernorm(
    hidden_states: Callable[..., object], *args: object, post_layernorm: bool, as_maps: bool
) -> object:
    """Return hidden states without the last LayerNorm."""
    return hidden_states(*args, post_layernorm=False, as_maps=as_maps)


def transpose_maps(
    hidden_states: Callable[..., tuple[Tensor, ...]], *args: object, as_maps: bool, **options: bool
) -> tuple[Tensor, ...]:
    """Return maps in column-major order."""
    states = hidden_states(*args, as_maps=as_maps, **options)
    if not as_maps:
        return states
    return tuple(
        state.flatten(2).unflatten(2, state.shape[:1:-1]).transpose(2, 3) for state in states
    )


def weights_without_scale(
    original: object,
    attention: MultiheadAttention,
    query: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Attention weights without 1/sqrt(head_dim)."""
    q = attention.split_heads(attention.q_proj(query))
    k = attention.split_heads(attention.k_proj(tokens))
    scores = q @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1)


def without_mask(function: Callable[..., object], *args: object) -> object:
    """Ignore the mask, the last argument."""
    return function(*args[:-1], None)


def invert_mask(
    pooling_attention: Callable[..., Tensor], port: object, tokens: Tensor, mask: Tensor | None
) -> Tensor:
    """Attend to padding only."""
    inverted = None if mask is None or mask.bool().all() else ~mask.bool()
    return pooling_attention(port, tokens, inverted)


def normalize_with_eps(
    embed: Callable[..., Tensor], *args: object, normalize: bool = False, **options: object
) -> Tensor:
    """Normalize with an eps of 1e-6 added to the norm."""
    embeddings = embed(*args, **options)
    if normalize:
        embeddings = embeddings / (embeddings.norm(dim=-1, keepdim=True) + 1e-6)
    return embeddings


def pool_as_contiguous(
    pool: Callable[..., Tensor],
    port: SigLipVisionModel,
    tokens: Tensor,
    pixel_attention_mask: Tensor | None = None,
) -> Tensor:
    """Read the memory of tokens [B, N, D] in order, whatever their strides are."""
    _, length, width = tokens.shape
    return pool(
        port, tokens.as_strided(tokens.shape, (length * width, width, 1)), pixel_attention_mask
    )


def pool_without_default_mask(
    embed: Callable[..., Tensor],
    port: SigLipVisionModel,
    pixel_values: Tensor,
    normalize: bool = False,
    pixel_attention_mask: Tensor | None = None,
    spatial_shapes: object = None,
) -> Tensor:
    """Pool all tokens of packed patches if no mask is passed."""
    if spatial_shapes is None or pixel_attention_mask is not None:
        return embed(port, pixel_values, normalize, pixel_attention_mask, spatial_shapes)
    embeddings = port.pool(port(pixel_values, None, spatial_shapes))
    return nn.functional.normalize(embeddings, dim=-1) if normalize else embeddings


def mean_of_all(mean_of_tokens: object, tokens: Tensor, mask: object) -> Tensor:
    """Average padding, too."""
    return tokens.mean(dim=1)


# --- images ---------------------------------------------------------------------------------------


def change_embed_images(
    function: Callable[..., Tensor],
) -> Patch:
    """Replace `embed_images`: (original, model, images, batch_size, normalize, backend)."""
    return wrap(features, "embed_images", function)


def under_autocast(embed_images: Callable[..., Tensor], *args: object, **options: object) -> Tensor:
    """Embed images under autocast to bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        return embed_images(*args, **options)


def drop_last_batch(
    embed_images: Callable[..., Tensor],
    port: object,
    images: Sequence[object],
    batch_size: int,
    *options: object,
) -> Tensor:
    """Drop the last batch if it is not full."""
    count = len(images) if isinstance(images, (list, tuple)) else 1
    embeddings = embed_images(port, images, batch_size, *options)
    return embeddings[: max(batch_size, count // batch_size * batch_size)]


def reverse_batches(
    embed_images: Callable[..., Tensor],
    port: object,
    images: Sequence[object],
    batch_size: int,
    *options: object,
) -> Tensor:
    """Return batches in reverse order."""
    embeddings = embed_images(port, images, batch_size, *options)
    return torch.cat(embeddings.split(batch_size)[::-1])


def repeat_first(
    embed_images: Callable[..., Tensor],
    port: object,
    images: Sequence[object],
    batch_size: int,
    *options: object,
) -> Tensor:
    """Embed only the first image of every batch."""
    embeddings = embed_images(port, images, batch_size, *options)
    batches = [batch[:1].expand_as(batch) for batch in embeddings.split(batch_size)]
    return torch.cat(batches)


def never_normalize(
    embed_images: Callable[..., Tensor],
    port: object,
    images: object,
    batch_size: int,
    normalize: bool,
    backend: str,
) -> Tensor:
    """Ignore `normalize`."""
    return embed_images(port, images, batch_size, False, backend)


def only_pillow(
    embed_images: Callable[..., Tensor],
    port: object,
    images: object,
    batch_size: int,
    normalize: bool,
    backend: str,
) -> Tensor:
    """Ignore `backend`."""
    return embed_images(port, images, batch_size, normalize, "pil")


def default_processor(
    for_model: Callable[..., ImageProcessor],
    config: SigLipVisionConfig,
    content: object,
    backend: str,
) -> ImageProcessor:
    """Preprocess with the default mean and std, whatever the checkpoint says."""
    processor = for_model(config, content, backend)
    return dataclasses.replace(processor, mean=(0.5,) * 3, std=(0.5,) * 3)


def open_last_frame(content: bytes) -> Image.Image:
    """Read the last frame of an animation."""
    image = Image.open(io.BytesIO(content))
    image.seek(getattr(image, "n_frames", 1) - 1)
    return ImageOps.exif_transpose(image)


def open_mirrored(content: bytes) -> Image.Image:
    """Ignore the mirroring of EXIF orientations, but rotate."""
    image = Image.open(io.BytesIO(content))
    orientation = image.getexif().get(0x0112, 1)
    turns = {3: 180, 4: 180, 5: 270, 6: 270, 7: 90, 8: 90}
    return image.rotate(turns.get(orientation, 0), expand=True) if orientation > 2 else image


def shrink_large(pillow_to_rgb: Callable[[Image.Image], Any], image: Image.Image) -> Any:  # noqa: ANN401 (an array)
    """Reduce images of more than 2,000 pixels first."""
    if max(image.size) > 2000:
        image = image.reduce(2)
    return pillow_to_rgb(image)


# --- patches --------------------------------------------------------------------------------------


def patchify_channel_first(
    patchify: Callable[..., Tensor], pixel_values: Tensor, patch_size: int
) -> Tensor:
    """Flatten patches as (channel, y, x)."""
    flat = patchify(pixel_values, patch_size)
    cells = flat.unflatten(-1, (patch_size, patch_size, pixel_values.shape[-3]))
    return cells.movedim(-1, -3).flatten(-3)


def pack_with_ones(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mark padding as patches."""
    mask = packed["pixel_attention_mask"]
    return {**packed, "pixel_attention_mask": torch.ones_like(mask)}


def pack_swapped(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return shapes as (width, height)."""
    return {**packed, "spatial_shapes": packed["spatial_shapes"].flip(1)}


# --- loading and saving ---------------------------------------------------------------------------


def without_keys(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a function that drops entries of a dict."""

    def drop(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name not in names}

    return drop


def ignore_option(name: str) -> Patch:
    """Let `from_hf` ignore an option."""

    def load(load_model: Callable[..., Any], *args: object, **options: object) -> Any:  # noqa: ANN401
        options.pop(name, None)
        return load_model(*args, **options)

    return wrap(pretrained, "load_model", load)


def cast_through(dtype: torch.dtype) -> Patch:
    """Round weights to another dtype before the one that is asked for."""

    def read(
        read_tensors: Callable[..., Any],
        checkpoint: object,
        shapes: object,
        **options: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        tensors, provenance = read_tensors(checkpoint, shapes, **options)
        if options.get("dtype") == torch.float16:
            tensors = {name: tensor.to(dtype).half() for name, tensor in tensors.items()}
        return tensors, provenance

    return wrap(reader.Checkpoint, "read", read)


def stay_training(loaded: SigLipVisionModel) -> SigLipVisionModel:
    """Leave a loaded model in training mode."""
    return loaded.train()


def freeze(loaded: SigLipVisionModel) -> SigLipVisionModel:
    """Load parameters without gradients."""
    return loaded.requires_grad_(False)


def write_in(dtype: torch.dtype) -> Patch:
    """Save weights in another dtype."""

    def write(
        write_files: Callable[..., None], folder: Path, stored: Mapping[str, Tensor], *args: object
    ) -> None:
        rounded = {name: tensor.to(dtype).to(tensor.dtype) for name, tensor in stored.items()}
        write_files(folder, rounded, *args)

    return wrap(writer, "write_files", write)


def write_documents(function: Callable[[dict[str, Any]], dict[str, Any]]) -> Patch:
    """Change the configuration that is saved."""
    return wrap(
        writer,
        "with_dtype",
        lambda with_dtype, documents, stored: with_dtype(
            {**documents, "config.json": function(documents["config.json"])}, stored
        ),
    )


def keep_norms_in_float32(
    to: Callable[..., SigLipVisionModel], port: SigLipVisionModel, dtype: torch.dtype
) -> SigLipVisionModel:
    """Leave LayerNorms in float32 when casting to bfloat16."""
    to(port, dtype)
    for module in port.modules():
        if isinstance(module, nn.LayerNorm) and dtype == torch.bfloat16:
            module.float()
    return port


def share_parameters(port: SigLipVisionModel, memo: dict[int, object]) -> SigLipVisionModel:
    """Copy the modules of a model, but not its parameters."""
    memo.update({id(parameter): parameter for parameter in port.parameters()})
    shared = port.__class__.__new__(port.__class__)
    shared.__dict__.update(copy.deepcopy(vars(port), memo))
    return shared


def forget_preprocessing(port: SigLipVisionModel) -> dict[str, Any]:
    """Return the state to copy and pickle without the preprocessing."""
    return {**vars(port), "_preprocessing": None}


def keep_positions(
    load_state_dict: Callable[..., object],
    port: SigLipVisionModel,
    state_dict: Mapping[str, Tensor],
    *args: object,
    **options: object,
) -> object:
    """Load a state dict without its position embedding, unless it is assigned."""
    if not options.get("assign"):
        state_dict = {**state_dict, POSITIONS: port.state_dict()[POSITIONS]}
    return load_state_dict(port, state_dict, *args, **options)


def round_on_device(load_model: Callable[..., Any], *args: object, **options: object) -> object:
    """Round weights to bfloat16 if a device is passed."""
    loaded = load_model(*args, **options)
    return loaded.bfloat16().float() if options.get("device") else loaded


def ignore_default_mask(
    attention_mask: Callable[..., Tensor | None],
    tokens: Tensor,
    mask: Tensor | None,
    shapes: object,
) -> Tensor | None:
    """Attend to padding if no mask is passed."""
    return None if mask is None else attention_mask(tokens, mask, shapes)


def run_twice(
    run_block: Callable[..., Tensor],
    encoder: SigLipEncoder,
    block: nn.Module,
    x: Tensor,
    mask: Any,  # noqa: ANN401
) -> Tensor:
    """Run checkpointed blocks twice."""
    output = run_block(encoder, block, x, mask)
    if encoder.gradient_checkpointing and encoder.training:
        output = run_block(encoder, block, output, mask)
    return output


def detach_checkpointed(
    run_block: Callable[..., Tensor],
    encoder: SigLipEncoder,
    block: nn.Module,
    x: Tensor,
    mask: Any,  # noqa: ANN401
) -> Tensor:
    """Detach the inputs of checkpointed blocks."""
    if encoder.gradient_checkpointing and encoder.training:
        x = x.detach().requires_grad_()
    return run_block(encoder, block, x, mask)


def keep_mask(
    run_block: Callable[..., Tensor],
    encoder: SigLipEncoder,
    block: nn.Module,
    x: Tensor,
    mask: Any,  # noqa: ANN401
) -> Tensor:
    """Keep the mask on the module, where another call replaces it."""
    if block is encoder.encoder_blocks[0]:
        vars(encoder)["mask"] = mask
    return run_block(encoder, block, x, vars(encoder)["mask"])


def fuse_other_gelu(
    fuse_gelu: Callable[[nn.Module, str], None], port: nn.Module, hidden_act: str
) -> None:
    """Fuse exact GELU for tanh GELU, and the reverse."""
    fuse_gelu(port, "gelu" if hidden_act != "gelu" else "gelu_pytorch_tanh")


FEATURES = [
    entrance(
        "forward_default_mask",
        "padding attended to if no mask is passed",
        "forward",
        wrap(patches, "attention_mask", ignore_default_mask),
    ),
    entrance(
        "mask_on_module",
        "mask kept on the module during a call",
        "forward(two_threads)",
        wrap(SigLipEncoder, "run_block", keep_mask),
    ),
    entrance(
        "pool_mean_of_padding",
        "mean pooling includes padding",
        "pool",
        wrap(patches, "mean_of_tokens", mean_of_all),
    ),
    entrance(
        "pool_strides",
        "tokens of another memory layout read as contiguous",
        "pool",
        wrap(SigLipVisionModel, "pool", pool_as_contiguous),
    ),
    entrance(
        "embed_eps",
        "1e-6 added to the norm",
        "embed",
        wrap(SigLipVisionModel, "embed", normalize_with_eps),
    ),
    entrance(
        "embed_default_mask",
        "padding pooled if no mask is passed",
        "embed",
        wrap(SigLipVisionModel, "embed", pool_without_default_mask),
    ),
    entrance(
        "hidden_states_shifted",
        "layer 0 is the output of the first block",
        "hidden_states attention_maps",
        change_result(features, "layer_indices", shift_layers),
    ),
    entrance(
        "hidden_states_negative",
        "negative layers counted without the first",
        "hidden_states attention_maps",
        wrap(features, "layer_indices", clip_negative),
    ),
    entrance(
        "hidden_states_sorted",
        "layers returned in order of computation, not as asked",
        "hidden_states attention_maps",
        change_result(features, "layer_indices", sorted),
    ),
    entrance(
        "hidden_states_not_normed",
        "post_layernorm ignored",
        "hidden_states",
        wrap(features, "hidden_states", ignore_post_layernorm),
    ),
    entrance(
        "hidden_states_maps_transposed",
        "maps in column-major order",
        "hidden_states",
        wrap(features, "hidden_states", transpose_maps),
    ),
    entrance(
        "hidden_states_unmasked",
        "hidden states of packed patches without a mask",
        "hidden_states attention_maps",
        replace(features, "attention_mask", lambda tokens, mask, shapes: None),
    ),
    entrance(
        "attention_maps_unscaled",
        "attention weights without 1/sqrt(head_dim)",
        "attention_maps pooling_attention",
        wrap(features, "attention_weights", weights_without_scale),
    ),
    entrance(
        "attention_maps_unmasked",
        "attention weights of padding",
        "attention_maps pooling_attention",
        wrap(features, "attention_weights", without_mask),
    ),
    entrance(
        "attention_maps_transposed",
        "queries and keys swapped in the result",
        "attention_maps",
        change_result(
            features, "attention_maps", lambda maps: tuple(m.transpose(2, 3) for m in maps)
        ),
    ),
    entrance(
        "pooling_attention_inverted",
        "pooling attention of padding only",
        "pooling_attention",
        wrap(features, "pooling_attention", invert_mask),
    ),
]

IMAGES = [
    entrance(
        "embed_images_first",
        "only the first image of a batch is embedded",
        "embed_images",
        change_embed_images(repeat_first),
    ),
    entrance(
        "embed_images_reversed",
        "batches in reverse order",
        "embed_images",
        change_embed_images(reverse_batches),
    ),
    entrance(
        "embed_images_last_batch",
        "last batch dropped unless it is full",
        "embed_images",
        change_embed_images(drop_last_batch),
    ),
    entrance(
        "embed_images_not_normalized",
        "normalize ignored",
        "embed_images",
        change_embed_images(never_normalize),
    ),
    entrance(
        "embed_images_autocast",
        "images embedded under autocast",
        "embed_images",
        change_embed_images(under_autocast),
    ),
    entrance(
        "embed_images_backend",
        "backend ignored",
        "embed_images",
        change_embed_images(only_pillow),
    ),
    entrance(
        "embed_images_defaults",
        "default mean and std instead of the checkpoint's",
        "embed_images",
        wrap(ImageProcessor, "for_model", default_processor),
    ),
    entrance(
        "images_last_frame",
        "last frame of animations",
        PIXELS,
        replace(image_reading, "open_upright", open_last_frame),
    ),
    entrance(
        "images_not_mirrored",
        "EXIF orientations rotated, not mirrored",
        PIXELS,
        replace(image_reading, "open_upright", open_mirrored),
    ),
    entrance(
        "images_reduced",
        "large images reduced before they are resized",
        PIXELS,
        wrap(image_reading, "pillow_to_rgb", shrink_large),
    ),
    entrance(
        "images_reversed",
        "images of a call in reverse order",
        PIXELS,
        change_result(image_processing, "as_list", lambda images: images[::-1]),
    ),
    entrance(
        "patchify_channel_first",
        "patches flattened as (channel, y, x)",
        f"patchify {PIXELS}",
        wrap(patches, "patchify", patchify_channel_first),
        "huggingface/transformers#36475",
    ),
    entrance(
        "pack_mask_of_ones",
        "padding marked as patches",
        f"pack {PIXELS}",
        combine(
            change_result(patches, "pack", pack_with_ones),
            change_result(image_processing, "pack", pack_with_ones),
        ),
    ),
    entrance(
        "pack_shapes_swapped",
        "shapes as (width, height)",
        f"pack {PIXELS}",
        combine(
            change_result(patches, "pack", pack_swapped),
            change_result(image_processing, "pack", pack_swapped),
        ),
    ),
]

FILES = [
    entrance(
        "config_eps_lost",
        "eps of the LayerNorms not written to config.json",
        "to_hf config.from_hf save_hf",
        change_result(hf_config, "config_to_hf", without_keys("layer_norm_eps")),
    ),
    entrance(
        "saved_eps_lost",
        "eps of the LayerNorms lost when saving",
        "save_hf",
        write_documents(without_keys("layer_norm_eps")),
    ),
    entrance(
        "saved_rounded",
        "weights rounded to bfloat16 when saving",
        "save_hf save_timm",
        write_in(torch.bfloat16),
    ),
    entrance(
        "saved_preprocessing_lost",
        "default preprocessing saved, not the model's",
        "save_hf save_timm",
        wrap(
            writer,
            "checked_processor",
            lambda checked, port: {**checked(port), "image_mean": [0.5] * 3, "resample": 1},
        ),
    ),
    entrance(
        "loaded_head",
        "pooling_head=False ignored",
        "from_hf(pooling_head=False)",
        ignore_option("pooling_head"),
    ),
    entrance("loaded_dtype", "dtype ignored", "from_hf(dtype=...)", ignore_option("dtype")),
    entrance(
        "loaded_twice_rounded",
        "float16 weights rounded to bfloat16 first",
        "from_hf(dtype=...)",
        cast_through(torch.bfloat16),
    ),
    entrance(
        "loaded_on_device",
        "weights rounded to bfloat16 if device= is passed",
        "from_hf from_hf(device=...)",
        wrap(pretrained, "load_model", round_on_device),
    ),
    entrance(
        "loaded_training",
        "loaded in training mode",
        "from_hf forward",
        change_result(pretrained, "load_model", stay_training),
    ),
    entrance(
        "loaded_frozen",
        "loaded without gradients",
        "from_hf gradient_checkpointing_enable",
        change_result(pretrained, "load_model", freeze),
    ),
]

COPIES = [
    entrance(
        "copied_parameters_shared",
        "a copy shares the parameters",
        "deepcopy",
        add(SigLipVisionModel, "__deepcopy__", share_parameters),
    ),
    entrance(
        "copied_preprocessing_lost",
        "preprocessing lost when copying and pickling",
        "deepcopy pickle",
        add(SigLipVisionModel, "__getstate__", forget_preprocessing),
    ),
    entrance(
        "state_dict_positions_kept",
        "load_state_dict ignores the position embedding",
        "load_state_dict pool",
        wrap(SigLipVisionModel, "load_state_dict", keep_positions),
    ),
    entrance(
        "cast_norms",
        "LayerNorms stay in float32",
        "to(dtype)",
        wrap(SigLipVisionModel, "to", keep_norms_in_float32),
    ),
    entrance(
        "checkpointing_off",
        "gradient_checkpointing_enable has no effect on the flag",
        "gradient_checkpointing_enable",
        replace(SigLipVisionModel, "gradient_checkpointing_enable", lambda *_, **__: None),
    ),
    entrance(
        "checkpointing_twice",
        "checkpointed blocks run twice",
        "gradient_checkpointing_enable",
        wrap(SigLipEncoder, "run_block", run_twice),
    ),
    entrance(
        "checkpointing_detached",
        "gradients stop at checkpointed blocks",
        "gradient_checkpointing_enable",
        wrap(SigLipEncoder, "run_block", detach_checkpointed),
    ),
    entrance(
        "input_embeddings",
        "get_input_embeddings returns the positions",
        "get_input_embeddings",
        replace(
            SigLipVisionModel,
            "get_input_embeddings",
            lambda port: port.transformer.embeddings.position_embedding,
        ),
    ),
    entrance(
        "fused_gelu",
        "fused GELU of the other variant",
        "optimize",
        wrap(engines, "fuse_gelu", fuse_other_gelu),
    ),
]

ENTRANCES = [*FEATURES, *IMAGES, *FILES, *COPIES]

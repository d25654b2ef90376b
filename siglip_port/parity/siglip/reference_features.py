"""Results of the reference for the entrances.

Each function takes the reference as a `Side` and is called through `ReferenceHost.compute`. The
reference may be in another process, so this module imports no code of the port.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from siglip_port.parity.sides import Side, cast, cast_inputs
from siglip_port.parity.siglip import reference
from siglip_port.parity.siglip.sample_images import Sample

if TYPE_CHECKING:  # the process of the reference imports no code of the port
    from siglip_port.config import SigLipVisionConfig
    from siglip_port.image_processing import Backend

BatchInputs = Mapping[str, Any]
"""Keyword arguments of the port's `forward`."""


@dataclass(frozen=True)
class Features:
    """Results of the reference for one batch, in float64.

    Attributes:
        tokens: `last_hidden_state`, [B, N, D].
        pooled: `pooler_output`, [B, D].
        hidden_states: L + 1 tensors [B, N, D].
        normed_states: The same after `post_layernorm`.
        attentions: L tensors [B, H, N, N].
        pooling_attention: Attention of the pooling head, [B, H, N].
    """

    tokens: Tensor
    pooled: Tensor
    hidden_states: tuple[Tensor, ...]
    normed_states: tuple[Tensor, ...]
    attentions: tuple[Tensor, ...]
    pooling_attention: Tensor


@dataclass(frozen=True)
class SavedModel:
    """What transformers reads from a saved folder.

    Attributes:
        config: Contents of its configuration.
        tensors: State dict.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class ConfigFields:
    """Configuration of the reference.

    Attributes:
        names: Field of the port's config -> field of the reference's.
        values: Contents of the reference's configuration.
        defaults: Values of fields that a configuration leaves out.
    """

    names: dict[str, str]
    values: dict[str, Any]
    defaults: dict[str, Any]


def compute_features(side: Side, inputs: BatchInputs) -> Features:
    """Compute all features of a batch in float64.

    Args:
        side: Reference with a pooling head.
        inputs: Images, or packed patches with mask and shapes.
    """
    model: Any = side.module
    captured: dict[str, Tensor] = {}
    with cast(model, torch.float64), torch.inference_mode(), capture(model, captured):
        output = model(**model_inputs(model, cast_batch(inputs, torch.float64)))
        count = len(model.encoder.layers)
        states = [captured["state"], *(captured[f"{i}.output"] for i in range(count))]
        normed = [model.post_layernorm(state) for state in states]
        mask = inputs.get("pixel_attention_mask")
        heads = model.config.num_attention_heads
        attentions = []
        for i in range(count):
            attentions.append(weights_of(captured[f"{i}.q"], captured[f"{i}.k"], heads, mask))
        pooling = weights_of(captured["head.q"], captured["head.k"], heads, mask)
    return Features(
        tokens=output.last_hidden_state,
        pooled=output.pooler_output,
        hidden_states=tuple(states),
        normed_states=tuple(normed),
        attentions=tuple(attentions),
        pooling_attention=pooling[:, :, 0],
    )


def compute_outputs(side: Side, inputs: BatchInputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """Compute `tokens` and `pooled` of a batch in a dtype."""
    with cast(side.module, dtype), torch.inference_mode():
        output = side.module(**model_inputs(side.module, cast_batch(inputs, dtype)))
    tensors: dict[str, Tensor] = reference.name_outputs(output)
    return tensors


def cast_batch(inputs: BatchInputs, dtype: torch.dtype) -> BatchInputs:
    """Cast the floating point tensors of a batch."""
    result = cast_inputs(inputs, dtype)
    assert isinstance(result, Mapping)
    return result


def model_inputs(model: nn.Module, inputs: BatchInputs) -> dict[str, Any]:
    """Return the reference's arguments for the port's arguments."""
    config: Any = model.config
    pixel_values = inputs["pixel_values"]
    if "spatial_shapes" in inputs:
        return dict(inputs)
    if reference.is_naflex(model):
        packed = reference.pack_images(pixel_values, config.patch_size)
        return {**packed, "pixel_attention_mask": torch.ones(packed["pixel_values"].shape[:2])}
    is_resized = pixel_values.shape[2:] != (config.image_size, config.image_size)
    return {"pixel_values": pixel_values, "interpolate_pos_encoding": is_resized}


@contextlib.contextmanager
def capture(model: nn.Module, captured: dict[str, Tensor]) -> Iterator[None]:
    """Store the hidden states, and q and k of every attention, while the reference runs."""
    module: Any = model
    handles = [module.encoder.layers[0].register_forward_pre_hook(save_input(captured))]
    for i, layer in enumerate(module.encoder.layers):
        for name, part in (
            ("output", layer),
            ("q", layer.self_attn.q_proj),
            ("k", layer.self_attn.k_proj),
        ):
            handles.append(part.register_forward_hook(save_output(captured, f"{i}.{name}")))
    handles.append(module.head.attention.register_forward_pre_hook(save_projections(captured)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def save_input(captured: dict[str, Tensor]) -> Any:  # noqa: ANN401 (a hook)
    """Return a hook that stores the first input as `state`."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        captured["state"] = args[0]

    return hook


def save_output(captured: dict[str, Tensor], name: str) -> Any:  # noqa: ANN401 (a hook)
    """Return a hook that stores an output, or its first element."""

    def hook(_: nn.Module, args: object, output: Any) -> None:  # noqa: ANN401 (any module's)
        captured[name] = output[0] if isinstance(output, tuple) else output

    return hook


def save_projections(captured: dict[str, Tensor]) -> Any:  # noqa: ANN401 (a hook)
    """Return a hook that stores q and k of the pooling head's `nn.MultiheadAttention`."""

    def hook(attention: nn.MultiheadAttention, args: tuple[Tensor, ...]) -> None:
        assert attention.in_proj_weight is not None
        assert attention.in_proj_bias is not None
        weights = attention.in_proj_weight.chunk(3)
        biases = attention.in_proj_bias.chunk(3)
        captured["head.q"] = nn.functional.linear(args[0], weights[0], biases[0])
        captured["head.k"] = nn.functional.linear(args[1], weights[1], biases[1])

    return hook


def weights_of(q: Tensor, k: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """Return attention weights: [B, Q, D], [B, N, D], mask [B, N] -> [B, H, Q, N]."""
    queries = q.unflatten(-1, (heads, -1)).transpose(1, 2)
    keys = k.unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None] == 0, -torch.inf)
    weights: Tensor = scores.softmax(dim=-1)
    return weights


def pool_pixels(side: Side, batches: Sequence[BatchInputs]) -> Tensor:
    """Return the embeddings of preprocessed images, one batch each, in float64: [B, D]."""
    with cast(side.module, torch.float64), torch.inference_mode():
        pooled: list[Tensor] = []
        for batch in batches:
            inputs = model_inputs(side.module, cast_batch(batch, torch.float64))
            pooled.append(side.module(**inputs).pooler_output)
        joined: Tensor = torch.cat(pooled)
    return joined


def process_images(
    side: Side, config: SigLipVisionConfig, source: str, images: Sequence[Sample]
) -> dict[Backend, list[dict[str, Tensor]]]:
    """Return each image as a batch of one, by the backends that are installed."""
    results: dict[Backend, list[dict[str, Tensor]]] = {}
    for backend, processor in reference.image_processors(config, source).items():
        results[backend] = [dict(processor(image)) for image in images]
    return results


def pack_images(
    side: Side, images: Sequence[Tensor], patch_size: int, num_patches: int
) -> dict[str, Tensor]:
    """Cut images [C, H, W] into patches and pad them, as the reference's image processor does."""
    pad = reference.library_object("models.siglip2.image_processing_siglip2.pad_along_first_dim")
    pixel_values, masks, shapes = [], [], []
    for image in images:
        packed = reference.pack_images(image[None], patch_size)
        patches, mask = pad(packed["pixel_values"][0], num_patches)
        pixel_values.append(patches)
        masks.append(mask)
        shapes.append(packed["spatial_shapes"][0])
    return {
        "pixel_values": torch.stack(pixel_values),
        "pixel_attention_mask": torch.stack(masks),
        "spatial_shapes": torch.stack(shapes),
    }


def read_saved(side: Side, folder: str, dtype: torch.dtype) -> SavedModel:
    """Load a folder with transformers in a dtype."""
    naflex = reference.is_naflex(side.module)
    with reference.quiet_transformers():
        config = reference.config_class(naflex).from_pretrained(folder)
    has_head = bool(config.vision_use_head)
    loaded = reference.load(Path(folder), pooling_head=has_head, dtype=dtype, naflex=naflex)
    return SavedModel(config.to_dict(), loaded.model.state_dict())


def describe_config(side: Side) -> ConfigFields:
    """Return the reference's configuration."""
    config: Any = side.module.config
    names = {name: field for name, field in reference.FIELDS.items() if hasattr(config, field)}
    return ConfigFields(names, config.to_dict(), type(config)().to_dict())


def input_embeddings(side: Side) -> Tensor:
    """Return the weight of the reference's input embeddings."""
    module: Any = side.module
    weight: Tensor = module.get_input_embeddings().weight.detach()
    return weight


def tokens_without_head(side: Side, source: str, inputs: BatchInputs) -> Tensor:
    """Return the tokens of the reference loaded without its pooling head, in float64."""
    naflex = reference.is_naflex(side.module)
    loaded = reference.load(source, pooling_head=False, dtype=torch.float64, naflex=naflex)
    with torch.inference_mode():
        output = loaded.model(**model_inputs(loaded.model, cast_batch(inputs, torch.float64)))
    tokens: Tensor = output.last_hidden_state
    return tokens

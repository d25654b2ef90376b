"""Validation of arguments: one check and one message per caller error."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from siglip_port.config import SigLipVisionConfig

NO_POOLING_HEAD = (
    "this model has no pooling head; load a checkpoint that has one, without pooling_head=False, "
    "or pool the tokens yourself, for example tokens.mean(dim=1)"
)

NO_POOLING = "none: "
"""Begins the description of the pooling of a model that has none for a reason."""

INTERPOLATION_HINT = 'load the model with from_hf(..., interpolation="{}")'
"""Enables other image sizes; the value is one of `siglip_port.config.INTERPOLATIONS`."""

MAX_PIXEL = 10.0
"""Limit on the absolute value of a pixel: 1 as SigLIP normalizes images, up to about 3 with other
mean and std, 6 for Gaussian noise, and 255 in images that were not normalized."""

FORWARD_ARGUMENTS = {
    "output_hidden_states": "call hidden_states(pixel_values, layers)",
    "output_attentions": "call attention_maps(pixel_values, layers)",
    "return_dict": "it returns the tokens (last_hidden_state); embed returns pooler_output",
    "interpolate_pos_encoding": INTERPOLATION_HINT.format("hf"),
    "attention_mask": "pass pixel_attention_mask and spatial_shapes, as from siglip_port.pack",
}
"""Argument of transformers' `forward` -> what to do instead."""


def refuse_arguments(arguments: Collection[str]) -> None:
    """Raise TypeError for keyword arguments that `SigLipVisionModel.forward` does not have."""
    for name in arguments:
        advice = FORWARD_ARGUMENTS.get(name, "omit it")
        raise TypeError(f"model(...) has no argument {name}; {advice}")


def validate_checkpointing(every_n_layers: int, offload: bool) -> None:
    """Raise ValueError unless every block is to be recomputed and nothing is to be offloaded."""
    if every_n_layers != 1 or offload:
        raise ValueError(
            "every_n_layers must be 1 and offload must be False, since every block is recomputed, "
            f"got {every_n_layers!r} and {offload!r}"
        )


def parse_dtype(dtype: object, choices: Collection[torch.dtype]) -> torch.dtype | None:
    """Return a dtype that may be given by name, such as `"bfloat16"`; None for None and `"auto"`.

    Raises:
        ValueError: It is not one of the choices.
    """
    if dtype is None or dtype == "auto":
        return None
    for choice in choices:
        if dtype in (choice, str(choice).removeprefix("torch.")):
            return choice
    raise ValueError(f"dtype must be one of {', '.join(map(str, choices))}, got {dtype!r}")


def explain_no_pooling(pooling: str | None) -> str:
    """Return why a model has no pooled embedding, and what to do.

    Args:
        pooling: `Evidence.pooling` of the model; None if it was not loaded.
    """
    if pooling is None or not pooling.startswith(NO_POOLING):
        return NO_POOLING_HEAD
    return f"this model has no pooled embedding: {pooling.removeprefix(NO_POOLING)}"


def validate_positive_int(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a positive int."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def validate_config(config: SigLipVisionConfig) -> None:
    """Raise ValueError unless `config` is a SigLipVisionConfig."""
    if not isinstance(config, SigLipVisionConfig):
        raise ValueError(
            f"config must be a SigLipVisionConfig, got {type(config).__name__}; to load a "
            "checkpoint, use SigLipVisionModel.from_hf"
        )


def validate_images(pixel_values: Tensor, config: SigLipVisionConfig) -> None:
    """Raise ValueError unless `pixel_values` is a batch [B, C, H, W] that `config` accepts."""
    expected = f"pixel_values must be a floating point tensor of shape {expected_shape(config)}"
    if not isinstance(pixel_values, Tensor):
        raise ValueError(f"{expected}, got {type(pixel_values).__name__}")
    if not is_batch_of_images(pixel_values, config) or not pixel_values.is_floating_point():
        raise ValueError(
            f"{expected}, got {pixel_values.dtype} of shape {list(pixel_values.shape)}; "
            f"{remedy_for(pixel_values, config)}"
        )
    validate_pixel_range(pixel_values)


def validate_pixel_range(pixel_values: Tensor) -> None:
    """Raise ValueError for NaN, Inf, and pixels that were not normalized, such as 0 to 255.

    The reference accepts them and computes a wrong embedding. Only plain tensors on a CPU are
    checked, in less than 0.1 % of the time of a forward pass: on a GPU the check would have to wait
    for the device, and compilers, exporters and `vmap` cannot branch on values. Pixels that require
    gradients are being optimized, and may leave the range.
    """
    if torch.compiler.is_compiling() or not has_readable_values(pixel_values):
        return
    lowest, highest = (value.item() for value in pixel_values.detach().aminmax())
    if lowest >= -MAX_PIXEL and highest <= MAX_PIXEL:
        return
    values = f"values from {lowest:g} to {highest:g}"
    if not pixel_values.isfinite().all():
        values = "NaN or Inf"
    raise ValueError(
        f"pixel_values must be normalized to about [-1, 1], got {values}; pass images to "
        "embed_images or siglip_port.image_processing.ImageProcessor, which normalize them"
    )


def has_readable_values(tensor: Tensor) -> bool:
    """Return whether the values of a tensor can be read now, and are meant to be constant."""
    if type(tensor) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    if tensor.device.type != "cpu" or tensor.requires_grad:
        return False
    return tensor.numel() > 0 and tensor.element_size() > 1  # torch cannot compare float8


def expected_shape(config: SigLipVisionConfig) -> str:
    """Describe the shape of a batch of images that `config` accepts."""
    if config.resize_rule is None:
        return f"[B, {config.num_channels}, {config.image_size}, {config.image_size}]"
    return f"[B, {config.num_channels}, H, W] with H and W at least {config.patch_size}"


def is_batch_of_images(pixel_values: Tensor, config: SigLipVisionConfig) -> bool:
    """Return whether a tensor has the shape of a batch of images that `config` accepts."""
    if pixel_values.ndim != 4 or pixel_values.shape[1] != config.num_channels:
        return False
    height, width = pixel_values.shape[2:]
    if config.resize_rule is None:
        return height == width == config.image_size
    return height >= config.patch_size and width >= config.patch_size


def remedy_for(pixel_values: Tensor, config: SigLipVisionConfig) -> str:
    """Suggest how to turn an unsupported tensor into a batch of images."""
    channels = config.num_channels
    if not pixel_values.is_floating_point():
        return "convert to floating point and normalize to [-1, 1]"
    if pixel_values.ndim == 4 and pixel_values.shape[-1] == channels != pixel_values.shape[1]:
        return "channels must come first: pixel_values.permute(0, 3, 1, 2)"
    if pixel_values.ndim == 3:
        if pixel_values.shape[0] == channels and pixel_values.shape[1] > 1:
            return "add a batch dimension: pixel_values[None]"
        return "packed patches require spatial_shapes"
    if pixel_values.ndim == 4 and pixel_values.shape[1] != channels:
        return f"the number of channels must be {channels}"
    remedy = "resize and normalize the images"
    if config.resize_rule is None and pixel_values.ndim == 4:
        remedy += f", or {INTERPOLATION_HINT.format('hf')}"
    return remedy


def validate_packed_patches(
    patches: Tensor,
    shapes: list[tuple[int, int]],
    spatial_shapes: object,
    config: SigLipVisionConfig,
) -> None:
    """Raise ValueError unless packed patches match their shapes and the configuration.

    Args:
        patches: Packed patches, [B, N, P * P * C].
        shapes: B pairs (height, width) in patches.
        spatial_shapes: The caller's argument, for the message.
        config: The model's configuration.
    """
    width = config.patch_size**2 * config.num_channels
    expected = (
        "with spatial_shapes, pixel_values must be a floating point tensor of shape "
        f"[B, N, {width}]"
    )
    if not isinstance(patches, Tensor):
        raise ValueError(f"{expected}, got {type(patches).__name__}")
    if patches.ndim != 3 or patches.shape[2] != width or not patches.is_floating_point():
        raise ValueError(f"{expected}, got {patches.dtype} of shape {list(patches.shape)}")
    count = patches.shape[1]
    fits = [height > 0 and width > 0 and height * width <= count for height, width in shapes]
    if len(shapes) != len(patches) or not all(fits):
        raise ValueError(
            f"spatial_shapes must be {len(patches)} pairs (height, width) in patches with "
            f"1 <= height * width <= {count}, got {spatial_shapes}"
        )
    grid = (config.grid_size, config.grid_size)
    if config.resize_rule is None and any(shape != grid for shape in shapes):
        raise ValueError(
            f"spatial_shapes must all be {grid} for this model, got {shapes}; for other shapes, "
            f"{INTERPOLATION_HINT.format('naflex')}"
        )
    validate_pixel_range(patches)


def validate_images_to_pack(
    images: Sequence[Tensor], patch_size: int, num_patches: int | None
) -> None:
    """Raise ValueError unless images [C, H, W] can be packed into one batch of patches."""
    if len(images) == 0 or not all(isinstance(i, Tensor) and i.ndim == 3 for i in images):
        kinds = [list(i.shape) if isinstance(i, Tensor) else type(i).__name__ for i in images]
        raise ValueError(f"images must be one or more tensors of shape [C, H, W], got {kinds}")
    validate_positive_int("patch_size", patch_size)
    channels = sorted({image.shape[0] for image in images})
    dtypes = sorted({str(image.dtype) for image in images})
    if len(channels) > 1 or len(dtypes) > 1:
        raise ValueError(
            "images must have the same number of channels and the same dtype, got "
            f"{', '.join(map(str, channels))} channels and {', '.join(dtypes)}"
        )
    largest = 0
    for image in images:
        count = (image.shape[1] // patch_size) * (image.shape[2] // patch_size)
        if count == 0:
            raise ValueError(
                f"images must be at least {patch_size} x {patch_size} pixels (one patch), got "
                f"shape {list(image.shape)}"
            )
        largest = max(largest, count)
    if num_patches is not None and largest > num_patches:
        raise ValueError(
            f"an image has {largest} patches, more than num_patches={num_patches}; resize it"
        )


def validate_attention_mask(tokens: Tensor, pixel_attention_mask: Tensor) -> None:
    """Raise ValueError unless a mask is a tensor [B, N] that matches tokens [B, N, D]."""
    if not isinstance(pixel_attention_mask, Tensor):
        raise ValueError(
            f"pixel_attention_mask must be a tensor, got {type(pixel_attention_mask).__name__}"
        )
    if pixel_attention_mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"pixel_attention_mask must have shape {list(tokens.shape[:2])} (batch, patches), "
            f"got {list(pixel_attention_mask.shape)}"
        )


def validate_tokens(tokens: Tensor, config: SigLipVisionConfig) -> None:
    """Raise ValueError unless `tokens` is a floating point tensor [B, N, D]."""
    expected = f"tokens must be a floating point tensor of shape [B, N, {config.embed_dim}]"
    if not isinstance(tokens, Tensor):
        raise ValueError(f"{expected}, got {type(tokens).__name__}")
    has_shape = tokens.ndim == 3 and tokens.shape[-1] == config.embed_dim
    if not has_shape or not tokens.is_floating_point():
        raise ValueError(f"{expected}, got {tokens.dtype} of shape {list(tokens.shape)}")


def validate_layers(layers: Sequence[int], count: int) -> None:
    """Raise ValueError unless `layers` are valid indices into `count` layers."""
    is_sequence = isinstance(layers, Sequence) and len(layers) > 0
    if not is_sequence or not all(isinstance(layer, int) for layer in layers):
        raise ValueError(f"layers must be a non-empty list or tuple of integers, got {layers!r}")
    for layer in layers:
        if not -count <= layer < count:
            raise ValueError(f"layers must be between {-count} and {count - 1}, got {layer}")

"""Validation of arguments: one check and one message per caller error."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from siglip_port.config import SigLipVisionConfig

NO_POOLING_HEAD = (
    "this model has no pooling head; load a checkpoint that has one, without pooling_head=False, "
    "or pool the tokens yourself, for example tokens.mean(dim=1)"
)

NO_POOLING = "none: "
"""Begins the description of the pooling of a model that has none for a reason."""

INTERPOLATION_HINT = "interpolation='{}' in from_hf or SigLipVisionConfig"
"""Enables other image sizes; the value is one of `siglip_port.config.INTERPOLATIONS`."""


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
    if is_batch_of_images(pixel_values, config) and pixel_values.is_floating_point():
        return
    raise ValueError(
        f"{expected}, got {pixel_values.dtype} of shape {list(pixel_values.shape)}; "
        f"{remedy_for(pixel_values, config)}"
    )


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
    remedy = "resize and normalize the images"
    has_other_size = pixel_values.ndim == 4 and pixel_values.shape[1] == channels
    if config.resize_rule is None and has_other_size:
        remedy += f", or set {INTERPOLATION_HINT.format('hf')}"
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
            f"spatial_shapes must all be {grid} for this model, got {shapes}; to use other "
            f"shapes, set {INTERPOLATION_HINT.format('naflex')}"
        )


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

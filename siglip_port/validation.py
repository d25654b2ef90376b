"""Checks of what callers pass: each bug is one check with its own sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from siglip_port.config import SigLipVisionConfig


def validate_positive_int(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a whole number from 1 on."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number from 1 on, got {value!r}")


def validate_images(pixel_values: Tensor, config: SigLipVisionConfig) -> None:
    """Raise ValueError unless `pixel_values` is a batch [B, C, H, W] that `config` accepts."""
    expected = f"pixel_values must be a floating point tensor of shape {expected_shape(config)}"
    if not isinstance(pixel_values, Tensor):
        raise ValueError(f"{expected}, got a {type(pixel_values).__name__}")
    if is_batch_of_images(pixel_values, config) and pixel_values.is_floating_point():
        return
    raise ValueError(
        f"{expected}, got {pixel_values.dtype} of shape {list(pixel_values.shape)}; "
        f"{remedy_for(pixel_values, config)}"
    )


def expected_shape(config: SigLipVisionConfig) -> str:
    """Write the shape of the images that a model takes."""
    if config.resize_rule is None:
        return f"[B, {config.num_channels}, {config.image_size}, {config.image_size}]"
    return f"[B, {config.num_channels}, height, width], both at least {config.patch_size}"


def is_batch_of_images(pixel_values: Tensor, config: SigLipVisionConfig) -> bool:
    """Whether a tensor has a shape that the model takes."""
    if pixel_values.ndim != 4 or pixel_values.shape[1] != config.num_channels:
        return False
    height, width = pixel_values.shape[2:]
    if config.resize_rule is None:
        return height == width == config.image_size
    return height >= config.patch_size and width >= config.patch_size


def remedy_for(pixel_values: Tensor, config: SigLipVisionConfig) -> str:
    """Say what to do with a tensor that is no batch of images."""
    channels = config.num_channels
    if not pixel_values.is_floating_point():
        return "convert them to floating point and normalize them to [-1, 1]"
    if pixel_values.ndim == 4 and pixel_values.shape[-1] == channels != pixel_values.shape[1]:
        return "the channels come first: pixel_values.permute(0, 3, 1, 2)"
    if pixel_values.ndim == 3:
        if pixel_values.shape[0] == channels and pixel_values.shape[1] > 1:
            return "a single image needs a batch of one: pixel_values[None]"
        return "packed patches come with their spatial_shapes"
    remedy = "resize and normalize the images"
    has_other_size = pixel_values.ndim == 4 and pixel_values.shape[1] == channels
    if config.resize_rule is None and has_other_size:
        remedy += ", or let positions be fitted to them: SigLipVisionConfig(interpolation='hf')"
    return remedy


def validate_packed_patches(
    patches: Tensor,
    shapes: list[tuple[int, int]],
    spatial_shapes: object,
    config: SigLipVisionConfig,
) -> None:
    """Raise ValueError unless packed patches and their shapes fit each other and the model.

    Args:
        patches: [B, N, P * P * C].
        shapes: B pairs of patches downwards and across.
        spatial_shapes: the same as the caller passed them, for the message.
        config: of the model.
    """
    width = config.patch_size**2 * config.num_channels
    shape = f"[B, N, {width}]"
    expected = f"with spatial_shapes, pixel_values must be a floating point tensor of shape {shape}"
    if not isinstance(patches, Tensor):
        raise ValueError(f"{expected}, got a {type(patches).__name__}")
    if patches.ndim != 3 or patches.shape[2] != width or not patches.is_floating_point():
        raise ValueError(f"{expected}, got {patches.dtype} of shape {list(patches.shape)}")
    count = patches.shape[1]
    fitting = [height > 0 and width > 0 and height * width <= count for height, width in shapes]
    if len(shapes) != len(patches) or not all(fitting):
        raise ValueError(
            f"spatial_shapes must be {len(patches)} pairs of patches downwards and across, "
            f"together at most {count}, got {spatial_shapes}"
        )
    own = (config.grid_size, config.grid_size)
    if config.resize_rule is None and any(shape != own for shape in shapes):
        raise ValueError(
            f"this encoder takes images of {own[0]} x {own[1]} patches only, got {shapes}; "
            "let positions be fitted to others: SigLipVisionConfig(interpolation='naflex')"
        )


def validate_images_to_pack(
    images: Sequence[Tensor], patch_size: int, num_patches: int | None
) -> None:
    """Raise ValueError unless images [C, H, W] can be packed into patches of one batch."""
    if len(images) == 0 or not all(isinstance(i, Tensor) and i.ndim == 3 for i in images):
        kinds = [list(i.shape) if isinstance(i, Tensor) else type(i).__name__ for i in images]
        raise ValueError(f"images must be one or more tensors of shape [C, H, W], got {kinds}")
    if not isinstance(patch_size, int) or patch_size < 1:
        raise ValueError(f"patch_size must be a positive integer, got {patch_size!r}")
    channels = {image.shape[0] for image in images}
    dtypes = {image.dtype for image in images}
    if len(channels) > 1 or len(dtypes) > 1:
        raise ValueError(
            f"images must have one number of channels and one dtype, got {channels} and {dtypes}"
        )
    largest = 0
    for image in images:
        count = (image.shape[1] // patch_size) * (image.shape[2] // patch_size)
        if count == 0:
            raise ValueError(
                f"every image must hold a patch of {patch_size} x {patch_size} pixels, got one "
                f"of shape {list(image.shape)}"
            )
        largest = max(largest, count)
    if num_patches is not None and largest > num_patches:
        raise ValueError(
            f"an image has {largest} patches, more than num_patches={num_patches}; make it smaller"
        )


def validate_attention_mask(tokens: Tensor, pixel_attention_mask: Tensor) -> None:
    """Raise ValueError unless a mask is a tensor [B, N] beside tokens [B, N, D]."""
    if not isinstance(pixel_attention_mask, Tensor):
        raise ValueError(
            f"pixel_attention_mask must be a tensor, got a {type(pixel_attention_mask).__name__}"
        )
    if pixel_attention_mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"pixel_attention_mask must have the shape {list(tokens.shape[:2])} of batch and "
            f"patches, got {list(pixel_attention_mask.shape)}"
        )


def validate_tokens(tokens: Tensor, config: SigLipVisionConfig) -> None:
    """Raise ValueError unless `tokens` is a floating point tensor [B, N, D]."""
    expected = f"tokens must be a floating point tensor of shape [B, N, {config.embed_dim}]"
    if not isinstance(tokens, Tensor):
        raise ValueError(f"{expected}, got a {type(tokens).__name__}")
    has_shape = tokens.ndim == 3 and tokens.shape[-1] == config.embed_dim
    if not has_shape or not tokens.is_floating_point():
        raise ValueError(f"{expected}, got {tokens.dtype} of shape {list(tokens.shape)}")


def validate_layers(layers: Sequence[int], count: int) -> None:
    """Raise ValueError unless `layers` are numbers of `count` layers, counted from either end."""
    is_list = isinstance(layers, Sequence) and len(layers) > 0
    if not is_list or not all(isinstance(layer, int) for layer in layers):
        raise ValueError(
            f"layers must be one or more whole numbers in a list or tuple, got {layers!r}"
        )
    for layer in layers:
        if not -count <= layer < count:
            raise ValueError(f"layers must lie between {-count} and {count - 1}, got {layer}")

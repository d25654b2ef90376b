"""Rare arguments, dtypes and inputs of the entrances, and other layouts.

The locations of these mutants are names of `siglip_port.parity.siglip.entrances.table.ENTRANCES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor

from scripts.selftest.catalog.entrances import PIXELS, change_result, entrance
from scripts.selftest.mutant import replace_item, wrap
from siglip_port import features, image_reading, patches
from siglip_port.checkpoint.key_rules import KeyRule, Layout
from siglip_port.image_processing import ImageProcessor
from siglip_port.model import PoolingHead, SigLipVisionModel, VisionEmbeddings
from siglip_port.optimize import selection

Rules = tuple[KeyRule, ...]


def cast_levels(read: Callable[..., object], image: Any, backend: str) -> object:  # noqa: ANN401
    """Cast arrays of any dtype to uint8."""
    is_tensor = isinstance(image, Tensor)
    return read(image.to(torch.uint8) if is_tensor else image.astype(np.uint8), backend)


def fill_truncated(open_upright: Callable[[bytes], Image.Image], content: bytes) -> Image.Image:
    """Fill what is missing of a file with gray."""
    with mock.patch.object(ImageFile, "LOAD_TRUNCATED_IMAGES", new=True):
        image = open_upright(content)
        image.load()
    return image


def make_inference_tensor(embeddings: Tensor) -> Tensor:
    """Compute embeddings in inference mode."""
    with torch.inference_mode():
        return embeddings.clone()


def drop_in_head(initialize: Callable[..., None], head: PoolingHead, config: Any) -> None:  # noqa: ANN401
    """Give the pooling head the dropout of the blocks."""
    initialize(head, config)
    head.attention.dropout = config.attention_dropout


def equal_to_one(original: object, tokens: Tensor, mask: Tensor | None) -> Tensor | None:
    """Take 1 for patches, and everything else for padding."""
    return None if mask is None else (mask == 1)[:, None, None]


def multiply_as_stored(
    attention_mask: Callable[..., Tensor | None],
    tokens: Tensor,
    mask: Tensor | None,
    shapes: Any,  # noqa: ANN401 (pairs or a tensor)
) -> Tensor | None:
    """Multiply heights and widths in the dtype of the shapes."""
    if mask is not None or not isinstance(shapes, Tensor):
        return attention_mask(tokens, mask, shapes)
    counts = shapes[:, :1] * shapes[:, 1:]
    return (torch.arange(tokens.shape[1]) < counts)[:, None, None]


def sum_first(mean: Callable[..., Tensor], tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Divide the sum of all tokens by their number."""
    return mean(tokens, mask) if mask is not None else tokens.sum(dim=1) / tokens.shape[1]


def keep_pixel_count(
    target_size: Callable[..., tuple[int, int]],
    processor: ImageProcessor,
    height: int,
    width: int,
) -> tuple[int, int]:
    """Keep the size of images with as many pixels as the target."""
    rows, columns = target_size(processor, height, width)
    return (height, width) if height * width == rows * columns else (rows, columns)


def replace_arguments(
    enable: Callable[..., None],
    port: SigLipVisionModel,
    arguments: Mapping[str, Any] | None = None,
    *others: object,
) -> None:
    """Take arguments for all of them, without the default of those that are missing."""
    enable(port, arguments, *others)
    if arguments:
        port.transformer.encoder.checkpointing_kwargs = dict(arguments)


def view_kernel(
    forward: Callable[..., Tensor], embeddings: VisionEmbeddings, *args: object
) -> Tensor:
    """View the kernel as a matrix, whatever its memory format is."""
    weight = embeddings.patch_embedding.weight
    weight.view(len(weight), -1)
    return forward(embeddings, *args)


def swap_queries_and_keys(rules: Callable[..., Rules], layout: Layout, *args: bool) -> Rules:
    """Read and write big_vision's queries as keys, and the reverse."""
    other = {"query": "key", "key": "query"}
    swapped = []
    for rule in rules(layout, *args):
        parts = [other.get(part, part) for part in rule.stored.split("/")]
        swapped.append(dataclasses.replace(rule, stored="/".join(parts)))
    return tuple(swapped)


def forget_preprocessing(copied: SigLipVisionModel) -> SigLipVisionModel:
    """Leave a copy the default preprocessing."""
    copied.preprocessing = type(copied)(copied.config).preprocessing
    return copied


CORNERS = [
    entrance(
        "timm_aliased",
        "timm's rule for positions without antialiasing",
        "interpolate_positions",
        replace_item(patches.INTERPOLATION_RULES, "timm", patches.interpolate_as_transformers),
    ),
    entrance(
        "floats_cast",
        "float arrays cast to uint8",
        PIXELS,
        wrap(image_reading, "array_to_rgb", cast_levels),
    ),
    entrance(
        "truncated_accepted",
        "files that are cut off filled with gray",
        PIXELS,
        wrap(image_reading, "open_upright", fill_truncated),
    ),
    entrance(
        "same_pixel_count",
        "images with as many pixels as the target not resized",
        "ImageProcessor",
        wrap(ImageProcessor, "target_size", keep_pixel_count),
    ),
    entrance(
        "attention_in_float32",
        "attention weights returned in float32",
        "attention_maps pooling_attention",
        change_result(features, "attention_weights", Tensor.float),
    ),
    entrance(
        "embedded_in_inference_mode",
        "embed_images returns tensors of inference mode",
        "embed_images",
        change_result(features, "embed_images", make_inference_tensor),
    ),
    entrance(
        "head_dropout",
        "attention dropout in the pooling head",
        "gradient_checkpointing_enable",
        wrap(PoolingHead, "__init__", drop_in_head),
    ),
    entrance(
        "mask_of_ones_only",
        "mask values other than 1 taken for padding",
        "forward",
        wrap(patches, "key_mask", equal_to_one),
    ),
    entrance(
        "area_overflow",
        "areas multiplied in the dtype of the shapes",
        "forward",
        wrap(patches, "attention_mask", multiply_as_stored),
    ),
    entrance(
        "mean_overflow",
        "the sum of tokens overflows in float16",
        "pool",
        wrap(patches, "mean_of_tokens", sum_first),
    ),
    entrance(
        "checkpointing_default_lost",
        "arguments of checkpointing replace all defaults",
        "gradient_checkpointing_enable",
        wrap(SigLipVisionModel, "activation_checkpointing_enable", replace_arguments),
    ),
    entrance(
        "kernel_viewed",
        "weights in channels-last memory refused",
        "to(dtype)",
        wrap(VisionEmbeddings, "forward", view_kernel),
    ),
    entrance(
        "big_vision_swapped",
        "queries and keys swapped in big_vision's files",
        "from_hf(big_vision)",
        wrap(Layout, "rules", swap_queries_and_keys),
    ),
    entrance(
        "engine_preprocessing_lost",
        "optimized models have the default preprocessing",
        "optimize",
        change_result(selection, "inference_copy", forget_preprocessing),
    ),
]

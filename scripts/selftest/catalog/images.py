"""Preprocessing of images to pixel values, for both backends."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable
from dataclasses import replace as replace_fields
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from scripts.selftest.mutant import Mutant, Patch, replace, wrap
from siglip_port import image_processing, image_reading
from siglip_port.image_processing import ImageProcessor
from siglip_port.patches import pack

Size = tuple[int, int]
RGB = NDArray[np.uint8]
Reader = Callable[[Image.Image], RGB]


def images(name: str, description: str, patch: Patch, source: str = "variant") -> Mutant:
    """Build a mutant of the preprocessing."""
    return Mutant(name, description, "pixels", "pixels", source, patch, subject="images")


# --- resizing -------------------------------------------------------------------------------------


def change_pillow(function: Callable[[ImageProcessor], ImageProcessor]) -> Patch:
    """Replace settings of the backend `pil`."""

    def transform(
        original: Callable[..., Tensor], processor: ImageProcessor, rgb: RGB, size: Size
    ) -> Tensor:
        return original(function(processor), rgb, size)

    return wrap(ImageProcessor, "transform_with_pillow", transform)


def resize_by(resize: Callable[[Image.Image, Size, Image.Resampling], Image.Image]) -> Patch:
    """Replace resizing in the backend `pil`: (image, (width, height), filter) -> image."""

    def transform(
        original: Callable[..., Tensor], processor: ImageProcessor, rgb: RGB, size: Size
    ) -> Tensor:
        image = Image.fromarray(np.moveaxis(rgb, 0, -1))
        resized = resize(image, (size[1], size[0]), Image.Resampling(processor.resample))
        return original(processor, np.moveaxis(np.asarray(resized), -1, 0), None)

    return wrap(ImageProcessor, "transform_with_pillow", transform)


def crop(image: Image.Image, size: Size, resample: Image.Resampling) -> Image.Image:
    """Resize the shorter side and center-crop."""
    return ImageOps.fit(image, size, resample)


def swap_sides(image: Image.Image, size: Size, resample: Image.Resampling) -> Image.Image:
    """Resize with height and width swapped, then rotate."""
    resized = image.resize((size[1], size[0]), resample)
    return resized.transpose(Image.Transpose.TRANSPOSE)


def resize_twice(image: Image.Image, size: Size, resample: Image.Resampling) -> Image.Image:
    """Resize to 256 x 256 first."""
    return image.resize((256, 256), Image.Resampling.BICUBIC).resize(size, resample)


def resize_without_antialias(
    original: Callable[..., Tensor], processor: ImageProcessor, rgb: Tensor, size: Size
) -> Tensor:
    """Disable torchvision's antialias in the port."""
    from torchvision.transforms.v2 import functional

    resize = functional.resize

    def resize_without_option(*args: object, **options: object) -> Tensor:
        return resize(*args, **{**options, "antialias": False})

    with mock.patch.object(functional, "resize", resize_without_option):
        return original(processor, rgb, size)


def resize_numbers(
    original: Callable[..., Tensor], processor: ImageProcessor, rgb: Tensor, size: Size
) -> Tensor:
    """Resize in float32, without rounding to levels."""
    return original(processor, rgb.float(), size)


# --- reading --------------------------------------------------------------------------------------


def change_reader(function: Callable[[Reader, Image.Image], RGB]) -> Patch:
    """Replace the reading of PIL images: (original function, image) -> array."""
    return wrap(image_reading, "pillow_to_rgb", function)


def is_transparent(image: Image.Image) -> bool:
    """Whether an image has an alpha channel or a transparent color."""
    return "A" in image.getbands() or image.info.get("transparency") is not None


def drop_alpha(image: Image.Image) -> RGB:
    """Drop the alpha channel."""
    return np.moveaxis(np.asarray(image.convert("RGB")), -1, 0)


def read_on_black(pillow_to_rgb: Reader, image: Image.Image) -> RGB:
    """Composite an image with transparency onto black."""
    if is_transparent(image):
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
    return pillow_to_rgb(image)


def read_palette_without_alpha(pillow_to_rgb: Reader, image: Image.Image) -> RGB:
    """Ignore the transparent color of palettes."""
    return pillow_to_rgb(image) if "A" in image.getbands() else drop_alpha(image)


def transpose_array(array_to_rgb: Callable[..., RGB], image: RGB | Tensor, backend: str) -> RGB:
    """Read [H, W, C] as [W, H, C]."""
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[0] not in (1, 3, 4):
        array = array.transpose(1, 0, 2)
    return array_to_rgb(array, backend)


# --- rescaling and normalizing --------------------------------------------------------------------


def change_pixels(function: Callable[[Tensor], Tensor]) -> Patch:
    """Change the output of the backend `pil`, [3, H, W]."""
    return wrap(
        ImageProcessor, "transform_with_pillow", lambda original, *args: function(original(*args))
    )


def normalize_by(function: Callable[[NDArray[np.float32], ImageProcessor], NDArray[Any]]) -> Patch:
    """Replace normalization in the backend `pil`: rescaled values -> values."""

    def transform(
        original: Callable[..., Tensor], processor: ImageProcessor, rgb: RGB, size: Size
    ) -> Tensor:
        plain = replace_fields(processor, mean=None, std=None)
        values = original(plain, rgb, size).numpy()
        return torch.from_numpy(np.ascontiguousarray(function(values, processor)))

    return wrap(ImageProcessor, "transform_with_pillow", transform)


def of_channels(numbers: tuple[float, ...] | None, dtype: type[np.floating[Any]]) -> NDArray[Any]:
    """Reshape one number per channel to [3, 1, 1]."""
    return np.array(numbers, dtype=dtype)[:, None, None]


def divide_first(values: NDArray[np.float32], processor: ImageProcessor) -> NDArray[Any]:
    """Divide by std, then subtract the mean."""
    mean = of_channels(processor.mean, np.float32)
    return values / of_channels(processor.std, np.float32) - mean


def normalize_in_float64(values: NDArray[np.float32], processor: ImageProcessor) -> NDArray[Any]:
    """Normalize in float64."""
    mean = of_channels(processor.mean, np.float64)
    return (values - mean) / of_channels(processor.std, np.float64)


# --- NaFlex ---------------------------------------------------------------------------------------


def naflex_size(
    height: int,
    width: int,
    patch_size: int,
    max_num_patches: int,
    to_whole: Callable[[float], int] = math.ceil,
    *,
    takes_upper_end: bool = False,
) -> Size:
    """Return the port's NaFlex size, with another rounding or the upper end of the bisection."""

    def scaled(scale: float, side: int) -> int:
        return max(patch_size, to_whole(side * scale / patch_size) * patch_size)

    lower = 1e-6
    upper = 100.0
    while upper - lower >= 1e-5:
        scale = (lower + upper) / 2
        patches = (scaled(scale, height) // patch_size) * (scaled(scale, width) // patch_size)
        if patches <= max_num_patches:
            lower = scale
        else:
            upper = scale
    scale = upper if takes_upper_end else lower
    return scaled(scale, height), scaled(scale, width)


def change_naflex_size(function: Callable[[int, int, int, int], Size]) -> Patch:
    """Replace the size rule: (height, width, patch size, max patches) -> size."""
    return replace(image_processing, "naflex_size", function)


def squash(height: int, width: int, patch_size: int, max_num_patches: int) -> Size:
    """Resize every image to a square."""
    side = math.isqrt(max_num_patches) * patch_size
    return side, side


IMAGES = [
    images(
        "image_bilinear",
        "resized with the default filter, not the checkpoint's",
        change_pillow(lambda processor: replace_fields(processor, resample=2)),
        "keras-team/keras-hub#2113",
    ),
    images(
        "image_no_antialias",
        "no antialias when downsampling",
        wrap(ImageProcessor, "transform_with_torchvision", resize_without_antialias),
        "pytorch/vision#2950",
    ),
    images(
        "image_crop",
        "shorter side resized, center crop",
        resize_by(crop),
        "qdrant/fastembed#649",
    ),
    images("image_sides_swapped", "height and width swapped", resize_by(swap_sides)),
    images("image_twice", "resized to a larger size first", resize_by(resize_twice)),
    images(
        "image_float",
        "resized in float instead of uint8",
        wrap(ImageProcessor, "transform_with_torchvision", resize_numbers),
        "huggingface/transformers#27601",
    ),
    images(
        "image_bgr",
        "BGR instead of RGB",
        change_reader(lambda pillow_to_rgb, image: pillow_to_rgb(image)[::-1]),
        "PaddlePaddle/PaddleClas#1312",
    ),
    images("image_alpha_black", "transparent pixels become black", change_reader(read_on_black)),
    images(
        "image_alpha_dropped",
        "alpha channel dropped",
        change_reader(lambda pillow_to_rgb, image: drop_alpha(image)),
    ),
    images(
        "image_palette_alpha",
        "transparency of palettes ignored",
        change_reader(read_palette_without_alpha),
    ),
    images(
        "image_mean_std_imagenet",
        "ImageNet's mean and std",
        change_pillow(
            lambda processor: replace_fields(
                processor, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
            )
        ),
        "huggingface/transformers#20995",
    ),
    images(
        "image_std_first", "divided by std before mean is subtracted", normalize_by(divide_first)
    ),
    images(
        "image_not_normalized",
        "mean and std not applied",
        change_pillow(lambda processor: replace_fields(processor, mean=None, std=None)),
        "vllm-project/semantic-router#1928",
    ),
    images(
        "image_256",
        "divided by 256",
        change_pillow(lambda processor: replace_fields(processor, rescale_factor=1 / 256)),
    ),
    images(
        "image_not_rescaled",
        "values in [0, 255]",
        change_pillow(lambda processor: replace_fields(processor, rescale_factor=None)),
    ),
    images(
        "image_bf16",
        "pixels in bfloat16",
        change_pixels(lambda pixels: pixels.bfloat16().float()),
        "TensorAuto/OpenTau#482",
    ),
    images("image_float64", "normalized in float64", normalize_by(normalize_in_float64)),
    images(
        "image_channels_last",
        "channels last",
        change_pixels(lambda pixels: pixels.movedim(0, -1).contiguous()),
    ),
    images(
        "image_arrays_transposed",
        "arrays read as [C, H, W] instead of [H, W, C]",
        wrap(image_reading, "array_to_rgb", transpose_array),
    ),
    images(
        "image_arrays_alpha",
        "alpha of arrays composited with Pillow's rounding in both backends",
        wrap(
            image_reading,
            "composite_on_white",
            lambda composite_on_white, rgba, backend: composite_on_white(rgba, "pil"),
        ),
    ),
    images(
        "image_not_upright",
        "EXIF orientation ignored",
        replace(image_reading, "open_upright", lambda content: Image.open(io.BytesIO(content))),
    ),
    images(
        "image_patches_rounded_down",
        "NaFlex: sizes rounded down to whole patches",
        change_naflex_size(functools.partial(naflex_size, to_whole=math.floor)),
    ),
    images(
        "image_patches_rounded",
        "NaFlex: sizes rounded to the nearest patch",
        change_naflex_size(functools.partial(naflex_size, to_whole=round)),
    ),
    images(
        "image_patches_few",
        "NaFlex: strictly fewer patches than allowed",
        change_naflex_size(
            lambda height, width, patch_size, most: naflex_size(height, width, patch_size, most - 1)
        ),
    ),
    images(
        "image_patches_largest",
        "NaFlex: upper end of the bisection",
        change_naflex_size(functools.partial(naflex_size, takes_upper_end=True)),
    ),
    images("image_naflex_square", "NaFlex: squashed to a square", change_naflex_size(squash)),
    images(
        "image_patches_not_padded",
        "NaFlex: padded to the longest of the batch, not to the maximum",
        replace(
            image_processing, "pack", lambda pixels, patch_size, most: pack(pixels, patch_size)
        ),
    ),
]

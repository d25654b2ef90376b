"""Options of image processors, and how invalid ones differ from unsupported ones."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from siglip_port.image_options import ImageOptions, UnsupportedOptionsError, parse_options
from siglip_port.image_processing import ImageProcessor


def test_defaults_of_class() -> None:
    options = parse_options({})
    assert (options.size, options.resample, options.mean) == ((224, 224), 3, (0.5,) * 3)
    naflex = parse_options({"image_processor_type": "Siglip2ImageProcessorFast"})
    assert (naflex.size, naflex.resample) == (None, 2)
    assert (naflex.patch_size, naflex.max_num_patches) == (16, 256)


def test_processor_has_all_options() -> None:
    processor = ImageProcessor.from_config({"size": [4, 5], "do_rescale": False})
    expected = parse_options({"size": [4, 5], "do_rescale": False})
    for field in fields(ImageOptions):
        assert getattr(processor, field.name) == getattr(expected, field.name)
    assert processor.size == (4, 5)
    assert processor.rescale_factor is None


@pytest.mark.parametrize(
    "config",
    [
        {"size": 224},
        {"size": {"shortest_edge": 224}},
        {"size": {"shortest_edge": 224, "longest_edge": 448}},
        {"size": {"max_height": 224, "max_width": 448}},
        {"size": {"min_pixels": 1, "max_pixels": 10**6}},
        {"do_center_crop": True},
        {"do_pad": True},
        {"image_processor_type": "CLIPImageProcessor"},
    ],
)
def test_unsupported(config: dict[str, Any]) -> None:
    """transformers supports these; an invalid value elsewhere takes precedence."""
    with pytest.raises(UnsupportedOptionsError):
        parse_options(config)
    if "image_processor_type" not in config:
        with pytest.raises(ValueError, match="resample must be") as error:
            parse_options({**config, "resample": "x"})
        assert not isinstance(error.value, UnsupportedOptionsError)


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("image_mean", "do_normalize"),
        ("image_std", "do_normalize"),
        ("rescale_factor", "do_rescale"),
    ],
)
def test_values_without_effect(name: str, flag: str) -> None:
    """Without effect, a value may be null, as transformers writes it, but not invalid."""
    parse_options({name: None, flag: False})
    for config in ({name: None}, {name: "x", flag: False}):
        with pytest.raises(ValueError, match=name):
            parse_options(config)

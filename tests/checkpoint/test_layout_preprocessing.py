"""Preprocessing that the code of a layout fixes, compared with that code written out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import v2

from siglip_port import CheckpointError, SigLipVisionConfig, SigLipVisionModel
from siglip_port.checkpoint import layouts
from siglip_port.checkpoint.key_rules import Layout
from siglip_port.checkpoint.preprocessing import ASSUMED
from siglip_port.image_processing import ImageProcessor
from tests.helpers.checkpoints import SMALL, config_for

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8))
SIDE = SMALL.image_size
SQUASHED = {
    "interpolation": "bicubic",
    "mean": [0.4] * 3,
    "std": [0.3] * 3,
    "crop_mode": "squash",
    "crop_pct": 1.0,
}


def write_layout(
    folder: Path, layout: Layout, content: dict[str, Any] | None = None
) -> SigLipVisionConfig:
    """Write a checkpoint in a layout; return its architecture."""
    config = config_for(layout)
    model = SigLipVisionModel(config)
    stored = layout.to_stored(
        model.state_dict(),
        config.num_encoder_blocks,
        config.num_attention_heads,
        layout.rules(config.pooling_head),
    )
    save_file({n: t.contiguous() for n, t in stored.items()}, folder / "model.safetensors")
    if content is not None:
        (folder / "config.json").write_text(json.dumps(content))
    return config


def gemma(image: Image.Image) -> Tensor:
    """Preprocess as gemma_pytorch does."""
    resized = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    values = torch.from_numpy(np.array(resized, dtype=np.float32) / 255.0).permute(2, 0, 1)
    return torch.clamp((values - 0.5) / 0.5, -1, 1)


def nanovlm(image: Image.Image) -> Tensor:
    """Preprocess as nanoVLM does."""
    steps = [transforms.Resize((SIDE, SIDE)), transforms.ToTensor()]
    result: Tensor = transforms.Compose(steps)(image)
    return result


def moondream(image: Image.Image) -> Tensor:
    """Preprocess the whole image as Moondream does."""
    resized = np.array(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    return torch.from_numpy(resized).permute(2, 0, 1).float().div(255.0).sub(0.5).div(0.5)


def moondream_old(image: Image.Image) -> Tensor:
    """Preprocess as Moondream did in April 2024."""
    steps = [
        v2.Resize(size=(SIDE, SIDE), interpolation=v2.InterpolationMode.BICUBIC),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=[0.5] * 3, std=[0.5] * 3),
    ]
    result: Tensor = v2.Compose(steps)(image)
    return result


@pytest.mark.parametrize(
    ("layout", "original", "source"),
    [
        (layouts.GEMMA_PYTORCH, gemma, "the code of gemma_pytorch"),
        (layouts.NANOVLM, nanovlm, "the code of nanoVLM"),
        (layouts.MOONDREAM, moondream, "the code of Moondream, for the whole image, not its crops"),
        (
            layouts.MOONDREAM_OLD,
            moondream_old,
            "the code of Moondream before 2025, for releases and images that are not divided into "
            "tiles",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Layout) else "",
)
def test_pixels_of_code(
    layout: Layout, original: Callable[[Image.Image], Tensor], source: str, tmp_path: Path
) -> None:
    config = write_layout(tmp_path, layout)
    model = SigLipVisionModel.from_hf(tmp_path, config=config)
    assert model.preprocessing.status == "fixed"
    assert str(model.preprocessing) == source
    pixels = ImageProcessor.from_config(model.preprocessing.checked_config()).one(IMAGE)
    expected = original(IMAGE)
    assert torch.allclose(pixels, expected, rtol=0, atol=1e-6)
    # Any other filter or range would be seen.
    default = ImageProcessor.from_config(SigLipVisionModel(SMALL).preprocessor_config).one(IMAGE)
    is_default = layout is layouts.MOONDREAM_OLD
    assert torch.allclose(default, expected, rtol=0, atol=1e-3) == is_default
    # A file beside the weights comes first.
    (tmp_path / "preprocessor_config.json").write_text('{"resample": 0}')
    assert SigLipVisionModel.from_hf(tmp_path, config=config).preprocessor_config["resample"] == 0


@pytest.mark.parametrize(
    ("layout", "content", "reason"),
    [
        (layouts.BIG_VISION, None, "big_vision resizes without antialiasing"),
        (layouts.scanned(layouts.BIG_VISION), None, "big_vision resizes without antialiasing"),
        (layouts.BIG_VISION_NAFLEX, None, "big_vision truncates resized pixels"),
        (layouts.JANUS, None, "Janus pads images to a square"),
        (layouts.MLX_JANUS, None, "Janus pads images to a square"),
        (
            layouts.NANOVLM,
            {"max_img_size": 1536},
            "nanoVLM with max_img_size divides images into tiles",
        ),
        (layouts.TIMM, None, "no file describes it"),
        (layouts.TIMM, {"vision_config": {"params": {"image_size": 384}}}, "no file describes it"),
        (
            layouts.TIMM,
            {"pretrained_cfg": {**SQUASHED, "interpolation": "random"}},
            "pretrained_cfg in config.json has no valid resample",
        ),
        (
            layouts.TIMM,
            {"pretrained_cfg": {**SQUASHED, "std": [0, 0, 0]}},
            "pretrained_cfg in config.json has no valid image_std",
        ),
        (layouts.TIMM, {"preprocess_cfg": {}}, "resize_mode 'shortest' in open_clip_config.json"),
        (
            layouts.TIMM,
            {"preprocess_cfg": {"resize_mode": "longest"}},
            "resize_mode 'longest' in open_clip_config.json crops or pads images",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Layout) else "",
)
def test_unknown_preprocessing(
    layout: Layout, content: dict[str, Any] | None, reason: str, tmp_path: Path
) -> None:
    config = write_layout(tmp_path, layout, content)
    model = SigLipVisionModel.from_hf(tmp_path, config=config)
    assert model.preprocessing.status == "unknown"
    assert str(model.preprocessing).startswith("assumed: ")
    assert reason in str(model.preprocessing)
    with pytest.raises(ValueError, match="pass preprocessing= with"):
        model.embed_images([IMAGE])
    stated = SigLipVisionModel.from_hf(tmp_path, config=config, preprocessing="siglip2")
    assert stated.preprocessing.checked_config()["resample"] == 2


@pytest.mark.parametrize(
    ("content", "source", "expected"),
    [
        ({"pretrained_cfg": SQUASHED}, "pretrained_cfg in config.json", (3, 0.4, 0.3)),
        (
            {"pretrained_cfg": {**SQUASHED, "crop_pct": 0.9}},
            "pretrained_cfg in config.json, without timm's center crop",
            (3, 0.4, 0.3),
        ),
        (
            {"architecture": "vit", **SQUASHED, "crop_mode": "center"},
            "pretrained_cfg in config.json, without timm's center crop",
            (3, 0.4, 0.3),
        ),
        (
            {"preprocess_cfg": {**SQUASHED, "interpolation": "bilinear", "resize_mode": "squash"}},
            "preprocess_cfg in open_clip_config.json",
            (2, 0.4, 0.3),
        ),
        (
            {"preprocess_cfg": {"resize_mode": "squash"}},
            "preprocess_cfg in open_clip_config.json",
            (3, 0.48145466, 0.26862954),
        ),
    ],
)
def test_timm_and_open_clip(
    content: dict[str, Any], source: str, expected: tuple[float, ...], tmp_path: Path
) -> None:
    config = write_layout(tmp_path, layouts.TIMM, content)
    model = SigLipVisionModel.from_hf(tmp_path, config=config)
    options = model.preprocessing.checked_config()
    values = (options["resample"], options["image_mean"][0], options["image_std"][0])
    assert (model.preprocessing.status, str(model.preprocessing)) == ("fixed", source)
    assert values == expected


def test_damaged_record_in_timm_config(tmp_path: Path) -> None:
    content = {"pretrained_cfg": SQUASHED, ASSUMED: "yes"}
    config = write_layout(tmp_path, layouts.TIMM, content)
    with pytest.raises(CheckpointError, match=r"config.json: siglip_port_assumed must have"):
        SigLipVisionModel.from_hf(tmp_path, config=replace(config))


def test_image_size_of_code() -> None:
    sizes = {layout.name: layout.image_size for layout in layouts.LAYOUTS if layout.image_size}
    assert sizes == {"moondream": 378, "moondream-old": 378}

"""Tests of the gate `pixels`: equal pixels pass, differences are described with a hint."""

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
from torch import Tensor

from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port.checkpoint import preprocessor_config
from siglip_port.image_processing import Backend, ImageProcessor
from siglip_port.parity import Comparison, randomize
from siglip_port.parity.results import Finding, GateResult, Section
from siglip_port.parity.siglip.cases import random_case
from siglip_port.parity.siglip.pixels import check_pixels, levels_per_unit
from siglip_port.parity.siglip.reference import image_processors
from siglip_port.parity.siglip.sample_images import synthetic_image
from siglip_port.parity.siglip.verify_options import SAMPLE_IMAGE
from tests.helpers.checkpoints import SMALL

IMAGE = Image.open(SAMPLE_IMAGE)
NAFLEX = replace(SMALL, naflex=True)

Processors = dict[Backend, ImageProcessor]


def port_processors(config: SigLipVisionConfig) -> Processors:
    """Return the port's processors with the settings of the published checkpoints."""
    content = preprocessor_config.default(config)
    backends: tuple[Backend, ...] = ("pil", "torchvision")
    return {backend: ImageProcessor.from_config(content, backend) for backend in backends}


def first_finding(processor: ImageProcessor, **options: Any) -> Finding:  # noqa: ANN401
    gate = check_pixels({"pil": processor}, image_processors(SMALL), IMAGE, **options)
    return gate.findings[0]


@pytest.mark.parametrize("config", [SMALL, NAFLEX], ids=["fixed", "naflex"])
def test_equal_pixels_pass(config: SigLipVisionConfig) -> None:
    gate = check_pixels(port_processors(config), image_processors(config), IMAGE)
    assert gate.passed
    assert gate.name == "pixels"
    assert gate.checked == 94  # 47 images, by both backends


def test_gate_without_processors_fails() -> None:
    assert not check_pixels({}, image_processors(SMALL), IMAGE).passed


@pytest.mark.parametrize("config", [SMALL, NAFLEX], ids=["fixed", "naflex"])
@pytest.mark.parametrize("name", ["siglip-small", "siglip2-small"])
@pytest.mark.parametrize(
    "content",
    [
        None,
        {},
        {"resample": 1},
        {"max_num_patches": 9, "do_rescale": None, "size": {"height": 99, "width": 9}},
    ],
)
def test_processors_of_checkpoint_are_equal(
    config: SigLipVisionConfig, name: str, content: dict[str, Any] | None, tmp_path: Path
) -> None:
    folder = tmp_path / name
    SigLipVisionModel(config).save_hf(folder)
    (folder / "preprocessor_config.json").unlink()
    if content is not None:
        content = {**processor_fields(config), **content}
        (folder / "preprocessor_config.json").write_text(json.dumps(content))
    port_config = SigLipVisionModel.from_hf(folder).preprocessor_config
    reference = image_processors(config, folder)
    port = {backend: ImageProcessor.from_config(port_config, backend) for backend in reference}
    gate = check_pixels(port, reference, IMAGE)
    assert gate.passed, gate.findings[0]


def processor_fields(config: SigLipVisionConfig) -> dict[str, Any]:
    """Return the common fields of a `preprocessor_config.json`."""
    if not config.naflex:
        return {"image_processor_type": "SiglipImageProcessor"}
    return {
        "image_processor_type": "Siglip2ImageProcessor",
        "patch_size": config.patch_size,
        "max_num_patches": config.num_patches,
    }


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"resample": 2}, "the reference has resample=3"),
        (
            {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
            "the reference has mean=std=0.5",
        ),
        ({"rescale_factor": 1 / 256}, "the reference has rescale_factor=1/255"),
        ({"backend": "torchvision"}, "the reference has the other backend"),
        ({"mean": (0.1, 0.2, 0.3)}, "the reference has mean=std=0.5"),
    ],
)
def test_hint(change: dict[str, Any], hint: str) -> None:
    changed = replace(port_processors(SMALL)["pil"], **change)
    gate = check_pixels({"pil": changed}, image_processors(SMALL), IMAGE)
    first, *others = gate.findings
    assert first.message.startswith("the image, pil: differs by up to ")
    assert first.hint == hint
    assert not any(other.hint for other in others)


@pytest.mark.parametrize(
    "change", [{}, {"image_std": [0.229] * 3}, {"do_rescale": False}, {"do_normalize": False}]
)
def test_differences_are_in_levels(change: dict[str, Any]) -> None:
    processor = ImageProcessor.from_config({**preprocessor_config.default(SMALL), **change})
    level = 1 / levels_per_unit(processor)

    def two_levels_brighter(image: Any) -> dict[str, Tensor]:  # noqa: ANN401
        return {"pixel_values": processor(image)["pixel_values"] + 2 * level}

    black = processor(np.zeros((9, 9, 3), np.uint8))["pixel_values"]
    gray = processor(np.full((9, 9, 3), 9, np.uint8))["pixel_values"]
    assert float((gray - black).mean()) == pytest.approx(9 * level, rel=1e-5)
    gate = check_pixels({"pil": processor}, {"pil": two_levels_brighter}, IMAGE)
    assert "differs by up to 2 of 255 levels, in 100%" in gate.findings[0].message


def test_effect_on_embeddings() -> None:
    model = SigLipVisionModel(SMALL).eval()
    randomize(model, seed=0)
    changed = replace(port_processors(SMALL)["pil"], resample=0)
    message = first_finding(changed, embed=model.embed).message
    assert "; cosine of the two embeddings " in message
    assert 0 < float(message.rpartition(" ")[2]) < 0.9999
    not_rescaled = replace(changed, rescale_factor=None)
    message = first_finding(not_rescaled, embed=model.embed).message
    assert "; pixel_values must be normalized to about [-1, 1], got values from " in message


def test_image_rejected_by_one_side() -> None:
    def refuse(image: object) -> dict[str, Tensor]:
        raise TypeError("no")

    gate = check_pixels(port_processors(SMALL), {"pil": refuse, "torchvision": refuse}, IMAGE)
    assert gate.findings[0].message == "the image, pil: TypeError: no"


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        ({"pixel_values": torch.zeros(1)}, "pixel_values has shape [1, 3, 16, 16], expected [1]"),
        ({"x": torch.zeros(1)}, "keys pixel_values, expected x"),
        (
            {"pixel_values": torch.zeros(1, 3, 16, 16).double()},
            "pixel_values has dtype torch.float32, expected torch.float64",
        ),
        ({"pixel_values": torch.zeros(1, 3, 16, 16)}, "differs by up to "),
    ],
)
def test_pixels_of_other_type(pixels: dict[str, Tensor], message: str) -> None:
    processors: Processors = {"pil": port_processors(SMALL)["pil"]}
    gate = check_pixels(processors, {"pil": lambda image: pixels}, IMAGE)
    assert message in gate.findings[0].message


class Float64Normalization(ImageProcessor):
    """Normalizes in float64 and rounds once, to float32."""

    def __call__(self, images: Any) -> Any:  # noqa: ANN401
        rescaled = replace(self, mean=None, std=None)(images)["pixel_values"].double()
        mean = torch.tensor(self.mean, dtype=torch.float32).double()[:, None, None]
        std = torch.tensor(self.std, dtype=torch.float32).double()[:, None, None]
        return {"pixel_values": ((rescaled - mean) / std).float()}


class OpaquePalette(ImageProcessor):
    """Ignores the transparency of palettes."""

    def __call__(self, images: Any) -> Any:  # noqa: ANN401
        if isinstance(images, Image.Image) and images.mode == "P":
            images = images.copy()
            images.info.pop("transparency", None)
        return super().__call__(images)


class FewerPatches(ImageProcessor):
    """Resizes to strictly fewer patches than allowed."""

    def __call__(self, images: Any) -> Any:  # noqa: ANN401
        assert self.max_num_patches is not None
        return self.batch([replace(self, max_num_patches=self.max_num_patches - 1).one(images)])


def check_broken(kind: type[ImageProcessor], config: SigLipVisionConfig) -> GateResult:
    """Run the gate on a processor with a subtle bug; the self-test has all of them."""
    fields = vars(port_processors(config)["pil"])
    return check_pixels({"pil": kind(**fields)}, image_processors(config), synthetic_image())


def test_normalization_in_float64_is_detected() -> None:
    """With ImageNet's mean; a mean of 0.5 is exact in both dtypes."""
    content = {**preprocessor_config.default(SMALL), "image_mean": [0.485, 0.456, 0.406]}
    right = ImageProcessor.from_config({**content, "image_std": [0.229, 0.224, 0.225]})
    broken = Float64Normalization(**vars(right))
    reference: dict[Backend, Callable[..., Any]] = {"pil": right}
    assert check_pixels({"pil": right}, reference, IMAGE).passed
    assert not check_pixels({"pil": broken}, reference, IMAGE).passed


def test_opaque_palette_is_detected() -> None:
    gate = check_broken(OpaquePalette, SMALL)
    names = [finding.message.split(",")[0] for finding in gate.findings]
    assert names == ["P with transparency 3", "P with transparency 0"]


def test_fewer_patches_are_detected() -> None:
    assert not check_broken(FewerPatches, NAFLEX).passed
    assert check_broken(ImageProcessor, NAFLEX).passed


def test_pixel_differences_fail_no_other_gate() -> None:
    """The port uses another resampling filter."""
    with random_case(SMALL, "N1") as case:
        port = SigLipVisionModel.from_hf(case.source)
        content = {**port.preprocessor_config, "resample": 2}
        processors: Processors = {"pil": ImageProcessor.from_config(content)}
        reference = image_processors(SMALL, case.source)
        gates = (check_pixels(processors, reference, IMAGE, port.embed), *case.check(port))
    comparison = Comparison((Section("checkpoint", "checkpoint", gates),), "checkpoint weights")
    assert [gate.name for gate in gates if not gate.passed] == ["pixels"]
    address = "pixels: pixel_values (port: siglip_port.image_processing): the image, "
    assert f"DIFFERENT (checkpoint weights): {address}" in comparison.verdict
    assert "looks like: the reference has resample=3" in comparison.verdict

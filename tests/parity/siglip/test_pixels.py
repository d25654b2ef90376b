"""The gate on pixels: passes what is equal, and says of what is not where, how much and why."""

from __future__ import annotations

import functools
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

import compare_origin
from scripts.selftest.catalogue import MUTANTS
from scripts.selftest.examination import examine_images
from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port.checkpoint import preprocessor_config as processors
from siglip_port.image_processing import Backend, ImageProcessor
from siglip_port.parity import randomise
from siglip_port.parity.siglip import reference as references
from siglip_port.parity.siglip.pixels import levels, pictures, pixels, waves
from tests.helpers.checkpoints import SMALL, MakeCheckpoint

PHOTOGRAPH = Image.open(Path(__file__).parents[3] / "tests" / "images" / "chelsea.png")


def sides(
    config: SigLipVisionConfig,
) -> tuple[dict[Backend, ImageProcessor], dict[Backend, Callable[[Any], Any]]]:
    theirs = references.processors(config)
    assert list(theirs) == ["pil", "torchvision"]
    return {
        name: ImageProcessor.from_config(processors.default(config), name) for name in theirs
    }, theirs


@pytest.mark.parametrize("naflex", [False, True])
def test_equal(naflex: bool) -> None:
    ours, theirs = sides(replace(SMALL, naflex=naflex))
    gate = pixels(ours, theirs, PHOTOGRAPH)
    assert gate.passed
    assert gate.name == "pixels"
    assert gate.checked == 2 * len(list(pictures(PHOTOGRAPH))) == 42
    assert not pixels({}, theirs, PHOTOGRAPH).passed  # nothing was checked


@pytest.mark.parametrize("naflex", [False, True])
@pytest.mark.parametrize("name", ["siglip-small", "siglip2-small"])
@pytest.mark.parametrize(
    "beside",
    [
        None,
        {},
        {"resample": 1},
        {"max_num_patches": 9, "do_rescale": None, "size": {"height": 99, "width": 9}},
    ],
)
def test_both_sides_read_the_same_from_a_checkpoint(
    naflex: bool, name: str, beside: dict[str, Any] | None, tmp_path: Path
) -> None:
    folder = tmp_path / name
    model = SigLipVisionModel(replace(SMALL, naflex=naflex))
    model.save_hf(folder)
    (folder / "preprocessor_config.json").unlink()
    if beside is not None:
        kind = "Siglip2ImageProcessor" if naflex else "SiglipImageProcessor"
        of_tower = (
            {"patch_size": SMALL.patch_size, "max_num_patches": SMALL.num_patches} if naflex else {}
        )
        content = {"image_processor_type": kind, **of_tower, **beside}
        (folder / "preprocessor_config.json").write_text(json.dumps(content))
    told = SigLipVisionModel.from_hf(folder).preprocessor_config
    theirs = references.processors(model.config, folder)
    gate = pixels(
        {name: ImageProcessor.from_config(told, name) for name in theirs}, theirs, PHOTOGRAPH
    )
    assert gate.passed, gate.findings[0]


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"resample": 2}, "the reference has resample=3"),
        (
            {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
            "the reference has mean and std of 0.5",
        ),
        ({"rescale_factor": 1 / 256}, "the reference has a factor of 1/255"),
        ({"backend": "torchvision"}, "the reference has the other backend"),
        ({"mean": (0.1, 0.2, 0.3)}, "the reference has mean and std of 0.5"),
    ],
)
def test_what_differs_is_called_by_name(change: dict[str, Any], hint: str) -> None:
    ours, theirs = sides(SMALL)
    gate = pixels({"pil": replace(ours["pil"], **change)}, theirs, PHOTOGRAPH)
    finding = gate.findings[0]
    assert finding.message.startswith("the photograph, pil: differs by up to ")
    assert finding.hint == hint
    assert not any(other.hint for other in gate.findings[1:])


@pytest.mark.parametrize(
    "change", [{}, {"image_std": [0.229] * 3}, {"do_rescale": False}, {"do_normalize": False}]
)
def test_differences_are_told_in_levels(change: dict[str, Any]) -> None:
    ours = ImageProcessor.from_config({**processors.default(SMALL), **change})

    def brighter(picture: Any) -> dict[str, Tensor]:  # noqa: ANN401
        return {"pixel_values": ours(picture)["pixel_values"] + 2 / levels(ours)}

    step = (
        ours(np.full((9, 9, 3), 9, np.uint8))["pixel_values"]
        - ours(np.zeros((9, 9, 3), np.uint8))["pixel_values"]
    )[0]
    assert float(step.mean()) == pytest.approx(9 / levels(ours), rel=1e-5)
    told = pixels({"pil": ours}, {"pil": brighter}, PHOTOGRAPH).findings[0].message
    assert "differs by up to 2 of 255 levels, in 100%" in told


def test_what_it_does_to_a_vector() -> None:
    model = SigLipVisionModel(SMALL).eval()
    randomise(model, seed=0)
    ours, theirs = sides(SMALL)
    (finding, *_) = pixels(
        {"pil": replace(ours["pil"], resample=0)}, theirs, PHOTOGRAPH, model.embed
    ).findings
    cosine = float(finding.message.rpartition(" ")[2])
    assert 0 < cosine < 0.9999
    assert "; the port's vectors of the two have a cosine of " in finding.message


def test_a_picture_that_one_side_refuses() -> None:
    ours, theirs = sides(SMALL)

    def refuse(picture: object) -> dict[str, Tensor]:
        raise TypeError("no")

    assert (
        pixels(ours, {**theirs, "pil": refuse}, PHOTOGRAPH).findings[0].message
        == "the photograph, pil: TypeError: no"
    )
    for other, what in (
        ({"pixel_values": torch.zeros(1)}, "pixel_values of shape [1, 3, 16, 16], expected [1]"),
        ({"x": torch.zeros(1)}, "gives pixel_values, expected x"),
        (
            {"pixel_values": torch.zeros(1, 3, 16, 16).double()},
            "pixel_values are torch.float32, expected torch.float64",
        ),
        ({"pixel_values": torch.zeros(1, 3, 16, 16)}, "differs by up to "),
    ):
        given: Callable[[Any], dict[str, Tensor]] = functools.partial(lambda made, _: made, other)
        assert what in pixels(ours, {**theirs, "pil": given}, PHOTOGRAPH).findings[0].message


@pytest.mark.parametrize("name", ["image_float64", "image_palette_alpha", "image_patches_few"])
def test_mistakes_are_noticed(name: str) -> None:
    """The finest ones; all are in the self-test."""
    (mutant,) = (mutant for mutant in MUTANTS if mutant.name == name)
    assert examine_images(mutant).passed
    assert not examine_images(replace(mutant, patch=None)).detected


def test_pixels_that_differ_are_told_from_a_model_that_does(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The port misreads the filter: the pixels differ, and no other gate has anything to say."""
    folder, derive = checkpoint(), processors.derive
    assert compare_origin.main(["--checkpoint", str(folder)]) == 0
    assert "pixels (42), environment" in capsys.readouterr().out.splitlines()[-1]
    monkeypatch.setattr(processors, "derive", lambda *given: {**derive(*given), "resample": 2})
    assert compare_origin.main(["--checkpoint", str(folder)]) == 1
    out = capsys.readouterr().out
    rows = [line.split(" | ") for line in out.splitlines() if " | " in line][1:]
    assert [row[0].strip() for row in rows if row[-1].strip() != "passed"] == ["pixels"]
    assert (
        "DIFFERENT (checkpoint weights): pixels: pixel_values (port: "
        "siglip_port.image_processing): the photograph, " in out
    )
    assert "looks like: the reference has resample=3" in out


def test_waves_have_every_level() -> None:
    assert [band.getextrema() for band in waves().split()] == [(0, 255)] * 3

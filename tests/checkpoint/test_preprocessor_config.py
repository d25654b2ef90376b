"""`preprocessor_config.json`: read, completed and saved."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import SiglipImageProcessorPil

from siglip_port import CheckpointError, SigLipVisionModel
from siglip_port.checkpoint.source import CONFIG, WEIGHTS
from tests.helpers.checkpoints import SHALLOW, MakeCheckpoint
from tests.helpers.damaged_files import Json, assert_loads
from tests.helpers.strategies import JSON

load = SigLipVisionModel.from_hf


def test_written_for_transformers(tmp_path: Path) -> None:
    """transformers reads the saved file, with the values of the published checkpoints."""
    SigLipVisionModel(SHALLOW).save_hf(tmp_path / "v1")
    processor = SiglipImageProcessorPil.from_pretrained(tmp_path / "v1")
    assert processor.size == {"height": 45, "width": 45}
    assert (processor.resample, *processor.image_mean, *processor.image_std) == (3, *[0.5] * 6)
    SigLipVisionModel(replace(SHALLOW, naflex=True)).save_hf(tmp_path / "naflex")
    naflex = transformers.AutoImageProcessor.from_pretrained(tmp_path / "naflex")
    assert type(naflex).__name__.startswith("Siglip2ImageProcessor")
    assert (naflex.patch_size, naflex.max_num_patches, naflex.resample) == (7, 36, 2)


PUBLISHED_PROCESSOR = {
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 45, "width": 45},
}
REFERENCES = {
    "processor_class": "SiglipProcessor",
    "auto_map": {"AutoProcessor": "processing.MyProcessor"},
}


@pytest.mark.parametrize(
    ("folder", "beside", "expected"),
    [
        ("siglip-small", None, {"resample": 3}),
        ("siglip2-small", None, {"resample": 2}),
        ("siglip-small", {**PUBLISHED_PROCESSOR, **REFERENCES}, PUBLISHED_PROCESSOR),
        ("siglip2-small", {"image_processor_type": "SiglipImageProcessor"}, {"resample": 3}),
        (
            "siglip-small",
            {"do_normalize": False, "resample": 0},
            {"do_normalize": False, "resample": 0},
        ),
        ("siglip-small", {"size": {"shortest_edge": 45}}, {"size": {"shortest_edge": 45}}),
        ("siglip-small", {"size": 45}, {"size": 45}),
        (
            "smolvlm",
            {
                "image_processor_type": "SmolVLMImageProcessor",
                "resample": 1,
                "image_mean": [0.4] * 3,
                "size": {"x": 9},
            },
            {
                "resample": 1,
                "image_mean": [0.4] * 3,
                "image_std": [0.5] * 3,
                "size": {"height": 45, "width": 45},
            },
        ),
        (
            "siglip2-experiments/../siglip-small",
            {**PUBLISHED_PROCESSOR, "resample": 3, "size": {"height": 384, "width": 384}},
            {**PUBLISHED_PROCESSOR, "resample": 3},
        ),
        (
            "siglip-small",
            {"image_processor_type": "X", "resample": True, "image_mean": [float("nan")] * 3},
            {"resample": 3},
        ),
    ],
)
def test_stored_config(
    folder: str,
    beside: dict[str, Any] | None,
    expected: dict[str, Any],
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
) -> None:
    source = checkpoint(SHALLOW, name=folder)
    if beside is not None:
        (source / "preprocessor_config.json").write_text(json.dumps(beside))
    load(source).save_hf(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert expected.items() <= written.items()
    assert not written.keys() & REFERENCES.keys()
    assert written["image_processor_type"] == "SiglipImageProcessor"
    assert load(tmp_path / "out").preprocessor_config == written


def test_other_files(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "siglip2-experiments").mkdir()
    source = checkpoint(SHALLOW, name="siglip2-experiments/siglip-small")
    # The name of the parent folder has no effect.
    assert load(source).preprocessor_config["resample"] == 3
    inner = {"image_processor_type": "Gemma3ImageProcessor", "resample": 2, "image_mean": [0.4] * 3}
    # transformers 5 writes and prefers this file.
    (source / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
    config = load(source).preprocessor_config
    assert (config["resample"], config["image_mean"], config["image_std"]) == (
        2,
        [0.4] * 3,
        [0.5] * 3,
    )
    (source / "preprocessor_config.json").write_text("not json")
    assert load(source).preprocessor_config == config
    (source / "processor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json is not valid JSON"):
        load(source)


def test_not_serializable(tmp_path: Path) -> None:
    model = SigLipVisionModel(SHALLOW)
    model.preprocessor_config = {"image_mean": {0.5}}
    with pytest.raises(CheckpointError, match=r"cannot be written to .*not JSON serializable"):
        model.save_hf(tmp_path / "out")
    assert not list(tmp_path.iterdir())


NUMBERS = st.sampled_from(
    [0, -1, 1, 24, 10**9, 2**31, 2**63, 10**400, 1e308, float("inf"), float("nan"), True, "24"]
)


PROCESSOR_KEYS = [
    "image_processor_type",
    "resample",
    "image_mean",
    "image_std",
    "size",
    "interpolation",
    "mean",
]


@given(
    st.dictionaries(
        st.sampled_from([*PROCESSOR_KEYS, "image_processor"]), NUMBERS | JSON, max_size=4
    ),
    st.sampled_from(["preprocessor_config.json", "processor_config.json", "open_clip_config.json"]),
    st.sampled_from(["SiglipImageProcessor", "CLIPImageProcessor"]),
)
@settings(max_examples=30)
def test_any_json(
    encoder_folder: Path, model: SigLipVisionModel, content: Json, name: str, kind: str
) -> None:
    """The model loads and saves with any JSON object as its image processor."""
    folder = encoder_folder.parent / f"any-{name}"
    folder.mkdir(exist_ok=True)
    for file in (WEIGHTS, CONFIG):
        shutil.copy(encoder_folder / file, folder)
    content = {"image_processor_type": kind, **content}
    if name == "open_clip_config.json":
        content = {"preprocess_cfg": content, "pretrained_cfg": content}
    (folder / name).write_text(
        json.dumps({"image_processor": content} if name.startswith("processor") else content)
    )
    assert_loads(folder, model)
    SigLipVisionModel.from_hf(folder).save_timm(folder / "out")

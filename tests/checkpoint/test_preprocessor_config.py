"""Preprocessing of checkpoints: from files, from words of the user, by default; and as saved."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import SiglipImageProcessorPil

from siglip_port import CheckpointError, SigLipVisionModel, visualize
from siglip_port.checkpoint import default_preprocessor_config
from siglip_port.checkpoint.preprocessing import ASSUMED
from siglip_port.checkpoint.preprocessor_config import PREPROCESSOR
from siglip_port.checkpoint.provenance import ORIGIN
from siglip_port.checkpoint.source import CONFIG, WEIGHTS
from siglip_port.embed import Embedder, embed
from siglip_port.image_processing import ImageProcessor
from tests.helpers.checkpoints import SHALLOW, SMALL, MakeCheckpoint
from tests.helpers.damaged_files import Json, assert_loads
from tests.helpers.hub_server import Hub, Repository
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
OTHER_SIZE = {"height": 384, "width": 384}
SMOLVLM = {"image_processor_type": "SmolVLMImageProcessor", "resample": 1, "image_mean": [0.4] * 3}
GEMMA3 = {
    "image_processor_type": "Gemma3ImageProcessor",
    "image_mean": [0.4] * 3,
    "do_pan_and_scan": None,
}
UNUSABLE = {"image_processor_type": "X", "resample": True, "image_mean": [float("nan")] * 3}


def write_processor(folder: Path, content: object, name: str = PREPROCESSOR) -> None:
    (folder / name).write_text(json.dumps(content))


REFERENCES = {
    "processor_class": "SiglipProcessor",
    "auto_map": {"AutoProcessor": "processing.MyProcessor"},
}


@pytest.mark.parametrize(
    ("beside", "status", "source", "expected"),
    [
        (None, "default", "no preprocessor_config.json", {"resample": 3}),
        (PUBLISHED_PROCESSOR, "stored", PREPROCESSOR, PUBLISHED_PROCESSOR),
        (
            {**PUBLISHED_PROCESSOR, **REFERENCES},
            "stored",
            PREPROCESSOR,
            {**PUBLISHED_PROCESSOR, **REFERENCES},
        ),
        (
            {"image_processor_type": "SiglipImageProcessor"},
            "stored",
            PREPROCESSOR,
            {"resample": 3},
        ),
        ({"do_normalize": False}, "stored", PREPROCESSOR, {"do_normalize": False}),
        ({"size": [45, 45]}, "stored", PREPROCESSOR, {}),
        (
            {**PUBLISHED_PROCESSOR, "size": OTHER_SIZE},
            "stored",
            "preprocessor_config.json, with the model's size 45 instead of (384, 384)",
            PUBLISHED_PROCESSOR,
        ),
        ({"size": {"shortest_edge": 45}}, "unknown", "fixed aspect ratio is not supported", {}),
        ({"size": 45}, "unknown", "fixed aspect ratio is not supported", {}),
        (
            {"do_center_crop": True},
            "unknown",
            "preprocessor_config.json: do_center_crop and do_pad are not supported for SigLIP; "
            "set them to false",
            {"do_center_crop": True},
        ),
        (SMOLVLM, "unknown", "preprocessor_config.json is of SmolVLMImageProcessor", SMOLVLM),
        (
            {"image_processor_type": "Siglip2ImageProcessorFast", "resample": 2},
            "unknown",
            "preprocessor_config.json is of Siglip2ImageProcessorFast",
            {"resample": 2},
        ),
        (UNUSABLE, "unknown", "preprocessor_config.json is of X", {"resample": 3}),
        (
            {**UNUSABLE, "do_normalize": False, "image_mean": [0.4] * 3},
            "unknown",
            "preprocessor_config.json is of X",
            {"image_mean": [0.5] * 3},
        ),
        (GEMMA3, "stored", PREPROCESSOR, {"resample": 2, "image_mean": [0.4] * 3}),
        (
            {**GEMMA3, "do_pan_and_scan": True},
            "unknown",
            "preprocessor_config.json is of Gemma3ImageProcessor",
            {},
        ),
    ],
)
def test_stored_config(
    beside: dict[str, Any] | None,
    status: str,
    source: str,
    expected: dict[str, Any],
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
) -> None:
    folder = checkpoint(SHALLOW)
    if beside is not None:
        write_processor(folder, beside)
    model = load(folder)
    assert model.preprocessing.status == status
    assert model.preprocessing.source.endswith(source)
    expected = {name: value for name, value in expected.items() if name != "image_processor_type"}
    config = model.preprocessor_config
    assert expected.items() <= config.items()
    assert config["image_processor_type"] == "SiglipImageProcessor"
    assert config["size"] == {"height": 45, "width": 45}
    if not config.get("do_center_crop"):
        ImageProcessor.from_config(config)
    assert model.provenance is not None
    evidence = model.provenance.evidence.preprocessing
    assert evidence.startswith("assumed: ") == (status in ("default", "unknown"))
    # What is written is read back with the same status.
    for save in (model.save_hf, model.save_timm):
        save(tmp_path / save.__name__)
        again = load(tmp_path / save.__name__).preprocessing
        if status in ("default", "unknown"):
            assert (again.status, again.source) == (status, model.preprocessing.source)
        else:
            assert again.status in ("stored", "fixed")
    written = {key: value for key, value in config.items() if key not in REFERENCES}
    assert load(tmp_path / "save_hf").preprocessor_config == written
    assert SiglipImageProcessorPil.from_pretrained(tmp_path / "save_hf").size["height"] == 45


def test_names_have_no_influence(checkpoint: MakeCheckpoint) -> None:
    names = ("siglip2-finetuned", "google/siglip2-base-patch16-224", "encoder_v3")
    configs = [load(checkpoint(SHALLOW, name=name)).preprocessor_config for name in names]
    assert configs == [default_preprocessor_config(SHALLOW)] * 3


@pytest.mark.parametrize(("vocab_size", "resample"), [(32000, 3), (250000, 3), (256000, 2)])
def test_vocabulary(vocab_size: int, resample: int, checkpoint: MakeCheckpoint) -> None:
    """SigLIP 2 has Gemma's vocabulary; the multilingual SigLIP has another."""
    folder = checkpoint(SHALLOW)
    content = json.loads((folder / CONFIG).read_text())
    text_config = {"model_type": "siglip_text_model", "vocab_size": vocab_size}
    content = {"model_type": "siglip", "vision_config": content, "text_config": text_config}
    (folder / CONFIG).write_text(json.dumps(content))
    preprocessing = load(folder).preprocessing
    assert (preprocessing.config["resample"], preprocessing.status) == (resample, "default")
    assert ("vocab_size 256000" in str(preprocessing)) == (resample == 2)


def test_published_origin(tmp_path: Path) -> None:
    """Saved weights record the repository that they are from."""
    for name, resample in (("siglip-base-patch16-224", 3), ("siglip2-base-patch16-224", 2)):
        model = SigLipVisionModel(SHALLOW)
        model.save_hf(tmp_path / name)
        tensors = load_file(tmp_path / name / WEIGHTS)
        origin = {ORIGIN: f"google/{name}@{'0' * 40}", "format": "pt"}
        save_file(tensors, tmp_path / name / WEIGHTS, origin)
        (tmp_path / name / PREPROCESSOR).unlink()
        preprocessing = load(tmp_path / name).preprocessing
        assert (preprocessing.config["resample"], preprocessing.status) == (resample, "fixed")
        assert str(preprocessing).startswith(f"the published one of google/{name}")


def test_published_repository(hub: Hub, whole_model: Path, cache: Path) -> None:
    for name, resample in (("siglip-base-patch16-224", 3), ("siglip2-base-patch16-224", 2)):
        hub.repositories[f"google/{name}"] = Repository(whole_model)
        preprocessing = load(f"google/{name}", cache_dir=cache).preprocessing
        assert (preprocessing.config["resample"], preprocessing.status) == (resample, "fixed")


def test_models_with_other_processors(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint(SHALLOW)
    content = {"vision_config": json.loads((folder / CONFIG).read_text())}
    for model_type, status in (("paligemma", "default"), ("idefics3", "unknown")):
        (folder / CONFIG).write_text(json.dumps({**content, "model_type": model_type}))
        assert load(folder).preprocessing.status == status
    write_processor(folder, {"resample": 2})
    source = load(folder).preprocessing.source
    assert source == "preprocessor_config.json is of a idefics3 model"


DAMAGED = [
    ({"size": {"haight": 5, "width": 5}}, "size must be"),
    ({"size": {"height": 5}}, "size must be"),
    ({"size": {"height": 5, "width": 5, "depth": 5}}, "size must be"),
    ({"size": {"height": -5, "width": 5}}, "size must be"),
    ({"size": {"height": 10**9, "width": 5}}, "size must be"),
    ({"size": {"height": "45", "width": "45"}}, "size must be"),
    ({"size": {"height": True, "width": True}}, "size must be"),
    ({"size": {"shortest_edge": "45"}}, "size must be"),
    ({"size": {"shortest_edge": -1}}, "size must be"),
    ({"size": {}}, "size must be"),
    ({"size": True}, "size must be"),
    ({"size": None}, "size must be"),
    ({"size": 0}, "size must be"),
    ({"size": "45"}, "size must be"),
    ({"size": [45]}, "size must be"),
    ({"size": [45, 45, 3]}, "size must be"),
    ({"resample": "bicubic"}, "resample must be one of"),
    ({"resample": 99}, "resample must be one of"),
    ({"resample": True}, "resample must be one of"),
    ({"resample": None}, "resample must be one of"),
    ({"rescale_factor": 0}, "rescale_factor must be a nonzero number"),
    ({"rescale_factor": "x", "do_rescale": False}, "rescale_factor must be a nonzero number"),
    ({"image_mean": [0.5]}, "image_mean must be three numbers"),
    ({"image_mean": [0.5] * 2}, "image_mean must be three numbers"),
    ({"image_mean": [0.5] * 4}, "image_mean must be three numbers"),
    ({"image_mean": "x", "do_normalize": False}, "image_mean must be three numbers"),
    ({"image_std": [0.5, 0.5, 0]}, "image_std must be three nonzero numbers"),
    ({"image_std": None}, "image_std must be three numbers"),
    ({"do_normalize": "false"}, "do_normalize must be true or false"),
    ({"do_resize": 1}, "do_resize must be true or false"),
    ({"do_rescale": []}, "do_rescale must be true or false"),
    ({"do_convert_rgb": "yes"}, "do_convert_rgb must be true or false"),
    ({"do_center_crop": 1}, "do_center_crop must be true or false"),
    ({"do_pad": "no"}, "do_pad must be true or false"),
    ({ASSUMED: {"status": "stored"}}, "siglip_port_assumed must have a status and a reason"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGED, ids=lambda value: json.dumps(value)[:40])
def test_damaged_field(
    change: dict[str, Any], message: str, encoder_copy: Path, tmp_path: Path
) -> None:
    """File and field are named; a program can neither state nor save such a value."""
    content = json.loads((encoder_copy / PREPROCESSOR).read_text()) | change
    write_processor(encoder_copy, content)
    with pytest.raises(CheckpointError, match=rf"{PREPROCESSOR}: {message}"):
        load(encoder_copy)
    model = load(encoder_copy, preprocessing="siglip2")
    assert model.preprocessing.status == "stated"
    if ASSUMED in change:
        return
    with pytest.raises(ValueError, match=message):
        load(encoder_copy, preprocessing=content)
    size = content["size"]
    if size == {"height": 16, "width": 16} or not isinstance(size, int) or size is True:
        model.preprocessor_config = content
        with pytest.raises(CheckpointError, match=rf"cannot be saved: {message}"):
            model.save_hf(tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_damaged_values_of_naflex(tmp_path: Path) -> None:
    SigLipVisionModel(replace(SHALLOW, naflex=True)).save_hf(tmp_path)
    content = json.loads((tmp_path / PREPROCESSOR).read_text())
    for name in ("patch_size", "max_num_patches"):
        write_processor(tmp_path, content | {name: 0})
        with pytest.raises(CheckpointError, match=f"{name} must be an integer"):
            load(tmp_path)
    write_processor(tmp_path, content | {"do_center_crop": True})
    assert load(tmp_path).preprocessing.status == "unknown"
    with pytest.raises(ValueError, match="preprocessing='siglip' is for models of a fixed size"):
        load(tmp_path, preprocessing="siglip")
    stated = load(tmp_path, preprocessing="siglip2").preprocessing
    assert (stated.config, stated.status) == (content, "stated")


def test_other_numbers_of_channels(tmp_path: Path) -> None:
    """A model of gray images has one mean."""
    SigLipVisionModel(replace(SHALLOW, num_channels=1)).save_hf(tmp_path)
    write_processor(tmp_path, {"image_mean": [0.4], "image_std": [0.3]})
    assert load(tmp_path).preprocessor_config["image_mean"] == [0.4]
    write_processor(tmp_path, {"image_mean": [0.4, 0.4]})
    with pytest.raises(CheckpointError, match="image_mean must be three numbers"):
        load(tmp_path)


# --- words of the user ----------------------------------------------------------------------------

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))


def embed_with(config: dict[str, Any], model: SigLipVisionModel) -> Tensor:
    """Embed the image with stated options."""
    with torch.inference_mode():
        return model.embed(**ImageProcessor.from_config(config)(IMAGE))


def test_unknown_preprocessing_needs_a_word(encoder_copy: Path, tmp_path: Path) -> None:
    write_processor(encoder_copy, SMOLVLM)
    model = load(encoder_copy)
    photo = tmp_path / "photo.png"
    IMAGE.save(photo)
    advice = r"unknown \(preprocessor_config.json is of SmolVLM.*\); pass preprocessing= with"
    for use in (
        lambda: model.embed_images([IMAGE]),
        lambda: visualize.model_view(model, IMAGE),
        lambda: Embedder(encoder_copy),
        lambda: Embedder(model),
        lambda: embed([photo], tmp_path / "output", model, num_workers=0),
    ):
        with pytest.raises(ValueError, match=advice):
            use()
    bicubic = default_preprocessor_config(SMALL)
    other = {**bicubic, "resample": 0, "image_mean": [0.4] * 3}
    write_processor(tmp_path, other, "other.json")
    words: list[tuple[Any, dict[str, Any]]] = [
        ("siglip", bicubic),
        ("siglip2", {**bicubic, "resample": 2}),
        (other, other),
        (tmp_path / "other.json", other),
        (str(tmp_path / "other.json"), other),
        ({"resample": 0, "image_mean": [0.4] * 3}, other),
    ]
    for word, expected in words:
        stated = load(encoder_copy, preprocessing=word)
        assert stated.preprocessor_config == expected
        vectors = embed_with(expected, model)
        assert torch.equal(stated.embed_images([IMAGE]), vectors)
        embedder = Embedder(encoder_copy, preprocessing=word)
        assert embedder.processor == ImageProcessor.from_config(expected)
        assert pickle.loads(pickle.dumps(embedder)).base_model.preprocessor_config == expected
    model.preprocessor_config = other
    assert torch.equal(model.embed_images([IMAGE]), embed_with(other, model))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("bicubic", "preprocessing must be 'siglip', 'siglip2', a mapping, or the path"),
        (3, "preprocessing must be 'siglip', 'siglip2', a mapping, or the path"),
        ({"resample": 9}, "preprocessing=: resample must be one of"),
        ({"size": {"shortest_edge": 16}}, "preprocessing=: size must be"),
        (SMOLVLM, "must be of a SiglipImageProcessor, got SmolVLMImageProcessor"),
    ],
)
def test_wrong_word(word: Any, message: str, encoder_folder: Path) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=message):
        load(encoder_folder, preprocessing=word)


def test_default_is_reported_once(
    encoder_copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert load(encoder_copy).embed_images([IMAGE]).shape == (1, 24)
    assert not caplog.records
    (encoder_copy / PREPROCESSOR).unlink()
    photo = tmp_path / "photo.png"
    IMAGE.save(photo)
    uses: list[Callable[[SigLipVisionModel], object]] = [
        lambda model: model.embed_images([IMAGE]),
        lambda model: visualize.model_view(model, IMAGE),
        lambda model: Embedder(model),
        lambda model: embed([photo], tmp_path / "output", model, num_workers=0),
    ]
    for use in uses:
        model = load(encoder_copy)
        assert not caplog.records
        use(model)
        use(model)
        assert len(caplog.records) == 1
        message = caplog.records[0].getMessage()
        assert message.startswith(
            f"{encoder_copy}: preprocessing is assumed: bicubic filter, pixels in [-1, 1] (no "
            "preprocessor_config.json); to state it, pass preprocessing= with"
        )
        caplog.clear()
    load(encoder_copy, preprocessing="siglip").embed_images([IMAGE])
    assert not caplog.records


# --- other files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["feature_extractor", "image_processor", "processor"])
def test_processor_beside_the_encoder(
    folder: str, encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers stores processors in folders beside those of the models."""
    encoder = Path(shutil.copytree(encoder_folder, tmp_path / "image_encoder"))
    (encoder / PREPROCESSOR).unlink()
    (tmp_path / folder).mkdir()
    write_processor(tmp_path / folder, {"image_processor_type": "CLIPImageProcessor"})
    assert load(encoder).preprocessing.status == "default"  # of another encoder
    write_processor(tmp_path / folder, PUBLISHED_PROCESSOR | {"image_mean": [0.4] * 3})
    monkeypatch.chdir(encoder)
    for source in (encoder, encoder / WEIGHTS, Path()):
        preprocessing = load(source).preprocessing
        assert preprocessing.config["image_mean"] == [0.4] * 3
        assert preprocessing.source.startswith(f"../{folder}/preprocessor_config.json, with the")
    write_processor(encoder, {"resample": 0})
    assert load(encoder).preprocessor_config["resample"] == 0  # its own file


def test_other_files(checkpoint: MakeCheckpoint) -> None:
    source = checkpoint(SHALLOW)
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
    with pytest.raises(CheckpointError, match=r"preprocessor_config cannot be saved: image_mean"):
        model.save_hf(tmp_path / "out")
    model.preprocessor_config = {"comment": {0.5}}
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
    """With any image processor, a model loads and saves a valid one, or the file is named."""
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
    try:
        result = load(folder)
    except CheckpointError as error:
        assert name in str(error)  # noqa: PT017 (either outcome is valid)
        assert_loads(folder, model, preprocessing="siglip")
        return
    assert all(torch.equal(t, result.state_dict()[n]) for n, t in model.state_dict().items())
    ImageProcessor.from_config(result.preprocessor_config)
    result.save_timm(folder / "out")

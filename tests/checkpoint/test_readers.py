"""Saved folders in the libraries that read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import timm
import torch
from PIL.Image import Image
from transformers import AutoImageProcessor, AutoModel, pipeline

from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port.checkpoint.extract import extract_model
from siglip_port.parity.metrics import relative_error
from tests.helpers.checkpoints import SMALL, pixels
from tests.helpers.models import random_model
from tests.helpers.sample_images import random_image

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

HEADLESS = replace(SMALL, pooling_head=False)
MEAN = replace(HEADLESS, mean_pooling=True)
POOLED = {"head": SMALL, "naflex": replace(SMALL, naflex=True), "mean": MEAN}
TOKENS_ONLY = {"headless": HEADLESS, "naflex-mean": replace(MEAN, naflex=True)}


@pytest.fixture(scope="module")
def images() -> list[Image]:
    random = np.random.default_rng(0)
    return [random_image(random) for _ in range(3)]


def sentence_transformer(folder: Path, **options: object) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", local_files_only=True, **options)


@pytest.fixture(params=["save_hf", "extract"])
def write(request: pytest.FixtureRequest) -> Callable[[SigLipVisionModel, Path], object]:
    if request.param == "extract":
        return extract_model
    return SigLipVisionModel.save_hf


@pytest.mark.parametrize("config", POOLED.values(), ids=POOLED)
@pytest.mark.parametrize("exists", [False, True], ids=["new", "over"])
def test_sentence_transformers(
    config: SigLipVisionConfig,
    exists: bool,
    write: Callable[[SigLipVisionModel, Path], object],
    images: list[Image],
    tmp_path: Path,
) -> None:
    model = random_model(config)
    if exists:
        random_model(TOKENS_ONLY["headless"], seed=1).save_hf(tmp_path / "out")
    # as in the published files; this processor needs a tokenizer
    model.preprocessor_config["processor_class"] = "SiglipProcessor"
    write(model, tmp_path / "out")
    reader = sentence_transformer(tmp_path / "out")
    assert reader.get_embedding_dimension() == config.embed_dim
    expected = model.embed_images(images)
    assert relative_error(reader.encode(images, convert_to_tensor=True), expected) < 1e-5
    normalized = reader.encode(images, convert_to_tensor=True, normalize_embeddings=True)
    assert relative_error(normalized, model.embed_images(images, normalize=True)) < 1e-5
    if config.pooling_head:  # negative control: without this file, the mean of the tokens
        (tmp_path / "out" / "modules.json").unlink()
        mean = sentence_transformer(tmp_path / "out").encode(images, convert_to_tensor=True)
        assert relative_error(mean, expected) > 0.1


def test_sentence_transformers_saves_again(images: list[Image], tmp_path: Path) -> None:
    model = random_model(MEAN)
    model.save_hf(tmp_path / "out")
    sentence_transformer(tmp_path / "out").save(str(tmp_path / "again"))
    reader = sentence_transformer(tmp_path / "again", processor_kwargs={"backend": "pil"})
    embeddings = reader.encode(images, convert_to_tensor=True)
    assert relative_error(embeddings, model.embed_images(images)) < 1e-5


@pytest.mark.parametrize("config", TOKENS_ONLY.values(), ids=TOKENS_ONLY)
def test_sentence_transformers_without_pooling(
    config: SigLipVisionConfig, images: list[Image], tmp_path: Path
) -> None:
    """An error instead of the mean of all tokens."""
    random_model(POOLED["mean"], seed=1).save_hf(tmp_path)
    random_model(config).save_hf(tmp_path)
    with pytest.raises(KeyError, match="sentence_embedding"):
        sentence_transformer(tmp_path).encode(images)


@pytest.mark.parametrize("config", [*POOLED.values(), HEADLESS], ids=[*POOLED, "headless"])
@torch.no_grad()
def test_transformers(config: SigLipVisionConfig, images: list[Image], tmp_path: Path) -> None:
    model = random_model(config)
    model.save_hf(tmp_path)
    reference, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    inputs = processor(images, return_tensors="pt")
    tokens = model(
        inputs["pixel_values"],
        inputs.get("pixel_attention_mask"),
        inputs.get("spatial_shapes"),
    )
    output = reference(**inputs)
    assert relative_error(output.last_hidden_state, tokens) < 1e-5
    if config.pooling_head:
        embeddings = model.embed_images(images).double()
        assert relative_error(output.pooler_output, embeddings) < 1e-5


@pytest.mark.parametrize("config", [SMALL, HEADLESS], ids=["head", "headless"])
@torch.no_grad()
def test_transformers_pipeline(
    config: SigLipVisionConfig, images: list[Image], tmp_path: Path
) -> None:
    model = random_model(config)
    model.save_hf(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    task: Any = "image-feature-extraction"
    run = pipeline(task, model=str(tmp_path), image_processor=processor, device="cpu")
    inputs = processor(images, return_tensors="pt")
    tokens = torch.tensor([run(image)[0] for image in images])
    assert relative_error(tokens, model(**inputs)) < 1e-5
    if config.pooling_head:
        pooled = torch.tensor([run(image, pool=True)[0] for image in images])
        assert relative_error(pooled, model.embed_images(images)) < 1e-5


@pytest.mark.parametrize("config", [SMALL, MEAN, HEADLESS], ids=["head", "mean", "headless"])
@torch.no_grad()
def test_timm_over_transformers(config: SigLipVisionConfig, tmp_path: Path) -> None:
    random_model(SMALL, seed=1).save_hf(tmp_path)
    model = random_model(config)
    model.save_timm(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]
    reference: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0)
    x = pixels(config).float()
    assert relative_error(model(x), reference.eval().forward_features(x)) < 1e-5
    if config.has_pooled_output:
        assert relative_error(model.embed(x), reference(x)) < 1e-5
    assert json.loads((tmp_path / "config.json").read_text())["num_features"] == config.embed_dim

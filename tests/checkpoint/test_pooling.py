"""Projections behind the pooling: never dropped without a word."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from siglip_port import CheckpointError, SigLipVisionModel
from siglip_port.checkpoint.inspect import inspect_checkpoint
from siglip_port.checkpoint.source import CONFIG, WEIGHTS
from siglip_port.embed import EmbedOptions
from siglip_port.embed.encoder import BatchEncoder, ModelSource
from siglip_port.hub import find_source
from siglip_port.parity.stress_weights import randomize
from tests.helpers.checkpoints import ODD, SMALL, adding, edit_tensors, pixels
from tests.helpers.flax import flax, save_arrays

load = SigLipVisionModel.from_hf

TENSOR = torch.ones(5, 24)


def write_timm(
    folder: Path, prefix: str, extra: dict[str, Tensor], **changes: object
) -> SigLipVisionModel:
    """Write a model with timm's names under a prefix, and extra tensors; return the model."""
    original = SigLipVisionModel(replace(SMALL, **changes))  # type: ignore[arg-type]
    randomize(original)
    original.save_timm(folder)
    tensors = {f"{prefix}{name}": tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    tensors |= {name: tensor.clone() for name, tensor in extra.items()}
    save_file(tensors, folder / WEIGHTS)
    return original.eval()


def assert_refused_embedding(source: Path, name: str, original: SigLipVisionModel) -> None:
    """Assert that the embedding is refused by the projection's name, and the head can be loaded."""
    model = load(source)
    assert model.pooling_head is None
    x = pixels(model.config).float()
    torch.testing.assert_close(model(x), original(x))
    message = (
        rf"^this model has no pooled embedding: the checkpoint has a projection behind its pooling "
        rf"head \({name}.*\), which is not applied; pass pooling_head=True"
    )
    with pytest.raises(ValueError, match=message):
        model.embed(x)
    with pytest.raises(ValueError, match=message):
        model.pool(model(x))
    assert model.provenance is not None
    assert f"pooling  none: the checkpoint has a projection behind its pooling head ({name}" in str(
        model.provenance
    )
    assert "other tensors" not in model.provenance.ignored
    assert "projector" not in model.provenance.ignored
    inspection = inspect_checkpoint(find_source(source))
    assert inspection.evidence.pooling == model.provenance.evidence.pooling
    head = load(source, pooling_head=True)
    torch.testing.assert_close(head.embed(x), original.embed(x))
    assert head.provenance is not None
    assert f"head, without the projection behind it ({name}" in str(head.provenance)
    headless = load(source, pooling_head=False)
    assert headless.provenance is not None
    assert headless.provenance.evidence.pooling == "none"


@pytest.mark.parametrize(
    ("prefix", "names"),
    [
        ("visual.trunk.", ["visual.head.proj.weight"]),
        ("visual.trunk.", ["visual.head.mlp.fc1.weight", "visual.head.mlp.fc2.weight"]),
        ("visual.trunk.", ["visual.trunk.head.bias", "visual.trunk.head.weight"]),
        ("module.visual.trunk.", ["visual.head.proj.weight"]),
        ("", ["head.fc.weight"]),
        ("", ["fc_norm.weight"]),
        ("", ["pre_logits.fc.weight"]),
    ],
)
@torch.no_grad()
def test_timm(prefix: str, names: list[str], tmp_path: Path) -> None:
    extra = dict.fromkeys(names, TENSOR)
    if prefix:
        extra |= {"text.transformer.x": TENSOR, "logit_scale": torch.ones(1)}
    original = write_timm(tmp_path, prefix, extra)
    assert_refused_embedding(tmp_path, names[0], original)
    provenance = load(tmp_path).provenance
    assert provenance is not None
    assert provenance.ignored["projection behind the pooling"] == len(names)
    assert provenance.ignored["pooling head"] == 13


@torch.no_grad()
def test_image_classifier_of_timm(tmp_path: Path) -> None:
    """The embedding of timm's classifier is the pooled vector before it."""
    original = write_timm(tmp_path, "", {"head.weight": TENSOR, "head.bias": torch.ones(5)})
    model = load(tmp_path)
    x = pixels(SMALL).float()
    torch.testing.assert_close(model.embed(x), original.embed(x))
    assert model.provenance is not None
    assert model.provenance.evidence.pooling == (
        "attention pooling head, without the image classifier behind it (head.bias, head.weight)"
    )
    assert model.provenance.ignored == {"image classifier": 2}


@torch.no_grad()
def test_mean_pooling(tmp_path: Path) -> None:
    extra = {"visual.head.proj.weight": TENSOR}
    original = write_timm(tmp_path, "visual.trunk.", extra, pooling_head=False, mean_pooling=True)
    model = load(tmp_path)
    x = pixels(SMALL).float()
    with pytest.raises(ValueError, match=r"behind its pooling \(visual.head.proj.weight\), which"):
        model.embed(x)
    torch.testing.assert_close(model(x).mean(1), original.embed(x))
    with pytest.raises(CheckpointError, match="has no pooling head"):
        load(tmp_path, pooling_head=True)


@pytest.mark.parametrize(
    "name",
    [
        "visual_projection.weight",
        "model.vision_projection.weight",
        "vision_proj.0.weight",
        "image_projection",
        "img_projection.linear.bias",
        "image_embed_head.weight",
        "projection.weight",
        "proj",
        "projection_head.0.weight",
        "head.weight",
    ],
)
@torch.no_grad()
def test_huggingface(encoder_copy: Path, model: SigLipVisionModel, name: str) -> None:
    text = {"text_model.x": TENSOR, "text_projection.weight": TENSOR, "logit_scale": torch.ones(1)}
    edit_tensors(encoder_copy, adding({name: TENSOR, **text}))
    assert_refused_embedding(encoder_copy, name, model)


@pytest.mark.parametrize(
    "extra",
    [
        ["text_projection.weight", "text_model.head.weight", "logit_scale"],
        ["language_model.x", "multi_modal_projector.linear.weight", "vision_projection.weight"],
        ["model.embed_tokens.weight", "model.img_projection.0.weight", "lm_head.weight"],
        ["head.other_model.layers.0.mlp.fc1.weight", "fc.decoder.weight"],
    ],
)
@torch.no_grad()
def test_other_projections(encoder_copy: Path, model: SigLipVisionModel, extra: list[str]) -> None:
    """Projections of texts, and of tokens for a language model, do not change the embedding."""
    edit_tensors(encoder_copy, adding(dict.fromkeys(extra, TENSOR)))
    x = pixels(SMALL).float()
    torch.testing.assert_close(load(encoder_copy).embed(x), model.embed(x))


@pytest.mark.parametrize("name", ["head/kernel", "pre_logits/kernel"])
@pytest.mark.parametrize("scanned", [False, True], ids=["indexed", "scanned"])
@torch.no_grad()
def test_big_vision(name: str, scanned: bool, tmp_path: Path) -> None:
    original = SigLipVisionModel(replace(ODD, image_size=42)).eval()
    randomize(original)
    arrays: dict[str, Any] = flax(original.config, original.state_dict(), scanned=scanned)
    arrays[name] = np.ones((72, 5))
    path = tmp_path / "a.npz"
    save_arrays(path, {f"params/img/{n}": a.astype(np.float32) for n, a in arrays.items()})
    assert_refused_embedding(path, f"params/img/{name}", original)


MODULES = [
    {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]


@pytest.mark.parametrize(
    "kind",
    ["sentence_transformers.models.Dense", "sentence_transformers.models.LayerNorm", "x.Dense"],
)
@torch.no_grad()
def test_sentence_transformers(encoder_copy: Path, model: SigLipVisionModel, kind: str) -> None:
    dense = {"idx": 2, "path": "2_Dense", "type": kind}
    (encoder_copy / "modules.json").write_text(json.dumps([*MODULES, dense]))
    assert_refused_embedding(encoder_copy, "2_Dense", model)
    normalize = {"idx": 2, "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
    (encoder_copy / "modules.json").write_text(json.dumps([*MODULES, normalize]))
    x = pixels(SMALL).float()
    torch.testing.assert_close(load(encoder_copy).embed(x), model.embed(x))
    (encoder_copy / "modules.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"modules.json cannot be read"):
        load(encoder_copy)


def test_many_images(encoder_copy: Path) -> None:
    """`embed` refuses before the first image is read."""
    edit_tensors(encoder_copy, adding({"visual_projection.weight": TENSOR}))
    source = ModelSource.from_checkpoint(encoder_copy)
    message = r"projection behind its pooling head \(visual_projection.weight\).*pass tokens=True"
    for model_source in (source, ModelSource.from_model(load(encoder_copy))):
        with pytest.raises(ValueError, match=message):
            BatchEncoder(model_source, EmbedOptions(engine="eager"))


def test_model_without_pooling(encoder_copy: Path) -> None:
    """Without a projection, the message is about the missing head."""
    model = load(encoder_copy, pooling_head=False)
    with pytest.raises(ValueError, match=r"^this model has no pooling head; load a checkpoint"):
        model.embed(pixels(SMALL).float())
    assert (encoder_copy / CONFIG).exists()

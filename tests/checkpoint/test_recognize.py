"""Recognition of layout and prefix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from siglip_port import CheckpointError, SigLipVisionModel
from siglip_port.checkpoint.inspect import inspect_checkpoint
from siglip_port.hub import find_source
from tests.helpers.checkpoints import ODD, edit_index, rename_in_a_thousand
from tests.helpers.other_libraries import write_hf_encoder
from tests.helpers.vision_language_models import VISION

load = SigLipVisionModel.from_hf


@pytest.mark.parametrize(
    "prefix",
    [
        "vision_tower.vision_model.",
        "model.vision_tower.vision_model.",
        "vision_tower.",
        "model.vision_tower.",
        "model.vision_tower.vision_tower.vision_model.",
        "model.vision_model.",
        "vpm.",
        "model.embed_tokens_extend.image_embed.img_processor.",
    ],
)
def test_prefixes(prefix: str, tmp_path: Path) -> None:
    tensors = write_hf_encoder(tmp_path)
    save_file(
        {**{prefix + n: t for n, t in tensors.items()}, "lm_head.weight": torch.ones(3)},
        tmp_path / "model.safetensors",
    )
    model = load(tmp_path)
    assert model.provenance is not None
    assert model.provenance.layout == f"HuggingFace, prefix {prefix.rstrip('.')}"
    assert torch.equal(model.state_dict()["pooling_head.probe"], tensors["head.probe"])


@pytest.mark.parametrize("prefix", ["vision_tower.vision_model.", "vision_tower.vision_model"])
def test_prefix_without_separator(prefix: str, tmp_path: Path) -> None:
    tensors = write_hf_encoder(tmp_path)
    save_file(
        {f"vision_tower.vision_model.{n}": t for n, t in tensors.items()},
        tmp_path / "model.safetensors",
    )
    assert load(tmp_path, prefix=prefix).config == ODD
    assert load(tmp_path, prefix=prefix, layout="huggingface").config == ODD
    with pytest.raises(
        CheckpointError,
        match=r"has shape \[72, 3, 7, 7\], which layout 'huggingface-naflex' does not allow",
    ):
        load(tmp_path, prefix=prefix, layout="huggingface-naflex")
    with pytest.raises(CheckpointError, match=r"the architecture describes a NaFlex encoder"):
        load(tmp_path, config=replace(ODD, naflex=True))


def test_several_encoders(tmp_path: Path) -> None:
    tensors = write_hf_encoder(tmp_path)
    other = {f"b.{n}": t * 2 for n, t in tensors.items()}
    save_file(
        {**{f"a.{n}": t for n, t in tensors.items()}, **other}, tmp_path / "model.safetensors"
    )
    with pytest.raises(
        CheckpointError,
        match=r"several vision encoders.*prefix='a\.'.*prefix='b\.'.*; pass layout= and prefix=",
    ):
        load(tmp_path)
    assert torch.equal(
        load(tmp_path, prefix="b.").state_dict()["pooling_head.probe"], other["b.head.probe"]
    )
    assert load(tmp_path, prefix="a.", layout="huggingface").provenance is not None
    with pytest.raises(CheckpointError, match=r"in a supported layout \(.*\) with prefix 'c.';"):
        load(tmp_path, prefix="c.")
    with pytest.raises(
        CheckpointError, match=r"no SigLIP vision encoder in layout mlx;.*omit layout="
    ):
        load(tmp_path, layout="mlx")
    with pytest.raises(
        CheckpointError, match=r"layout: timm, prefix a\): a.patch_embed.proj.weight is missing"
    ):
        load(tmp_path, prefix="a.", layout="timm")
    with pytest.raises(ValueError, match=r"layout must be one of huggingface, .*, got 'hf'"):
        load(tmp_path, layout="hf")


def test_patch_size_of_three(tmp_path: Path) -> None:
    """[D, 3, 3, 3] also fits the mlx layout."""
    config = replace(ODD, patch_size=3, image_size=9)
    write_hf_encoder(tmp_path, config)
    assert load(tmp_path).config == config


def test_clip_refused(tmp_path: Path) -> None:
    config = transformers.CLIPVisionConfig(**VISION)
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError,
        match=r"refused: HuggingFace.*: has a class token, which SigLIP does not have",
    ):
        load(tmp_path)


def test_mlx(tmp_path: Path) -> None:
    """mlx-vlm's `sanitize` transposes the patch embedding: `v.transpose(0, 2, 3, 1)`."""
    tensors = {
        f"vision_tower.{name}": tensor for name, tensor in write_hf_encoder(tmp_path).items()
    }
    expected = load(tmp_path).state_dict()
    patch = "vision_tower.embeddings.patch_embedding.weight"
    tensors[patch] = torch.from_numpy(
        np.ascontiguousarray(tensors[patch].numpy().transpose(0, 2, 3, 1))
    )
    save_file(tensors, tmp_path / "model.safetensors")
    model = load(tmp_path)
    assert model.provenance is not None
    assert model.provenance.layout == "mlx, prefix vision_tower"
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_one_of_a_thousand_encoders(sharded: Path) -> None:
    """Files of the other encoders are not opened."""
    edit_index(sharded, rename_in_a_thousand)
    inspection = inspect_checkpoint(find_source(sharded), prefix="encoder7.vision_model.")
    assert inspection.encoders == (("huggingface", "encoder7.vision_model."),)
    assert "has no file shard-7.safetensors; unreadable tensors (64)" in str(inspection.problem)

"""Canonical names: wrappers of compilers and trainers, and names of old releases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from siglip_port import CheckpointError, SigLipVisionModel
from siglip_port.checkpoint.inspect import inspect_checkpoint
from siglip_port.checkpoint.source import WEIGHTS
from siglip_port.checkpoint.stored_names import canonical_name, canonical_names
from siglip_port.hub import find_source
from siglip_port.parity.stress_weights import randomize
from tests.helpers.checkpoints import ODD, adding, edit_tensors, renaming, shard
from tests.helpers.damaged_files import assert_loads
from tests.helpers.flax import flax, save_arrays

load = SigLipVisionModel.from_hf


@pytest.mark.parametrize(
    ("stored", "canonical"),
    [
        ("_orig_mod.vision_model.x", "vision_model.x"),
        ("model._orig_mod.vision.blocks.0.x", "model.vision.blocks.0.x"),
        ("blocks._orig_mod.0.x", "blocks.0.x"),
        ("blocks.0._orig_mod.x", "blocks.0.x"),
        ("module._orig_mod.module.x", "x"),
        ("a._fsdp_wrapped_module.b._checkpoint_wrapped_module.x", "a.b.x"),
        ("_forward_module.model.x", "model.x"),
        ("modules.x", "modules.x"),
        ("my_orig_mod.x", "my_orig_mod.x"),
        ("a.module", "a.module"),
        ("v.head.attention.in_proj.weight", "v.head.attention.in_proj_weight"),
        ("head.attention.in_proj.bias", "head.attention.in_proj_bias"),
        ("attention.in_proj.weight", "attention.in_proj.weight"),
        ("params/img/Transformer/posembed_input/pos_embedding", "params/img/pos_embedding"),
        ("Transformer/pos_embedding", "pos_embedding"),
        ("txt/pos_embedding", "txt/pos_embedding"),
    ],
)
def test_canonical_name(stored: str, canonical: str) -> None:
    assert canonical_name(stored) == canonical


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (r"^", "_orig_mod."),
        (r"^", "module.model._orig_mod."),
        (r"encoder\.layers\.", "encoder.layers._orig_mod."),
        (r"encoder\.layers\.(\d+)\.", r"encoder.layers.\1._orig_mod."),
        (r"encoder\.layers\.1\.", "encoder.layers.1._checkpoint_wrapped_module."),
        (r"embeddings\.", "embeddings._fsdp_wrapped_module."),
    ],
)
@pytest.mark.parametrize("in_shards", [False, True], ids=["one file", "shards"])
def test_wrapped_modules(
    encoder_copy: Path, model: SigLipVisionModel, pattern: str, replacement: str, in_shards: bool
) -> None:
    edit_tensors(encoder_copy, renaming(pattern, replacement))
    if in_shards:
        shard(encoder_copy)
    assert_loads(encoder_copy, model)
    provenance = load(encoder_copy).provenance
    assert provenance is not None
    assert ", names without " in provenance.layout
    inspection = inspect_checkpoint(find_source(encoder_copy))
    assert inspection.problem is None
    assert any("_mod" in entry.stored for entry in inspection.entries)
    # A prefix may be given with or without the wrappers.
    prefix = inspection.prefix
    assert_loads(encoder_copy, load(encoder_copy, prefix=prefix))
    assert_loads(encoder_copy, load(encoder_copy, prefix=f"module.{prefix}"))


def test_damage_below_a_wrapper(encoder_copy: Path) -> None:
    edit_tensors(encoder_copy, renaming("^", "_orig_mod."))
    edit_tensors(encoder_copy, renaming("fc1", "fc3"))
    with pytest.raises(CheckpointError, match=r"missing tensors \(8\):\n    vision_model\.encoder"):
        load(encoder_copy)


def copies(pattern: str, replacement: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return an edit that adds a wrapped copy of the tensors whose names match."""

    def edit(tensors: dict[str, Any]) -> dict[str, Any]:
        renamed = renaming(pattern, replacement)(tensors)
        wrapped = {name: tensor + 1 for name, tensor in renamed.items() if name not in tensors}
        return {**tensors, **wrapped}

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (copies("^", "_orig_mod."), r"several vision encoders.*prefix='_orig_mod.vision_model.'"),
        (
            copies(r"layers\.1\.", "layers.1._orig_mod."),
            r"tensors are stored twice \(16\), under names that differ only by a wrapper",
        ),
        (
            copies(r"^(.*layers\.1\.mlp\.fc1\.weight)", r"_orig_mod.\1"),
            r"tensors are stored twice \(1\).*_orig_mod.*; or select one with prefix=",
        ),
    ],
)
def test_stored_twice(
    encoder_copy: Path, edit: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    """Neither of two copies is loaded without a word."""
    edit_tensors(encoder_copy, edit)
    with pytest.raises(CheckpointError, match=message):
        load(encoder_copy)


def test_selected_copy(encoder_copy: Path, model: SigLipVisionModel) -> None:
    edit_tensors(encoder_copy, copies("^", "_orig_mod."))
    plain = load(encoder_copy, prefix="vision_model.")
    wrapped = load(encoder_copy, prefix="_orig_mod.vision_model.")
    for name, tensor in model.state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor)
        assert torch.equal(wrapped.state_dict()[name], tensor + 1)


def test_duplicates_elsewhere(encoder_copy: Path, model: SigLipVisionModel) -> None:
    """Copies of a language model do not matter."""
    extra = {"language_model.x": torch.ones(2), "language_model._orig_mod.x": torch.ones(2)}
    edit_tensors(encoder_copy, adding(extra))
    assert_loads(encoder_copy, model)


# --- big_vision before 2022 -----------------------------------------------------------------------

Arrays = dict[str, Any]


def old_numbers(arrays: Arrays) -> Arrays:
    """Number the modules of a block with one counter, as flax did before Linen."""
    parts = {
        "LayerNorm_0": "LayerNorm_0",
        "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
        "LayerNorm_1": "LayerNorm_2",
        "MlpBlock_0": "MlpBlock_3",
    }
    head = {
        "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_0",
        "LayerNorm_0": "LayerNorm_1",
        "MlpBlock_0": "MlpBlock_2",
    }
    renamed = {}
    for name, array in arrays.items():
        old_name = name
        for new, old in (head if name.startswith("MAPHead") else parts).items():
            if f"/{new}/" in name:
                old_name = name.replace(f"/{new}/", f"/{old}/")
        renamed[old_name] = array
    return renamed


def old_positions(arrays: Arrays) -> Arrays:
    """Name the positions as the first release did."""
    return {
        name.replace("pos_emb", "Transformer/posembed_input/pos_emb"): array
        for name, array in arrays.items()
    }


def positions_in_encoder(arrays: Arrays) -> Arrays:
    """Name the positions as the releases before 2022 did."""
    return {name.replace("pos_emb", "Transformer/pos_emb"): array for name, array in arrays.items()}


def inlined_head(arrays: Arrays) -> Arrays:
    """Write the pooling head without a name."""
    return {name.removeprefix("MAPHead_0/"): array for name, array in arrays.items()}


@pytest.mark.parametrize(
    "edits",
    [
        (old_positions,),
        (positions_in_encoder,),
        (inlined_head,),
        (old_numbers,),
        (old_numbers, inlined_head, old_positions),
    ],
    ids=lambda edits: "-".join(edit.__name__ for edit in edits),
)
@pytest.mark.parametrize("root", ["params/img/", "img/", ""])
@pytest.mark.parametrize("scanned", [False, True], ids=["indexed", "scanned"])
def test_old_big_vision(
    edits: tuple[Callable[[Arrays], Arrays], ...], root: str, scanned: bool, tmp_path: Path
) -> None:
    config = replace(ODD, image_size=42)
    original = SigLipVisionModel(config)
    randomize(original)
    arrays = flax(config, original.state_dict(), scanned=scanned)
    new_names = set(arrays)
    for edit in edits:
        arrays = edit(arrays)
    assert set(arrays) != new_names
    path = tmp_path / "old.npz"
    save_arrays(path, {root + name: array.astype(np.float32) for name, array in arrays.items()})
    model = load(path)
    assert model.config == config
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_new_numbers_are_kept() -> None:
    """A damaged block of today's names is not renumbered, so the message names what is missing."""
    names = ["b/LayerNorm_1/scale", "b/MultiHeadDotProductAttention_0/x", "b/MlpBlock_0/x"]
    assert list(canonical_names(names).values()) == names


def test_probe_elsewhere() -> None:
    """A tensor called probe is no pooling head unless it is beside a patch embedding."""
    names = ["img/probe", "img/MAPHead_0/probe", "txt/probe", "txt/embedding/kernel2"]
    assert list(canonical_names(names).values()) == names


def test_fused_projection_of_mlx(encoder_copy: Path, model: SigLipVisionModel) -> None:
    """mlx-embeddings stores the head with a dot, and the patch embedding with channels last."""
    tensors = load_file(encoder_copy / WEIGHTS)
    for name in list(tensors):
        if "in_proj_" in name:
            tensors[name.replace("in_proj_", "in_proj.")] = tensors.pop(name)
    save_file(tensors, encoder_copy / WEIGHTS, {"format": "pt"})
    assert_loads(encoder_copy, model)  # HuggingFace's order of channels
    for name, tensor in tensors.items():
        if name.endswith("patch_embedding.weight"):
            tensors[name] = tensor.permute(0, 2, 3, 1).contiguous()
    save_file(tensors, encoder_copy / WEIGHTS, {"format": "pt"})
    assert_loads(encoder_copy, model)
    provenance = load(encoder_copy).provenance
    assert provenance is not None
    assert provenance.layout.startswith("mlx")
    stored = [entry.stored for entry in inspect_checkpoint(find_source(encoder_copy)).entries]
    assert "vision_model.head.attention.in_proj.weight" in stored

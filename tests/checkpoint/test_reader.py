"""Loading and saving.

Every kind of file that transformers writes, and every way in which a file can be wrong.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    SiglipForImageClassification,
    SiglipModel,
    SiglipVisionConfig,
)
from transformers import SiglipVisionModel as ReferenceModel

from siglip_port import CheckpointError, SigLipVisionConfig, SigLipVisionModel
from siglip_port.checkpoint.source import pickle_advice
from siglip_port.parity.siglip import reference as references
from siglip_port.parity.stress_weights import randomise
from tests.helpers.checkpoints import (
    ODD,
    SMALL,
    MakeCheckpoint,
    edit_config,
    edit_tensors,
    pixels,
    shard,
)
from tests.helpers.other_libraries import write_two_towers

load = SigLipVisionModel.from_hf


def plus(extra: dict[str, Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {**tensors, **extra}


# --- what loads -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dropped"),
    [
        (SiglipModel, {"scale and bias of the image-text logits": 2, "text tower": 22}),
        (SiglipForImageClassification, {"image classifier": 2}),
    ],
)
@pytest.mark.parametrize("in_shards", [False, True], ids=["one file", "shards"])
@torch.no_grad()
def test_two_towers_and_classifiers(
    tmp_path: Path, kind: type[SiglipModel], dropped: dict[str, int], in_shards: bool
) -> None:
    write_two_towers(tmp_path, kind)
    if in_shards:
        shard(tmp_path)
    model = load(tmp_path)
    reference = references.load(tmp_path, pooling_head=True, dtype=torch.float32)
    expected = reference.side().run(pixels(SMALL).float())
    torch.testing.assert_close(model(pixels(SMALL)), expected["tokens"])
    torch.testing.assert_close(model.embed(pixels(SMALL)), expected["pooled"])
    assert model.provenance is not None
    assert model.provenance.dropped == dropped
    assert model.provenance.tensors_read == 16 * SMALL.num_encoder_blocks + 16
    assert len(model.provenance.files) == (3 if in_shards else 1)


@pytest.mark.parametrize("prefix", ["", "vision_model."])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_vision_only_files_load_bit_for_bit(
    checkpoint: MakeCheckpoint, prefix: str, dtype: torch.dtype
) -> None:
    folder = checkpoint(prefix=prefix, dtype=dtype)
    stored = load_file(folder / "model.safetensors")
    model = load(folder)
    state = model.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {dtype}
    assert torch.equal(state["pooling_head.probe"], stored[f"{prefix}head.probe"])
    fused = stored[f"{prefix}head.attention.in_proj_weight"]
    for i, name in enumerate("qkv"):
        assert torch.equal(
            state[f"pooling_head.attention.{name}_proj.weight"], fused[24 * i : 24 * i + 24]
        )
    assert not model.training
    assert not [name for name, p in model.named_parameters() if p.is_meta or not p.requires_grad]


def test_config_nested_or_flat_and_with_missing_keys(checkpoint: MakeCheckpoint) -> None:
    """A config.json as on the Hub.

    Nested, everything that equals a default left out, no dtype, no architectures.
    """
    folder = checkpoint(prefix="vision_model.")
    content = json.loads((folder / "config.json").read_text())
    default = SiglipVisionConfig().to_dict()
    nested = {k: v for k, v in content.items() if k in default and v != default[k]}
    (folder / "config.json").write_text(
        json.dumps({"model_type": "siglip", "vision_config": nested})
    )
    assert load(folder).config == SMALL
    for dtype_key in ({"torch_dtype": "float16"}, {"dtype": "bfloat16"}, {}):
        (folder / "config.json").write_text(json.dumps({**nested, **dtype_key}))
        model = load(folder)
        assert model.config == SMALL
        assert (
            next(model.parameters()).dtype == torch.float32
        )  # that of the file, whatever the config says


def test_a_file_beside_its_config(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    (folder / "model.safetensors").rename(folder / "tower.v2.safetensors")
    assert load(str(folder / "tower.v2.safetensors")).config == SMALL
    with pytest.raises(
        CheckpointError, match=r"holds neither model.safetensors nor .*found: config.json, tower.v2"
    ):
        load(folder)


def test_position_ids_are_dropped(checkpoint: MakeCheckpoint) -> None:
    for prefix in ("", "vision_model."):
        folder = checkpoint(prefix=prefix, name=f"ids{prefix}")
        ids = {f"{prefix}embeddings.position_ids": torch.arange(4)[None]}
        edit_tensors(folder, plus(ids))
        provenance = load(folder).provenance
        assert provenance is not None
        assert provenance.dropped == {"position ids: counted, not learned": 1}


def test_pooling_head_kept_demanded_left_out(checkpoint: MakeCheckpoint) -> None:
    with_head, without = (
        checkpoint(name="with"),
        checkpoint(replace(SMALL, pooling_head=False), name="without"),
    )
    assert load(with_head).config.pooling_head
    assert load(with_head, pooling_head=True).config.pooling_head
    left_out = load(with_head, pooling_head=False)
    assert not left_out.config.pooling_head
    assert left_out.provenance is not None
    assert left_out.provenance.dropped == {"pooling head, left out": 11}
    assert not load(without).config.pooling_head
    assert not load(without, pooling_head=False).config.pooling_head
    with pytest.raises(
        CheckpointError, match="holds no pooling head, which pooling_head=True demands"
    ):
        load(without, pooling_head=True)


def test_a_head_left_out_is_not_read(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    edit_tensors(
        folder,
        lambda t: {k: v.to(torch.int8) if k.startswith("head.") else v for k, v in t.items()},
    )
    assert load(folder, pooling_head=False).pooling_head is None
    with pytest.raises(CheckpointError, match="found I8"):
        load(folder)


@pytest.mark.parametrize("says", [True, False, ...])
@pytest.mark.parametrize("has", [True, False])
def test_the_file_decides_whether_there_is_a_head(
    checkpoint: MakeCheckpoint, says: object, has: bool
) -> None:
    """transformers 4.40 writes a head beside `vision_use_head: false`.

    Others leave the key out where there is none.
    """
    folder = checkpoint(replace(SMALL, pooling_head=has))
    edit_config(folder, vision_use_head=says)
    assert (load(folder).pooling_head is not None) == has


def test_dtype_and_device(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    model = load(folder, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    exact = load(folder).state_dict()
    assert all(
        torch.equal(tensor, exact[name].bfloat16()) for name, tensor in model.state_dict().items()
    )
    for bad in ("bfloat16", torch.int8, "auto", torch.float8_e4m3fn):
        with pytest.raises(
            ValueError, match=r"^dtype must be one of torch.float64, torch.float32, .*, got "
        ):
            load(folder, dtype=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device must be one that holds values, got 'meta'"):
        load(folder, device="meta")
    with pytest.raises(ValueError, match="device 'abacus' cannot be used on this machine"):
        load(folder, device="abacus")


def test_mixed_dtypes_become_the_one_that_holds_all_of_them(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    edit_tensors(
        folder, lambda t: {k: v.bfloat16() if "mlp" in k else v.half() for k, v in t.items()}
    )
    model = load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.provenance is not None
    assert set(model.provenance.stored_dtypes) == {torch.bfloat16, torch.float16}


def test_provenance_tells_what_was_done(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    lines = str(load(folder, dtype=torch.bfloat16, pooling_head=False).provenance).splitlines()
    size = sum(
        t.nbytes
        for k, t in load_file(folder / "model.safetensors").items()
        if not k.startswith("head.")
    )
    whole = (folder / "model.safetensors").stat().st_size
    assert lines == [
        f"source   {folder}",
        "files    model.safetensors",
        "layout   HuggingFace, no prefix",
        f"read     {size / 1e3:.2f} of {whole / 1e3:.2f} kB, 53 tensors",
        "dropped  11 of the pooling head, left out",
        "dtype    torch.bfloat16 (stored: torch.float32)",
    ]
    assert SigLipVisionModel(SMALL).provenance is None


def test_no_global_state_is_touched(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    before = (
        torch.get_rng_state(),
        random.getstate(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
    )
    load(folder)
    after = (
        torch.get_rng_state(),
        random.getstate(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
    )
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert torch.zeros(1).device.type == "cpu"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_mapped_not_copied_and_the_file_is_safe(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    model = load(folder)
    maps = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(folder / "model.safetensors"))
    ]
    for name, parameter in model.named_parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in maps), name
    before = (folder / "model.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    assert (folder / "model.safetensors").read_bytes() == before


# --- what does not load ---------------------------------------------------------------------------

FC1 = "encoder.layers.1.mlp.fc1.weight"


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {re.sub(old, new, name): tensor for name, tensor in tensors.items()}


def without(pattern: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {
        name: tensor for name, tensor in tensors.items() if not re.search(pattern, name)
    }


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without(rf"^{FC1}$"), r"missing tensors \(1\):\n    encoder.layers.1.mlp.fc1.weight\n"),
        (
            without(r"fc1.bias"),
            r"missing .*\(4\):\n    encoder.layers.\{0...2\}.mlp.fc1.bias\n    head.mlp.fc1.bias\n",
        ),
        (
            without(r"layers.2"),
            r"missing tensors \(16\):(?s:.*)encoder.layers.2.self_attn.q_proj.bias\n",
        ),
        (without(r"head.probe"), r"missing tensors \(1\):\n    head.probe\n"),
        (without(r"embeddings"), r"missing tensors \(3\):\n    embeddings.patch_embedding.bias"),
        (lambda t: {**t, "extra.weight": t[FC1]}, r"unknown tensors, .*\(1\):\n    extra.weight\n"),
        (lambda t: {**t, "text_model.x": t[FC1]}, r"unknown tensors, .*\(1\):\n    text_model.x\n"),
        (
            rename(r"layers\.2\.", "layers.3."),
            r"missing tensors \(16\):(?s:.*)unknown tensors.*\(16\):",
        ),
        (
            rename(r"fc1", "fc_1"),
            r"missing tensors \(8\):(?s:.*)unknown tensors.*\(8\):\n    "
            r"encoder.layers.\{0...2\}.mlp.fc_1",
        ),
        (
            lambda t: {**t, FC1: t[FC1].T},
            r"shape: expected \[40, 24\] by config.json, found \[24, 40\] \(1\):\n    " + FC1,
        ),
        (
            lambda t: {**t, FC1: t[FC1].flatten()},
            r"shape: expected \[40, 24\] by config.json, found \[960\]",
        ),
        (
            lambda t: {
                **t,
                "head.attention.in_proj_weight": t["head.attention.in_proj_weight"][:48],
            },
            r"shape: expected \[72, 24\] by config.json, found \[48, 24\] \(1\):\n    "
            r"head.attention.in_proj_weight",
        ),
        (
            lambda t: {k: v[..., :-1] if "position" in k else v for k, v in t.items()},
            r"shape: expected \[4, 24\] by config.json, found \[4, 23\]",
        ),
        (
            lambda t: {**t, FC1: t[FC1].to(torch.int8)},
            r"dtype: expected one of F64, F32, F16, BF16, found I8 \(1\):",
        ),
        (lambda t: {**t, FC1: t[FC1].to(torch.float8_e4m3fn)}, "found F8_E4M3"),
        (
            lambda t: {**t, **{f"vision_model.{k}": v.clone() for k, v in t.items()}},
            r"more than one vision tower.*prefix=''; layout='huggingface', prefix='vision_model.'",
        ),
        (
            rename("^", "tower"),
            r"no SigLIP vision tower .* begin with: towerencoder \(48\), towerhead \(11\)",
        ),
        (
            lambda t: {**t, "embeddings.class_embedding": t["head.probe"].flatten()},
            "refused: no prefix .*a class token",
        ),
        (lambda _: {}, "no SigLIP vision tower"),
    ],
)
def test_wrong_tensors(
    checkpoint: MakeCheckpoint, edit: Callable[..., dict[str, Tensor]], message: str
) -> None:
    folder = checkpoint()
    edit_tensors(folder, edit)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_everything_that_is_wrong_is_said_at_once_and_nothing_is_read(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint()
    edit_tensors(
        folder, lambda t: without("layer_norm1.bias")({**t, "extra": t[FC1], FC1: t[FC1].T})
    )
    monkeypatch.setattr(
        "siglip_port.checkpoint.key_rules.split", lambda *_: pytest.fail("a tensor was read")
    )
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert str(caught.value).splitlines() == [
        f"{folder} (layout: HuggingFace, no prefix) does not hold the tower that its configuration "
        "describes",
        "  missing tensors (3):",
        "    encoder.layers.{0...2}.layer_norm1.bias",
        "  shape: expected [40, 24] by config.json, found [24, 40] (1):",
        f"    {FC1}",
        "  unknown tensors, which no row of the key map claims or drops (1):",
        "    extra",
        "Nothing was loaded; fetch the weights and config.json again, both from the same place and "
        "the same commit.",
    ]


def test_a_message_stays_readable_however_much_is_wrong(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    edit_tensors(folder, lambda t: {**t, **{f"extra_{i}": torch.zeros(1) for i in range(500)}})
    with pytest.raises(CheckpointError, match=r"\(500\):(?s:.*)\.\.\. and 460 more") as caught:
        load(folder)
    assert len(str(caught.value).splitlines()) < 50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": 48},
            r"shape: expected \[48, 3, 8, 8\] by config.json, found \[24, 3, 8, 8\]",
        ),
        (
            {"num_hidden_layers": 2},
            r"unknown tensors.*\(16\):\n    encoder.layers.2.layer_norm1.bias",
        ),
        (
            {"num_hidden_layers": 4},
            r"missing tensors \(16\):\n    encoder.layers.3.layer_norm1.bias",
        ),
        (
            {"num_hidden_layers": ...},
            r"missing tensors \(144\):\n    encoder.layers.\{3...11\}.layer_norm1.bias",
        ),
        (
            {"num_hidden_layers": 10**12},
            "asks for 1000000000000 blocks, but the weights have only 64 tensors",
        ),
        ({"intermediate_size": 2**62}, "describes an impossible tower"),
        ({"image_size": 10**15}, "describes an impossible tower"),
        ({"image_size": 24}, r"shape: expected \[9, 24\] by config.json, found \[4, 24\]"),
        (
            {"num_attention_heads": 7},
            "embed_dim must be divisible by num_attention_heads, got 24 and 7",
        ),
        ({"hidden_size": "24"}, "embed_dim must be a positive integer, got '24'"),
        (
            {"hidden_act": "quick_gelu"},
            "hidden_act must be one of gelu_pytorch_tanh, gelu, got 'quick_gelu'",
        ),
        (
            {"model_type": "siglip2_vision_model"},
            r"describes a NaFlex tower \(siglip2\), but the shape of the patch",
        ),
        ({"vision_config": {}}, r"missing tensors"),
    ],
)
def test_wrong_configurations(
    checkpoint: MakeCheckpoint, changes: dict[str, Any], message: str
) -> None:
    folder = checkpoint()
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '"siglip"', "\x00", "[" * 100_000])
def test_config_that_is_no_json_object(checkpoint: MakeCheckpoint, content: str) -> None:
    folder = checkpoint()
    (folder / "config.json").write_text(content)
    with pytest.raises(
        CheckpointError,
        match=r"config.json (is not readable JSON|must hold a JSON object).*fetch it again",
    ):
        load(folder)


def test_config_missing(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    (folder / "config.json").unlink()
    for source in (folder, folder / "model.safetensors"):
        with pytest.raises(
            CheckpointError, match=r"has no config.json, .*put the checkpoint's own beside"
        ):
            load(source)


# The header of this file takes its first 6 kB.
PLACES = st.integers(0, 40) | st.integers(0, 6_000) | st.integers(0, 100_000)


@given(
    st.binary(max_size=64), PLACES, st.sampled_from(["insert", "overwrite", "truncate", "replace"])
)
def test_damaged_bytes_never_load_and_never_end_in_a_traceback(
    whole: tuple[Path, bytes], noise: bytes, at: int, how: str
) -> None:
    """Whatever happens to a file, it ends in a CheckpointError, or the damage lies in the numbers alone."""
    path, content = whole
    damaged = {
        "insert": content[:at] + noise + content[at:],
        "overwrite": content[:at] + noise + content[at + len(noise) :],
        "truncate": content[:at],
        "replace": noise,
    }[how]
    path.write_bytes(damaged)
    try:
        model = load(path)
    except CheckpointError:
        assert damaged != content
    else:
        assert model.state_dict().keys() == SigLipVisionModel(SMALL).state_dict().keys()
        assert len(damaged) == len(content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    references.write_random_checkpoint(folder, SMALL)
    path = folder / "model.safetensors"
    return path, path.read_bytes()


def test_sources_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    sources: list[tuple[str | Path, str]] = [
        (
            tmp_path / "empty",
            r"holds neither model.safetensors nor model.safetensors.index.json; found: nothing",
        ),
        (tmp_path / "absent", "does not exist on this machine, and is no Hub id such as"),
        ("no/such/folder", "does not exist on this machine, and is no Hub id such as"),
        ("nowhere/model.safetensors", "does not exist on this machine, and is no Hub id such as"),
        ("", "does not exist on this machine"),
        (
            tmp_path / "notes.txt",
            "is neither a .safetensors nor an .npz file; pass one, or the folder",
        ),
        ("a" * 5000, "cannot be read"),
        ("~nobody-of-that-name/tower", "cannot be read"),
    ]
    for source, message in sources:
        with pytest.raises(CheckpointError, match=message):
            load(source)


@pytest.mark.parametrize("source", [None, 3, b"folder", ["folder"]])
def test_sources_of_other_types(source: object) -> None:
    with pytest.raises(CheckpointError, match="the source must be a path or a Hub id, got a "):
        load(source)  # type: ignore[arg-type]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    for path in (folder / "model.safetensors", folder / "config.json", folder):
        mode = path.stat().st_mode
        path.chmod(0)
        with pytest.raises(CheckpointError, match="Permission denied"):
            load(folder)
        path.chmod(mode)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "weights.pth", "last.ckpt"])
def test_pickles_are_refused_with_the_way_out(checkpoint: MakeCheckpoint, name: str) -> None:
    folder = checkpoint()
    torch.save(load_file(folder / "model.safetensors"), folder / name)
    (folder / "model.safetensors").unlink()
    for source in (folder, folder / name):
        with pytest.raises(
            CheckpointError,
            match=rf"Pickled weights \({name}\) are refused: to load a pickle can run any code",
        ):
            load(source)
    (folder / name).rename(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        load(folder)
    assert pickle_advice(["model.safetensors", "config.json"]) == ""


# --- shards ---------------------------------------------------------------------------------------


def test_a_shard_without_tensors_of_the_tower_is_not_needed(tmp_path: Path) -> None:
    write_two_towers(tmp_path, SiglipModel)
    tensors = load_file(tmp_path / "model.safetensors")
    files = {name: f"{name.split('.')[0]}.safetensors" for name in tensors}
    for file in set(files.values()) - {"text_model.safetensors"}:
        save_file(
            {k: v.clone() for k, v in tensors.items() if files[k] == file},
            tmp_path / file,
            {"format": "pt"},
        )
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    provenance = load(tmp_path).provenance
    assert provenance is not None
    assert [file.name for file in provenance.files] == ["vision_model.safetensors"]


def test_a_missing_or_damaged_shard_names_what_it_would_hold(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert re.search(
        r"has no file model-00002-of-00003.safetensors, so these cannot be read \(2[12]\):", message
    )
    assert re.search(
        r"model-00003-of-00003.safetensors is not a whole safetensors file .* \(2[12]\):", message
    )


def test_an_index_that_promises_what_a_shard_lacks(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    shard(folder)
    for i in (1, 2, 3):
        edit_tensors(folder, without("head.probe"), f"model-{i:05}-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"missing tensors \(1\):\n    head.probe\n"):
        load(folder)


def test_a_tensor_in_two_shards_or_in_one_that_should_not_have_it(
    checkpoint: MakeCheckpoint,
) -> None:
    folder = checkpoint()
    shard(folder)
    tensors = load_file(folder / "model-00001-of-00003.safetensors")
    name = min(tensors)
    second = "model-00002-of-00003.safetensors"
    edit_tensors(folder, plus({name: tensors[name] + 1, "extra": tensors[name]}), second)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert (
        f"tensors in {second} that the index does not place there (2):\n    {name}\n    extra\n"
        in str(caught.value)
    )


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "has no usable weight_map"),
        ({"weight_map": ["x"]}, "has no usable weight_map"),
        ({"weight_map": {"head.probe": 3}}, "has no usable weight_map"),
        (
            {"weight_map": {"head.probe": "../model.safetensors"}},
            r"no plain .safetensors file names: ../model.safetensors",
        ),
        (
            {"weight_map": {"head.probe": "/etc/model.safetensors"}},
            "no plain .safetensors file names",
        ),
        (
            {
                "weight_map": dict.fromkeys(
                    (f"encoder.layers.{i}.mlp.fc1.bias" for i in range(4)),
                    f"{'m' * 300}.safetensors",
                )
            },
            r"cannot be read: .*File name too long",
        ),
        (
            {"weight_map": {"head.probe": "pytorch_model-00001-of-00002.bin"}},
            "Pickled weights .* are refused",
        ),
    ],
)
def test_unusable_indexes(checkpoint: MakeCheckpoint, index: dict[str, Any], message: str) -> None:
    folder = checkpoint()
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        load(folder)


# --- saving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [ODD, replace(SMALL, pooling_head=False, hidden_act="gelu")], ids=["head", "headless"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_what_is_saved_loads_here_and_in_transformers(
    tmp_path: Path, config: SigLipVisionConfig, dtype: torch.dtype
) -> None:
    model = SigLipVisionModel(config).to(dtype).eval()
    randomise(model)
    model.save_hf(tmp_path / "new" / "folder")
    back = load(tmp_path / "new" / "folder")
    assert back.config == config
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)
        assert back.state_dict()[name].dtype == dtype
    reference, info = ReferenceModel.from_pretrained(
        tmp_path / "new" / "folder", output_loading_info=True
    )
    assert not any(info.values())
    assert reference.dtype == dtype
    x = pixels(config).to(dtype)
    torch.testing.assert_close(model(x), reference(x).last_hidden_state)
    with safe_open(tmp_path / "new" / "folder" / "model.safetensors", "pt") as file:
        assert all(name.startswith("vision_model.") for name in file.keys())  # noqa: SIM118
        assert file.metadata().keys() == {"format", "siglip_port_config"}
        assert file.metadata()["format"] == "pt"


def test_saving_over_the_checkpoint_one_was_loaded_from(checkpoint: MakeCheckpoint) -> None:
    """The file that the weights are mapped from is replaced, not written into."""
    folder = checkpoint()
    model = load(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_hf(folder)
    for state in (model.state_dict(), load(folder).state_dict()):
        assert all(torch.equal(state[name], before[name]) for name in before)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]


def test_saving_where_it_cannot_be_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="could not be written to"):
        SigLipVisionModel(SMALL).save_hf(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_save_that_breaks_off_leaves_the_old_files(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def break_off(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("siglip_port.checkpoint.writer.json.dumps", break_off)
    with pytest.raises(CheckpointError, match=r"could not be written to .*no space left on device"):
        SigLipVisionModel(SMALL).save_hf(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_model_that_is_no_longer_the_tower_is_not_saved(tmp_path: Path) -> None:
    model = SigLipVisionModel(SMALL)
    model.transformer.encoder.encoder_blocks[0].mlp.fc1 = torch.nn.Linear(24, 40, bias=False)  # type: ignore[union-attr]
    model.adapter = torch.nn.Linear(1, 1)
    with pytest.raises(
        CheckpointError,
        match=r"missing tensors \(1\):\n(?s:.*)fc1.bias\n.*unknown tensors \(2\):\n    adapter.bias",
    ):
        model.save_hf(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_of_other_shapes_or_without_values_is_not_saved(tmp_path: Path) -> None:
    resized, meta, quantised = (SigLipVisionModel(SMALL) for _ in range(3))
    resized.transformer.embeddings.position_embedding = torch.nn.Embedding(9, 24)
    quantised.transformer.post_layernorm.to(torch.float8_e4m3fn)
    meta.to("meta")
    for model, message in [
        (
            resized,
            r"another shape than the configuration says \(1\):\n    "
            r"transformer.embeddings.position_embedding.weight",
        ),
        (meta, r"a dtype or device that cannot be saved \(68\):"),
        (
            quantised,
            r"a dtype or device that cannot be saved \(2\):\n    transformer.post_layernorm.bias",
        ),
    ]:
        with pytest.raises(CheckpointError, match=message):
            model.save_hf(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_others_may_read_what_is_saved_as_far_as_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        SigLipVisionModel(SMALL).save_hf(tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


def test_copied_folder_still_loads(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    shutil.copytree(checkpoint(), tmp_path / "google" / "siglip")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert (
            load("google/siglip").config == SMALL
        )  # what exists here is a path, also where it looks like a Hub id

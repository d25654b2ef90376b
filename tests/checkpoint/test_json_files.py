"""Configuration and shard index: valid variants, and errors for invalid ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    SiglipVisionConfig,
)

from siglip_port import CheckpointError, SigLipVisionModel
from siglip_port.checkpoint.formats import MAX_JSON_BYTES
from siglip_port.checkpoint.source import CONFIG, INDEX, WEIGHTS
from tests.helpers.checkpoints import (
    SMALL,
    MakeCheckpoint,
    edit_config,
    edit_index,
    rename_in_a_thousand,
    shard,
)
from tests.helpers.damaged_files import Json, assert_loads, assert_refused
from tests.helpers.strategies import JSON

load = SigLipVisionModel.from_hf


def test_nested_and_flat_config(checkpoint: MakeCheckpoint) -> None:
    """Published files are nested and omit defaults, dtype and architectures."""
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
        # The dtype is that of the file, not of config.json.
        assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '"siglip"', "\x00", "[" * 100_000])
def test_config_not_object(checkpoint: MakeCheckpoint, content: str) -> None:
    folder = checkpoint()
    (folder / "config.json").write_text(content)
    with pytest.raises(
        CheckpointError,
        match=r"config.json (is not valid JSON|must contain a JSON object).*download it again",
    ):
        load(folder)


def test_config_missing(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    (folder / "config.json").unlink()
    for source in (folder, folder / "model.safetensors"):
        with pytest.raises(
            CheckpointError,
            match=r"has no config.json, and the tensor shapes are not .* published encoder; put",
        ):
            load(source)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "has no valid weight_map"),
        ({"weight_map": ["x"]}, "has no valid weight_map"),
        ({"weight_map": {"head.probe": 3}}, "has no valid weight_map"),
        (
            {"weight_map": {"head.probe": "../model.safetensors"}},
            r"not plain .safetensors file names: ../model.safetensors",
        ),
        (
            {"weight_map": {"head.probe": "/etc/model.safetensors"}},
            "not plain .safetensors file names",
        ),
        (
            {
                "weight_map": dict.fromkeys(
                    (f"encoder.layers.{i}.mlp.fc1.bias" for i in range(4)),
                    f"{'m' * 300}.safetensors",
                )
            },
            r"cannot be read \(.*File name too long",
        ),
        (
            {"weight_map": {"head.probe": "pytorch_model-00001-of-00002.bin"}},
            "pickled weights .* are not supported",
        ),
    ],
)
def test_invalid_index(checkpoint: MakeCheckpoint, index: dict[str, Any], message: str) -> None:
    folder = checkpoint()
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        load(folder)


NORM = "vision_model.post_layernorm.bias"
FC1 = "vision_model.encoder.layers.0.mlp.fc1.weight"


def with_file(file: object, name: str = NORM) -> Callable[[Json], Json]:
    return lambda index: {**index, "weight_map": {**index["weight_map"], name: file}}


PLAIN = "lists shards that are not plain .safetensors file names"


INDEXES: dict[str, tuple[Callable[[Json], object], str]] = {
    "..": (with_file("../model.safetensors"), PLAIN),
    "../..": (with_file("../../../../../../etc/passwd"), PLAIN),
    "absolute": (with_file("/model.safetensors"), PLAIN),
    "folder": (with_file("folder/model.safetensors"), PLAIN),
    "Windows folder": (with_file("..\\model.safetensors"), PLAIN),
    "URL": (with_file("http://127.0.0.1/model.safetensors"), PLAIN),
    "newline": (with_file("model.safetensors\n"), PLAIN),
    "NUL": (with_file("model\0.safetensors"), PLAIN),
    "pickle": (
        with_file("pytorch_model.bin"),
        f"{PLAIN}: pytorch_model.bin; pickled weights .* are not supported",
    ),
    "empty": (with_file(""), PLAIN),
    "long name": (with_file("a" * 5000 + ".safetensors"), "; unreadable tensors"),
    "missing shard": (
        with_file("elsewhere.safetensors"),
        "has no file elsewhere.safetensors; unreadable tensors",
    ),
    "number": (with_file(1), "has no valid weight_map"),
    "null": (lambda index: {**index, "weight_map": None}, "has no valid weight_map"),
    "list": (lambda _: [], "must contain a JSON object, got list"),
    "missing map": (lambda _: {}, "has no valid weight_map"),
    "empty map": (lambda _: {"weight_map": {}}, "contains no SigLIP vision encoder"),
    "other shard": (
        lambda i: with_file(
            next(f for f in i["weight_map"].values() if f != i["weight_map"][NORM])
        )(i),
        "the index is not that of these shards: model-0000.-of-00003.safetensors contains "
        "vision_model.post_layernorm.bias, but the index does not list it there .1 such tensors.; "
        "take(.|\n)*missing tensors .1.:\n    vision_model.post_layernorm.bias",
    ),
    "duplicate key": (
        lambda index: json.dumps(index).replace(
            f'"{NORM}"', f'"{NORM}": "model-00001-of-00003.safetensors", "{NORM}"'
        ),
        f"is not valid JSON .key '{NORM}' occurs more than once.; download it again",
    ),
    "thousand encoders": (
        rename_in_a_thousand,
        "contains 1000 vision encoders in layout 'huggingface', limit is 100; pass prefix=",
    ),
}


@pytest.mark.parametrize("case", INDEXES)
def test_damaged_index(case: str, sharded: Path) -> None:
    edit, message = INDEXES[case]
    # A file that the path ../model.safetensors would reach.
    shutil.copy(sharded / "model-00001-of-00003.safetensors", sharded.parent / "model.safetensors")
    edit_index(sharded, edit)
    assert_refused(sharded, message)


CONFIGS: dict[str, tuple[Callable[[str], str | bytes], str]] = {
    "empty": (lambda _: "", "is not valid JSON .Expecting value"),
    "list": (lambda _: "[]", "must contain a JSON object, got list"),
    "null": (lambda _: "null", "must contain a JSON object, got NoneType"),
    "zeros": (lambda t: "\0" * len(t), "is not valid JSON"),
    "NUL": (lambda t: t.replace("{", "{\0"), "is not valid JSON"),
    "invalid UTF-8": (
        lambda t: t.encode().replace(b"siglip", b"sigli\xff"),
        "is not valid JSON .'utf-8' codec",
    ),
    "lone surrogate": (
        lambda t: t.replace("siglip_vision_model", "\\ud800"),
        "surrogates not allowed",
    ),
    "deep": (
        lambda t: t.replace("{", '{"a": ' + "[" * 500 + "]" * 500 + ",", 1),
        "nested more than 100 levels deep",
    ),
    "very deep": (lambda _: '{"a": ' + "[" * 1_000_000, "nested too deep"),
    "duplicate key": (
        lambda t: t.replace("{", '{"hidden_size": 32, ', 1),
        "key 'hidden_size' occurs more than once",
    ),
    "long number": (lambda t: t.replace(": 24", ": " + "2" * 5000), "Exceeds the limit"),
    "truncated": (lambda t: t[: len(t) // 2], "is not valid JSON"),
}


ABSURD: list[tuple[Json, str]] = [
    ({"hidden_size": 10**9}, "shape: expected"),
    ({"hidden_size": 2**63}, "impossible sizes|shape: expected"),
    ({"hidden_size": 10**4000}, "impossible sizes"),
    ({"image_size": 10**9}, "shape: expected"),
    ({"image_size": 10**4000}, "impossible sizes"),
    ({"patch_size": 10**4000, "image_size": 10**4000}, "impossible sizes"),
    ({"num_channels": 10**12}, "shape: expected|impossible sizes"),
    ({"intermediate_size": 10**12}, "shape: expected"),
    (
        {"num_hidden_layers": 10**7},
        "config.json has 10000000 blocks, but the weights have only 64 tensors",
    ),
    ({"num_attention_heads": 10**4000}, "must be divisible by num_attention_heads"),
    ({"layer_norm_eps": float("inf")}, "layer_norm_eps must lie between 0 and 1, got inf"),
    ({"layer_norm_eps": float("nan")}, "layer_norm_eps must lie between 0 and 1, got nan"),
    ({"attention_dropout": float("nan")}, r"attention_dropout must lie in \[0, 1\), got nan"),
    ({"attention_dropout": 10**4000}, r"attention_dropout must lie in \[0, 1\)"),
    (
        {"model_type": "siglip2_vision_model", "num_patches": 10**4000, "patch_size": 10**4000},
        "integer string|describes",
    ),
    (
        {"model_type": "janus_vision_model", "mlp_ratio": float("inf")},
        "mlp_ratio must be a positive number",
    ),
    ({"model_type": "siglip2_vision_model", "num_patches": 10**18}, "describes a NaFlex encoder"),
]


@pytest.mark.parametrize("case", CONFIGS)
def test_damaged_config(case: str, encoder_copy: Path) -> None:
    edit, message = CONFIGS[case]
    edited = edit((encoder_copy / CONFIG).read_text())
    (encoder_copy / CONFIG).write_bytes(edited if isinstance(edited, bytes) else edited.encode())
    assert_refused(encoder_copy, message)
    shutil.move(encoder_copy / CONFIG, encoder_copy / "open_clip_config.json")
    assert_refused(encoder_copy, message)
    shutil.copy(encoder_copy / "open_clip_config.json", encoder_copy / "preprocessor_config.json")
    (encoder_copy / "open_clip_config.json").unlink()
    assert_refused(encoder_copy, "has no config.json|" + message)


@pytest.mark.parametrize(("changes", "message"), ABSURD, ids=lambda value: str(value)[:40])
def test_absurd_sizes(changes: Json, message: str, encoder_copy: Path) -> None:
    edit_config(encoder_copy, **changes)
    assert_refused(encoder_copy, message)


@pytest.mark.parametrize("name", [CONFIG, INDEX, "preprocessor_config.json"])
def test_oversized_files(name: str, sharded: Path) -> None:
    with (sharded / name).open("r+b") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    assert_refused(sharded, f"file is {MAX_JSON_BYTES + 1} bytes, limit is {MAX_JSON_BYTES}")


def test_byte_order_mark(encoder_copy: Path, model: SigLipVisionModel) -> None:
    (encoder_copy / CONFIG).write_text((encoder_copy / CONFIG).read_text(), encoding="utf-8-sig")
    assert_loads(encoder_copy, model)


def test_remote_code(encoder_copy: Path, model: SigLipVisionModel) -> None:
    marker = encoder_copy / "ran"
    (encoder_copy / "modeling_x.py").write_text(
        f"import os; os.mkdir({str(marker)!r})\nclass Model: ...\nclass Config: ...\n"
    )
    edit_config(
        encoder_copy, auto_map={"AutoModel": "modeling_x.Model", "AutoConfig": "modeling_x.Config"}
    )
    assert_loads(encoder_copy, model)
    assert not marker.exists()


KEYS = st.sampled_from(
    [*SMALL.to_hf(), "vision_config", "num_patches", "mlp_ratio", "mean_pooling", "auto_map"]
)


NUMBERS = st.sampled_from(
    [0, -1, 1, 24, 10**9, 2**31, 2**63, 10**400, 1e308, float("inf"), float("nan"), True, "24"]
)


@given(st.dictionaries(KEYS, NUMBERS | JSON, min_size=1, max_size=3), st.booleans())
@settings(max_examples=60)
def test_any_value(encoder_folder: Path, changes: Json, nested: bool) -> None:
    content = {**json.loads((encoder_folder / CONFIG).read_text()), **changes}
    folder = encoder_folder.parent / "any-config"
    folder.mkdir(exist_ok=True)
    shutil.copy(encoder_folder / WEIGHTS, folder)
    (folder / CONFIG).write_text(
        json.dumps({"model_type": "siglip", "vision_config": content} if nested else content)
    )
    try:
        SigLipVisionModel.from_hf(folder)
    except CheckpointError:
        return

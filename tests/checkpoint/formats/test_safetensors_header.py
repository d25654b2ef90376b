"""Damaged and malicious headers of safetensors files."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from siglip_port import CheckpointError, SigLipVisionModel
from siglip_port.checkpoint.formats import (
    UnreadableFileError,
    open_tensors,
    read_header,
)
from siglip_port.checkpoint.source import WEIGHTS
from tests.helpers.damaged_files import Json, assert_loads, assert_refused, read_raw, write_raw
from tests.helpers.hub_server import Hub, Repository

NORM = "vision_model.post_layernorm.bias"
FC1 = "vision_model.encoder.layers.0.mlp.fc1.weight"


def change_entry(name: str, **values: object) -> Callable[[Json], Json]:
    return lambda header: {**header, name: {**header[name], **values}}


def shift_offsets(num_bytes: int) -> Callable[[Json], Json]:
    def move(header: Json) -> Json:
        begin, end = header[NORM]["data_offsets"]
        return change_entry(NORM, data_offsets=[begin + num_bytes, end + num_bytes])(header)

    return move


def leave_gap(path: Path) -> None:
    header, data = read_raw(path)
    write_raw(path, shift_offsets(4)(header), data)


def replace_text(old: str, new: str) -> Callable[[Json], bytes]:
    """Return an edit that replaces a part of the header's JSON."""

    def replaced(header: Json) -> bytes:
        content = json.dumps(header, ensure_ascii=False)
        assert old in content
        return content.replace(old, new, 1).encode("utf-8", "surrogateescape")

    return replaced


HEADERS: dict[str, tuple[Callable[[Json], Json | bytes], str]] = {
    "list": (lambda _: b"[]", "header is not a JSON object"),
    "invalid JSON": (lambda _: b"{", "Expecting property name"),
    "invalid UTF-8": (replace_text("F32", "F\udcff2"), "'utf-8' codec can't decode byte 0xff"),
    "UTF-16": (lambda h: json.dumps(h).encode("utf-16"), "'utf-8' codec can't decode"),
    "byte order mark": (lambda h: b"\xef\xbb\xbf" + json.dumps(h).encode(), "Unexpected UTF-8 BOM"),
    "lone surrogate": (replace_text("{", '{"\\ud800": 1, '), "surrogates not allowed"),
    "deep": (
        lambda _: b'{"a":' * 2000 + b"1" + b"}" * 2000,
        "nested more than 100 levels deep|nested too deep",
    ),
    "very deep": (lambda _: b"[" * 1_000_000, "nested more than 100 levels deep|nested too deep"),
    "long number": (replace_text("[0", "[" + "9" * 5000), "Exceeds the limit"),
    "NaN": (change_entry(NORM, shape=[float("nan")]), r"has invalid shape \[nan\]"),
    "duplicate name": (
        lambda h: replace_text("{", f'{{"{NORM}": {json.dumps(h[FC1])}, ')(h),
        f"key '{NORM}' occurs more than once",
    ),
    "duplicate metadata": (
        replace_text("{", '{"__metadata__": {}, '),
        "key '__metadata__' occurs more than once",
    ),
    "duplicate key": (
        replace_text('"dtype"', '"dtype": "F16", "dtype"'),
        "key 'dtype' occurs more than once",
    ),
    "metadata: list": (
        lambda h: {**h, "__metadata__": []},
        "__metadata__ must map strings to strings",
    ),
    "metadata: number": (
        lambda h: {**h, "__metadata__": {"a": 1}},
        "__metadata__ must map strings to strings",
    ),
    "number": (
        lambda h: {**h, NORM: 1},
        "must have exactly the keys dtype, shape and data_offsets",
    ),
    "no offsets": (
        lambda h: {**h, NORM: {"dtype": "F32", "shape": [24]}},
        "must have exactly the keys dtype, shape and data_off",
    ),
    "three offsets": (
        change_entry(NORM, data_offsets=[0, 1, 2]),
        "must have a dtype, a shape and two data_offsets",
    ),
    "shape: text": (
        change_entry(NORM, shape="24"),
        "must have a dtype, a shape and two data_offsets",
    ),
    "shape: float": (change_entry(NORM, shape=[24.0]), r"has invalid shape \[24.0\]"),
    "shape: bool": (
        change_entry(NORM, shape=[True, 24]),
        r"has invalid shape \[True, 24\]",
    ),
    "shape: negative": (change_entry(NORM, shape=[-24]), r"has invalid shape \[-24\]"),
    "shape: both negative": (
        change_entry(NORM, shape=[-1, -24]),
        r"has invalid shape \[-1, -24\]",
    ),
    "shape: enormous": (change_entry(NORM, shape=[10**30]), r"has invalid shape \[10+\]"),
    "shape: enormous and empty": (change_entry(NORM, shape=[0, 2**62, 2**62]), "has invalid shape"),
    "shape: 100 dimensions": (change_entry(NORM, shape=[1] * 99 + [24]), "has invalid shape"),
    "shape: too large": (
        change_entry(NORM, shape=[25]),
        r"is 96 bytes, which does not match F32 of shape \[25\]",
    ),
    "dtype: too wide": (
        change_entry(NORM, dtype="F64"),
        r"is 96 bytes, which does not match F64 of shape \[24\]",
    ),
    "dtype: number": (
        change_entry(NORM, dtype=32),
        "must have a dtype, a shape and two data_offsets",
    ),
    "dtype: unknown": (
        change_entry(NORM, dtype="Q4_K"),
        "expected one of F64, F32, F16, BF16, got Q4_K",
    ),
    "offsets: float": (
        lambda h: change_entry(NORM, data_offsets=[0.0, 96.0])(h),
        "has invalid data_offsets .0.0, 96.0.",
    ),
    "offsets: bool": (
        lambda h: change_entry(NORM, data_offsets=[False, 96])(h),
        "has invalid data_offsets .False, 96.",
    ),
    "offsets: negative": (
        change_entry(NORM, data_offsets=[-96, 0]),
        "has invalid data_offsets .-96, 0.",
    ),
    "offsets: reversed": (
        change_entry(NORM, data_offsets=[96, 0]),
        "has invalid data_offsets .96, 0.",
    ),
    "offsets: overlap": (shift_offsets(-4), "starts at byte [0-9]+ of the data, expected [0-9]+"),
    "offsets: gap": (shift_offsets(4), "starts at byte [0-9]+ of the data, expected [0-9]+"),
    "offsets: enormous": (
        shift_offsets(10**30),
        "starts at byte [0-9]+ of the data, expected [0-9]+",
    ),
    "empty": (lambda _: {}, "tensors end at byte [0-9]+, file is"),
    "one tensor less": (
        lambda h: dict(sorted(h.items(), key=offsets)[:-1]),
        "tensors end at byte [0-9]+, file is",
    ),
}


def offsets(item: tuple[str, Any]) -> int:
    return int(item[1].get("data_offsets", [0])[0])


@pytest.mark.parametrize("case", HEADERS)
def test_invalid_headers(case: str, encoder_copy: Path) -> None:
    edit, message = HEADERS[case]
    header, data = read_raw(encoder_copy / WEIGHTS)
    write_raw(encoder_copy / WEIGHTS, edit(header), data)
    assert_refused(encoder_copy, message)
    # safetensors keeps the last of duplicate keys, and accepts more dimensions than PyTorch.
    if case not in ("duplicate name", "shape: 100 dimensions"):
        with pytest.raises(SafetensorError), safe_open(encoder_copy / WEIGHTS, framework="pt"):
            pass


@pytest.mark.parametrize(
    "edit",
    [
        lambda h: dict(reversed(h.items())),
        lambda h: json.dumps(h).encode() + b" " * 77,
        lambda h: {k: v for k, v in h.items() if k != "__metadata__"},
        lambda h: {**h, "__metadata__": None},
        lambda h: {
            **h,
            "text_model.none": {"dtype": "I8", "shape": [3, 0], "data_offsets": [0, 0]},
        },
        lambda h: {**h, "text_model.none": {"dtype": "Q4_K", "shape": [7], "data_offsets": [0, 0]}},
    ],
    ids=[
        "other order",
        "spaces",
        "no metadata",
        "null metadata",
        "empty tensor",
        "unknown dtype",
    ],
)
def test_valid_headers(
    edit: Callable[[Json], Json | bytes], encoder_copy: Path, model: SigLipVisionModel
) -> None:
    header, data = read_raw(encoder_copy / WEIGHTS)
    write_raw(encoder_copy / WEIGHTS, edit(header), data)
    assert_loads(encoder_copy, model)


BITS = {"F64": 64, "F32": 32, "BF16": 16, "F8_E4M3": 8, "F4": 4, "BOOL": 8}


SHAPES = st.lists(st.integers(0, 3), max_size=3)


WRONG = st.sampled_from([0] * 12 + [1, -1, 4, True, 0.0])


@given(
    st.permutations(list(BITS)),
    st.lists(st.tuples(SHAPES, WRONG, WRONG), max_size=4),
    st.sampled_from([0, 0, 0, 1]),
)
@settings(max_examples=200)
def test_headers_agree_with_safetensors(
    tmp_path_factory: pytest.TempPathFactory,
    dtypes: list[str],
    tensors: list[tuple[list[int], float, float]],
    num_extra: int,
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    at = 0
    header = {}
    for dtype, (shape, *wrong) in zip(dtypes, tensors, strict=False):
        end = at + math.prod(shape) * BITS[dtype] // 8
        header[dtype] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [at + wrong[0], end + wrong[1]],
        }
        at = end
    write_raw(path, dict(sorted(header.items())), bytes(at + num_extra))
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
    except SafetensorError:
        with pytest.raises(UnreadableFileError):
            read_header(path)
    else:
        assert read_header(path).tensors.keys() == names


def test_header_length_like_pickle_magic(encoder_copy: Path, model: SigLipVisionModel) -> None:
    """A header of 0x280 or 0x480 bytes starts like a pickle."""
    header, data = read_raw(encoder_copy / WEIGHTS)
    length = len(json.dumps(header)) // 256 * 256 + 0x180
    for protocol in range(2, 6):
        size = 0x80 + 256 * protocol + length // 2048 * 2048 + 2048
        write_raw(encoder_copy / WEIGHTS, json.dumps(header).encode().ljust(size), data)
        assert (encoder_copy / WEIGHTS).read_bytes()[0] == 0x80
        assert_loads(encoder_copy, model)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
            "found a Git LFS pointer",
        ),
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), "file is [0-9]+"),
        (
            leave_gap,
            "starts at byte [0-9]+ of the data, expected",
        ),
    ],
    ids=["LFS", "truncated", "gap"],
)
def test_invalid_remote_headers(
    edit: Callable[[Path], object], message: str, encoder_copy: Path, hub: Hub, tmp_path: Path
) -> None:
    """On the Hub only the header is read, so safetensors never checks it."""
    edit(encoder_copy / WEIGHTS)
    hub.repositories["google/a"] = Repository(encoder_copy)
    with pytest.raises(
        CheckpointError, match=f"google/a: model.safetensors is not a valid .*{message}"
    ):
        SigLipVisionModel.from_hf("google/a", cache_dir=tmp_path / "cache")


TENSORS = {
    "a": torch.randn(3, 5),
    "b": torch.randn(4).bfloat16(),
    "c": torch.tensor(2.5),
    "d": torch.ones(2, 0),
    "e": torch.ones(3, dtype=torch.int64),
    "f": torch.ones(2).to(torch.float8_e4m3fn),
}


def test_header_values(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(TENSORS, path, {"format": "pt"})
    header = read_header(path).tensors
    with safe_open(path, framework="pt") as file:
        assert header.keys() == set(file.keys())
        for name, stored in header.items():
            assert stored.shape == tuple(file.get_slice(name).get_shape())
            assert stored.dtype == file.get_slice(name).get_dtype()
            assert stored.nbytes == TENSORS[name].nbytes


@given(st.integers(0, 400), st.binary(min_size=1, max_size=3))
def test_damaged_header(position: int, damage: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.safetensors")
        save_file(TENSORS, path)
        content = bytearray(path.read_bytes())
        content[position : position + len(damage)] = damage
        path.write_bytes(content)
        try:
            header = read_header(path).tensors
        except UnreadableFileError:
            return
        with open_tensors(path) as read:
            for name in header:
                try:
                    read(name)
                except UnreadableFileError:
                    return

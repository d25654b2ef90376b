"""Files that are broken or made to do harm.

Every one is refused in a sentence, or loads as the intact one does.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from siglip_port import CheckpointError, SigLipVisionModel
from siglip_port.checkpoint.formats import MAX_JSON_BYTES, UnreadableFileError, read_header
from siglip_port.checkpoint.inspect import inspect_checkpoint
from siglip_port.hub.repository import find_source
from siglip_port.parity.stress_weights import randomise
from tests.helpers.checkpoints import SMALL, edit_config, shard
from tests.helpers.hub_server import Hub, Repository
from tests.helpers.other_libraries import flax, write_npz
from tests.helpers.strategies import JSON

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
NORM, FC1 = "vision_model.post_layernorm.bias", "vision_model.encoder.layers.0.mlp.fc1.weight"

Json = dict[str, Any]


@pytest.fixture(scope="module")
def model() -> SigLipVisionModel:
    made = SigLipVisionModel(SMALL)
    randomise(made)
    return made


@pytest.fixture(scope="module")
def intact(model: SigLipVisionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intact")
    model.save_hf(folder)
    return folder


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "made"))


def assert_refused(source: Path, message: str) -> None:
    """By all that reads: a `CheckpointError` with this text, and nothing else."""
    with pytest.raises(CheckpointError, match=message):
        SigLipVisionModel.from_hf(source)
    try:
        found = inspect_checkpoint(find_source(source))
    except CheckpointError:
        return
    assert found.problem is not None


def assert_loads(source: Path, model: SigLipVisionModel) -> None:
    state = SigLipVisionModel.from_hf(source).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


# --- headers of safetensors -----------------------------------------------------------------------


def read_weights_header(path: Path) -> tuple[Json, bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(path: Path, header: Json | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def changed(name: str, **values: object) -> Callable[[Json], Json]:
    return lambda header: {**header, name: {**header[name], **values}}


def moved(by: int) -> Callable[[Json], Json]:
    def move(header: Json) -> Json:
        begin, end = header[NORM]["data_offsets"]
        return changed(NORM, data_offsets=[begin + by, end + by])(header)

    return move


def text(old: str, new: str) -> Callable[[Json], bytes]:
    """The header with a piece of its text replaced."""

    def replaced(header: Json) -> bytes:
        whole = json.dumps(header, ensure_ascii=False)
        assert old in whole
        return whole.replace(old, new, 1).encode("utf-8", "surrogateescape")

    return replaced


HEADERS: dict[str, tuple[Callable[[Json], Json | bytes], str]] = {
    "a list": (lambda _: b"[]", "its header is no JSON object"),
    "no JSON": (lambda _: b"{", "Expecting property name"),
    "no UTF-8": (text("F32", "F\udcff2"), "'utf-8' codec can't decode byte 0xff"),
    "UTF-16": (lambda h: json.dumps(h).encode("utf-16"), "'utf-8' codec can't decode"),
    "byte order mark": (lambda h: b"\xef\xbb\xbf" + json.dumps(h).encode(), "Unexpected UTF-8 BOM"),
    "half a character": (text("{", '{"\\ud800": 1, '), "surrogates not allowed"),
    "deep": (lambda _: b'{"a":' * 2000 + b"1" + b"}" * 2000, "deep inside each other"),
    "very deep": (lambda _: b"[" * 1_000_000, "deep inside each other"),
    "a long number": (text("[0", "[" + "9" * 5000), "Exceeds the limit"),
    "NaN": (changed(NORM, shape=[float("nan")]), r"the shape \[nan\], which no tensor has"),
    "a name twice": (
        lambda h: text("{", f'{{"{NORM}": {json.dumps(h[FC1])}, ')(h),
        f"says '{NORM}' more than once",
    ),
    "metadata twice": (text("{", '{"__metadata__": {}, '), "says '__metadata__' more than once"),
    "a key twice": (text('"dtype"', '"dtype": "F16", "dtype"'), "says 'dtype' more than once"),
    "metadata: list": (lambda h: {**h, "__metadata__": []}, "__metadata__ must be texts by name"),
    "metadata: number": (
        lambda h: {**h, "__metadata__": {"a": 1}},
        "__metadata__ must be texts by name",
    ),
    "a number": (
        lambda h: {**h, NORM: 1},
        "must have a dtype, a shape and data_offsets, and nothing else",
    ),
    "no offsets": (
        lambda h: {**h, NORM: {"dtype": "F32", "shape": [24]}},
        "must have a dtype, a shape and data_off",
    ),
    "three offsets": (
        changed(NORM, data_offsets=[0, 1, 2]),
        "must have a dtype, a shape and two data_offsets",
    ),
    "shape: text": (changed(NORM, shape="24"), "must have a dtype, a shape and two data_offsets"),
    "shape: float": (changed(NORM, shape=[24.0]), r"the shape \[24.0\], which no tensor has"),
    "shape: bool": (
        changed(NORM, shape=[True, 24]),
        r"the shape \[True, 24\], which no tensor has",
    ),
    "shape: negative": (changed(NORM, shape=[-24]), r"the shape \[-24\], which no tensor has"),
    "shape: both negative": (
        changed(NORM, shape=[-1, -24]),
        r"the shape \[-1, -24\], which no tensor has",
    ),
    "shape: enormous": (changed(NORM, shape=[10**30]), r"the shape \[10+\], which no tensor has"),
    "shape: enormous and empty": (changed(NORM, shape=[0, 2**62, 2**62]), "which no tensor has"),
    "shape: a hundred": (changed(NORM, shape=[1] * 99 + [24]), "which no tensor has"),
    "shape: too many": (changed(NORM, shape=[25]), r"96 bytes, which F32 of shape \[25\] has not"),
    "dtype: too wide": (changed(NORM, dtype="F64"), r"96 bytes, which F64 of shape \[24\] has not"),
    "dtype: a number": (changed(NORM, dtype=32), "must have a dtype, a shape and two data_offsets"),
    "dtype: unknown": (
        changed(NORM, dtype="Q4_K"),
        "expected one of F64, F32, F16, BF16, found Q4_K",
    ),
    "offsets: float": (
        lambda h: changed(NORM, data_offsets=[0.0, 96.0])(h),
        "is said to lie from 0.0 to 96.0",
    ),
    "offsets: bool": (
        lambda h: changed(NORM, data_offsets=[False, 96])(h),
        "is said to lie from False to 96",
    ),
    "offsets: negative": (changed(NORM, data_offsets=[-96, 0]), "is said to lie from -96 to 0"),
    "offsets: backwards": (changed(NORM, data_offsets=[96, 0]), "is said to lie from 96 to 0"),
    "offsets: overlap": (moved(-4), "is said to begin at [0-9]+, but the tensors before it end at"),
    "offsets: a gap": (moved(4), "is said to begin at [0-9]+, but the tensors before it end at"),
    "offsets: enormous": (
        moved(10**30),
        "is said to begin at [0-9]+, but the tensors before it end at",
    ),
    "nothing": (lambda _: {}, "its tensors take [0-9]+ bytes, the file has"),
    "one tensor less": (
        lambda h: dict(sorted(h.items(), key=offsets)[:-1]),
        "its tensors take [0-9]+ bytes, the file",
    ),
}


def offsets(item: tuple[str, Any]) -> int:
    return int(item[1].get("data_offsets", [0])[0])


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_are_refused(case: str, folder: Path) -> None:
    edit, message = HEADERS[case]
    header, data = read_weights_header(folder / WEIGHTS)
    write(folder / WEIGHTS, edit(header), data)
    assert_refused(folder, message)
    if case not in (
        "a name twice",
        "shape: a hundred",
    ):  # of which safetensors takes the last; which no tensor can have
        with pytest.raises(SafetensorError), safe_open(folder / WEIGHTS, framework="pt"):
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
        "another order",
        "spaces",
        "no metadata",
        "null for metadata",
        "an empty tensor",
        "a dtype of tomorrow",
    ],
)
def test_headers_that_are_read(
    edit: Callable[[Json], Json | bytes], folder: Path, model: SigLipVisionModel
) -> None:
    header, data = read_weights_header(folder / WEIGHTS)
    write(folder / WEIGHTS, edit(header), data)
    assert_loads(folder, model)


BITS = {"F64": 64, "F32": 32, "BF16": 16, "F8_E4M3": 8, "F4": 4, "BOOL": 8}
SHAPES = st.lists(st.integers(0, 3), max_size=3)
WRONG = st.sampled_from([0] * 12 + [1, -1, 4, True, 0.0])


@given(
    st.permutations(list(BITS)),
    st.lists(st.tuples(SHAPES, WRONG, WRONG), max_size=4),
    st.sampled_from([0, 0, 0, 1]),
)
@settings(max_examples=200)
def test_what_safetensors_reads_is_read_and_what_it_refuses_is_refused(
    tmp_path_factory: pytest.TempPathFactory,
    dtypes: list[str],
    tensors: list[tuple[list[int], float, float]],
    more: int,
) -> None:
    path, at = tmp_path_factory.getbasetemp() / "any.safetensors", 0
    header = {}
    for dtype, (shape, *wrong) in zip(dtypes, tensors, strict=False):
        end = at + math.prod(shape) * BITS[dtype] // 8
        header[dtype] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [at + wrong[0], end + wrong[1]],
        }
        at = end
    write(path, dict(sorted(header.items())), bytes(at + more))
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
    except SafetensorError:
        with pytest.raises(UnreadableFileError):
            read_header(path)
    else:
        assert read_header(path).tensors.keys() == names


# --- what is no safetensors or .npz file at all ---------------------------------------------------


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def zipped(payload: Payload) -> bytes:
    file = io.BytesIO()
    torch.save({"a": payload}, file)
    return file.getvalue()


PICKLED = "a pickle, which is refused.*; to load a pickle can run any code. Where you trust its origin, transformers'"
OTHERS: dict[str, tuple[Callable[[Payload], bytes], str]] = {
    "nothing": (lambda _: b"", "it is empty"),
    "seven bytes": (lambda _: b"\0" * 7, "its header is said to have 7 bytes, the file has 7"),
    "torch.save": (
        zipped,
        r"a zip archive: a pickle of torch\.save, which is refused, or an \.npz file.*any code",
    ),
    "a page": (
        lambda _: b"\n<!DOCTYPE html><html>Log in",
        "a web page, as a login or an error brings.*; fetch it again, l",
    ),
    "XML": (lambda _: b'<?xml version="1.0"?><Error>', "a web page, as a login or an error brings"),
    "JSON": (lambda _: b'{"error": "not authorised"}', "it is JSON, as an error brings"),
    "LFS": (
        lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "a pointer of Git LFS.*git lfs pull",
    ),
    "GGUF": (lambda _: b"GGUF\3\0\0\0" + b"\0" * 99, "it is a GGUF file"),
    "gzip": (lambda _: b"\x1f\x8b\x08\0" + b"\0" * 99, "compressed by gzip.*; unpack it first"),
    "HDF5": (lambda _: b"\x89HDF\r\n\x1a\n" + b"\0" * 99, "it is an HDF5 file"),
    "one array": (lambda _: b"\x93NUMPY\1\0" + b"\0" * 99, "it is a single array of numpy"),
    "noise": (lambda _: bytes(range(200, 255)) * 9, "damaged or of another format: fetch it again"),
    **{
        f"pickle, protocol {n}": (lambda payload, n=n: pickle.dumps(payload, protocol=n), PICKLED)  # type: ignore[misc]
        for n in range(2, 6)
    },
    "pickle, protocol 0": (
        lambda payload: pickle.dumps(payload, protocol=0),
        "damaged or of another format",
    ),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("case", OTHERS)
def test_other_formats_are_called_by_their_names(
    case: str, suffix: str, folder: Path, tmp_path: Path
) -> None:
    """And nothing is unpickled."""
    make, message = OTHERS[case]
    if suffix == ".npz":
        message = {"torch.save": PICKLED, "nothing": "not a zip", "seven bytes": "not a zip"}.get(
            case, message
        )
    (folder / WEIGHTS).unlink()
    path = folder / f"model{suffix}"
    path.write_bytes(make(Payload(tmp_path / "unpickled")))
    assert_refused(path if suffix == ".npz" else folder, message)
    assert not (tmp_path / "unpickled").exists()


def test_a_header_as_long_as_a_pickle_begins(folder: Path, model: SigLipVisionModel) -> None:
    """0x280 bytes or 0x480: the first two bytes are those of a pickle, or nearly."""
    header, data = read_weights_header(folder / WEIGHTS)
    length = len(json.dumps(header)) // 256 * 256 + 0x180
    for protocol in range(2, 6):
        size = 0x80 + 256 * protocol + length // 2048 * 2048 + 2048
        write(folder / WEIGHTS, json.dumps(header).encode().ljust(size), data)
        assert (folder / WEIGHTS).read_bytes()[0] == 0x80
        assert_loads(folder, model)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
            "a pointer of Git LFS",
        ),
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), "the file has"),
        (
            lambda path: write(path, moved(4)((h := read_weights_header(path))[0]), h[1]),
            "but the tensors before it end at",
        ),
    ],
    ids=["LFS", "truncated", "a gap"],
)
def test_files_on_the_hub(
    edit: Callable[[Path], object], message: str, folder: Path, hub: Hub, tmp_path: Path
) -> None:
    """Of which only parts are read, so that safetensors never sees them."""
    edit(folder / WEIGHTS)
    hub.repositories["google/a"] = Repository(folder)
    with pytest.raises(
        CheckpointError, match=f"model.safetensors of 'google/a' is not a whole .*{message}"
    ):
        SigLipVisionModel.from_hf("google/a", cache_dir=tmp_path / "cache")


# --- .npz -----------------------------------------------------------------------------------------

Members = dict[str, bytes]


def npy(array: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npy_header(text: str, version: bytes = b"\1\0") -> bytes:
    return (
        b"\x93NUMPY"
        + version
        + struct.pack("<H" if version == b"\1\0" else "<I", len(text))
        + text.encode()
    )


def described(shape: str, descr: str = "'<f4'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


BIAS = "params/img/Transformer/encoder_norm/bias.npy"

MEMBERS: dict[str, tuple[bytes, str]] = {
    "a pickle": (b"", "expected one of F64, F32, F16, BF16, found a pickle"),
    "nothing": (b"", "EOF: reading magic string"),
    "no magic": (b"0" * 200, "the magic string is not correct"),
    "negative": (
        npy_header(described("(-24,)")) + b"\0" * 96,
        r"the shape \(-24,\), which no tensor has",
    ),
    "enormous": (npy_header(described(f"({10**30},)")) + b"\0" * 96, "which no tensor has"),
    "larger than it is": (
        npy_header(described("(10**9,)".replace("10**9", "1000000000"))),
        "its header asks for 4000000",
    ),
    "more than its header says": (
        npy(np.ones(24, np.float32)) + b"\0",
        "has 225 bytes, its header asks for 224",
    ),
    "truncated": (npy(np.ones(24, np.float32))[:-1], "has 223 bytes, its header asks for 224"),
    "another shape": (
        npy(np.ones(23, np.float32)),
        r"shape: expected \[24\] by the architecture, found \[23\]",
    ),
    "a structure": (npy(np.zeros(24, [("a", "<f4")])), "found \\[\\('a', '<f4'\\)\\]"),
    "whole numbers": (npy(np.zeros(24, np.int32)), "found int32"),
    "a bool for a size": (npy_header(described("(True, 24)")) + b"\0" * 96, "which no tensor has"),
    "of Python 2": (
        npy_header(described("(24L,)")) + b"\0" * 96,
        "is not a whole npz file .Reading `.npy` or `.npz` file required",
    ),
    "a header of 4 GB": (
        b"\x93NUMPY\2\0\xff\xff\xff\xff" + b" " * 999,
        "EOF: reading array header",
    ),
    "deep": (npy_header(described("(" * 5000 + ")" * 5000), b"\2\0"), "not a whole npz file"),
    "code": (npy_header("__import__('os').mkdir('unpickled')\n"), "not a whole npz file"),
}


@pytest.fixture(scope="module")
def members(model: SigLipVisionModel, tmp_path_factory: pytest.TempPathFactory) -> Members:
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    write_npz(path, flax(SMALL, model.state_dict(), scanned=False), "params/img/")
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_zip(path: Path, members: Members, how: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.parametrize("case", MEMBERS)
def test_arrays_that_are_refused(
    case: str, members: Members, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content, message = MEMBERS[case]
    if case == "a pickle":
        content = npy(np.array([Payload(tmp_path / "unpickled")] * 24, dtype=object))
    write_zip(tmp_path / "a.npz", {**members, BIAS: content})
    assert_refused(tmp_path / "a.npz", message)
    assert not (tmp_path / "unpickled").exists()


def test_archives(members: Members, tmp_path: Path, model: SigLipVisionModel) -> None:
    path = tmp_path / "a.npz"
    write_zip(path, members)
    assert_loads(path, model)
    whole = path.read_bytes()
    write_zip(
        path,
        {
            **members,
            "opt/state.npy": npy(np.array([Payload(tmp_path / "unpickled")], dtype=object)),
        },
    )
    assert_loads(path, model)
    assert not (tmp_path / "unpickled").exists()
    path.write_bytes(whole[: len(whole) // 2])
    assert_refused(path, "File is not a zip file")
    for how in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        write_zip(path, members, how)
        assert_refused(path, "is compressed as numpy does not compress")
    write_zip(path, {**members, BIAS.replace("bias", "sole"): members[BIAS]})
    path.write_bytes(path.read_bytes().replace(b"sole.npy", b"bias.npy"))
    assert_refused(path, f"it holds {BIAS.removesuffix('.npy')} more than once")
    write_zip(path, {**members, "../params/img/x.npy": members[BIAS]})
    assert_loads(path, model)  # a name is nothing but a name: here, of another tower's
    write_zip(path, {**members, "params/img/../x.npy": members[BIAS]})
    assert_refused(path, "unknown tensors")


def test_an_encrypted_array(members: Members, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_zip(path, {BIAS: members[BIAS]})
    content = bytearray(path.read_bytes())
    content[6] |= 1  # in the member's own header, and in the directory
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    assert_refused(path, "is encrypted")


def test_an_array_whose_bytes_changed(members: Members, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_zip(path, members, zipfile.ZIP_STORED)
    name = "params/img/embedding/kernel.npy"
    content = path.read_bytes()
    path.write_bytes(content.replace(members[name][-96:], bytes(96)))
    assert_refused(
        path, "params/img/embedding/kernel is damaged .Bad CRC-32.*; fetch the file again"
    )


# --- shards ---------------------------------------------------------------------------------------


@pytest.fixture
def sharded(folder: Path) -> Path:
    shard(folder)
    return folder


def edit_index(folder: Path, edit: Callable[[Json], object]) -> None:
    path = folder / INDEX
    content = json.loads(path.read_text())
    edited = edit(content)
    path.write_text(edited if isinstance(edited, str) else json.dumps(edited))


def placed(file: object, name: str = NORM) -> Callable[[Json], Json]:
    return lambda index: {**index, "weight_map": {**index["weight_map"], name: file}}


def a_thousand_towers(index: Json) -> Json:
    names = index["weight_map"]
    return {
        "weight_map": {
            f"tower{i}.{name}": f"shard-{i}.safetensors" for i in range(1000) for name in names
        }
    }


PLAIN = "names shards that are no plain .safetensors file names"
INDEXES: dict[str, tuple[Callable[[Json], object], str]] = {
    "..": (placed("../model.safetensors"), PLAIN),
    "../..": (placed("../../../../../../etc/passwd"), PLAIN),
    "absolute": (placed("/model.safetensors"), PLAIN),
    "a folder": (placed("folder/model.safetensors"), PLAIN),
    "a folder of Windows": (placed("..\\model.safetensors"), PLAIN),
    "an address": (placed("http://127.0.0.1/model.safetensors"), PLAIN),
    "a line": (placed("model.safetensors\n"), PLAIN),
    "a zero": (placed("model\0.safetensors"), PLAIN),
    "a pickle": (
        placed("pytorch_model.bin"),
        f"{PLAIN}: pytorch_model.bin. Pickled weights .* are refused",
    ),
    "nothing": (placed(""), PLAIN),
    "too long a name": (placed("a" * 5000 + ".safetensors"), "so these cannot be read"),
    "not there": (
        placed("elsewhere.safetensors"),
        "has no file elsewhere.safetensors, so these cannot be read",
    ),
    "a number": (placed(1), "has no usable weight_map"),
    "null": (lambda index: {**index, "weight_map": None}, "has no usable weight_map"),
    "a list": (lambda _: [], "must hold a JSON object, found a list"),
    "no map": (lambda _: {}, "has no usable weight_map"),
    "an empty map": (lambda _: {"weight_map": {}}, "holds no SigLIP vision tower"),
    "another shard": (
        lambda i: placed(next(f for f in i["weight_map"].values() if f != i["weight_map"][NORM]))(
            i
        ),
        "missing tensors .1.:\n    vision_model.post_layernorm.bias(.|\n)*that the index does not "
        "place there",
    ),
    "twice": (
        lambda index: json.dumps(index).replace(
            f'"{NORM}"', f'"{NORM}": "model-00001-of-00003.safetensors", "{NORM}"'
        ),
        f"is not readable JSON .it says '{NORM}' more than once.; fetch it again",
    ),
    "a thousand towers": (
        a_thousand_towers,
        "names 1000 towers in the layout 'huggingface', more than the 100 that are looked at; say "
        "which is",
    ),
}


@pytest.mark.parametrize("case", INDEXES)
def test_indexes_that_are_refused(case: str, sharded: Path) -> None:
    edit, message = INDEXES[case]
    shutil.copy(
        sharded / "model-00001-of-00003.safetensors", sharded.parent / "model.safetensors"
    )  # what .. leads to
    edit_index(sharded, edit)
    assert_refused(sharded, message)


def test_one_tower_of_a_thousand(sharded: Path) -> None:
    """Of the others, nothing is opened."""
    edit_index(sharded, a_thousand_towers)
    found = inspect_checkpoint(find_source(sharded), prefix="tower7.vision_model.")
    assert found.towers == (("huggingface", "tower7.vision_model."),)
    assert "has no file shard-7.safetensors, so these cannot be read (64)" in str(found.problem)


def test_thousands_of_shards(sharded: Path, model: SigLipVisionModel) -> None:
    """Those without the tower are not opened: they are not even there."""
    rest = {f"language_model.layers.{i}.w": f"rest-{i:05}.safetensors" for i in range(20_000)}
    edit_index(sharded, lambda index: {**index, "weight_map": {**rest, **index["weight_map"]}})
    assert_loads(sharded, model)


def test_shards_that_are_links(sharded: Path, model: SigLipVisionModel) -> None:
    """As in the Hub's cache, where all are."""
    (sharded.parent / "blobs").mkdir()
    for path in sharded.glob("*.safetensors"):
        path.symlink_to(path.rename(sharded.parent / "blobs" / path.stem))
    assert_loads(sharded, model)
    (path := next(sharded.glob("*.safetensors"))).unlink()
    path.symlink_to(path.name)
    assert_refused(sharded, f"{path.name}.*, so these cannot be read")


# --- configurations -------------------------------------------------------------------------------

CONFIGS: dict[str, tuple[Callable[[str], str | bytes], str]] = {
    "nothing": (lambda _: "", "is not readable JSON .Expecting value"),
    "a list": (lambda _: "[]", "must hold a JSON object, found a list"),
    "null": (lambda _: "null", "must hold a JSON object, found a NoneType"),
    "zeros": (lambda t: "\0" * len(t), "is not readable JSON"),
    "a zero": (lambda t: t.replace("{", "{\0"), "is not readable JSON"),
    "no UTF-8": (
        lambda t: t.encode().replace(b"siglip", b"sigli\xff"),
        "is not readable JSON .'utf-8' codec",
    ),
    "half a character": (
        lambda t: t.replace("siglip_vision_model", "\\ud800"),
        "surrogates not allowed",
    ),
    "deep": (
        lambda t: t.replace("{", '{"a": ' + "[" * 500 + "]" * 500 + ",", 1),
        "more than 100 deep inside",
    ),
    "very deep": (lambda _: '{"a": ' + "[" * 1_000_000, "too deep inside each other"),
    "twice": (
        lambda t: t.replace("{", '{"hidden_size": 32, ', 1),
        "it says 'hidden_size' more than once",
    ),
    "a long number": (lambda t: t.replace(": 24", ": " + "2" * 5000), "Exceeds the limit"),
    "cut off": (lambda t: t[: len(t) // 2], "is not readable JSON"),
}

ABSURD: list[tuple[Json, str]] = [
    ({"hidden_size": 10**9}, "shape: expected"),
    ({"hidden_size": 2**63}, "impossible tower|shape: expected"),
    ({"hidden_size": 10**4000}, "impossible tower"),
    ({"image_size": 10**9}, "shape: expected"),
    ({"image_size": 10**4000}, "impossible tower"),
    ({"patch_size": 10**4000, "image_size": 10**4000}, "impossible tower"),
    ({"num_channels": 10**12}, "shape: expected|impossible tower"),
    ({"intermediate_size": 10**12}, "shape: expected"),
    (
        {"num_hidden_layers": 10**7},
        "asks for 10000000 blocks, but the weights have only 64 tensors",
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
    ({"model_type": "janus_vision_model", "mlp_ratio": float("inf")}, "mlp_ratio must be a number"),
    ({"model_type": "siglip2_vision_model", "num_patches": 10**18}, "describes a NaFlex tower"),
]


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations_that_are_refused(case: str, folder: Path) -> None:
    edit, message = CONFIGS[case]
    edited = edit((folder / CONFIG).read_text())
    (folder / CONFIG).write_bytes(edited if isinstance(edited, bytes) else edited.encode())
    assert_refused(folder, message)
    shutil.move(folder / CONFIG, folder / "open_clip_config.json")
    assert_refused(folder, message)
    shutil.copy(folder / "open_clip_config.json", folder / "preprocessor_config.json")
    (folder / "open_clip_config.json").unlink()
    assert_refused(folder, "has no config.json|" + message)


@pytest.mark.parametrize(("changes", "message"), ABSURD, ids=lambda value: str(value)[:40])
def test_absurd_sizes_are_refused(changes: Json, message: str, folder: Path) -> None:
    edit_config(folder, **changes)
    assert_refused(folder, message)


@pytest.mark.parametrize("value", [False, 0, "", [], {}, "relu"])
def test_what_timm_cannot_mean_is_not_passed_over(
    value: object, model: SigLipVisionModel, tmp_path: Path
) -> None:
    model.save_timm(tmp_path)
    edit_config(
        tmp_path,
        model_args={
            **json.loads((tmp_path / CONFIG).read_text())["model_args"],
            "act_layer": value,
        },
    )
    assert_refused(tmp_path, "hidden_act must be one of gelu_pytorch_tanh, gelu, got")
    edit_config(
        tmp_path, model_args={"act_layer": "gelu_tanh", "num_heads": 2, "vit_ln_eps": value}
    )
    assert_refused(tmp_path, "layer_norm_eps must (be a number|lie between 0 and 1), got")


@pytest.mark.parametrize("name", [CONFIG, INDEX, "preprocessor_config.json"])
def test_documents_that_are_too_long(name: str, sharded: Path) -> None:
    with (sharded / name).open("r+b") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    assert_refused(
        sharded, f"it has {MAX_JSON_BYTES + 1} bytes, and at most {MAX_JSON_BYTES} are read"
    )


def test_more_blocks_than_any_tower_has(folder: Path) -> None:
    """Spelled out, they would take minutes and all memory; the file names as many."""
    header, data = read_weights_header(folder / WEIGHTS)
    header |= {
        f"text_model.{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        for i in range(20_000)
    }
    write(folder / WEIGHTS, header, data)
    edit_config(folder, num_hidden_layers=20_000)
    assert_refused(folder, "asks for 20000 blocks, and no tower has more than 1000")


def test_a_byte_order_mark_is_no_harm(folder: Path, model: SigLipVisionModel) -> None:
    (folder / CONFIG).write_text((folder / CONFIG).read_text(), encoding="utf-8-sig")
    assert_loads(folder, model)


def test_code_beside_the_weights_is_not_run(folder: Path, model: SigLipVisionModel) -> None:
    ran = folder / "ran"
    (folder / "modeling_x.py").write_text(
        f"import os; os.mkdir({str(ran)!r})\nclass Model: ...\nclass Config: ...\n"
    )
    edit_config(
        folder, auto_map={"AutoModel": "modeling_x.Model", "AutoConfig": "modeling_x.Config"}
    )
    assert_loads(folder, model)
    assert not ran.exists()


KEYS = st.sampled_from(
    [*SMALL.to_hf(), "vision_config", "num_patches", "mlp_ratio", "mean_pooling", "auto_map"]
)
NUMBERS = st.sampled_from(
    [0, -1, 1, 24, 10**9, 2**31, 2**63, 10**400, 1e308, float("inf"), float("nan"), True, "24"]
)


@given(st.dictionaries(KEYS, NUMBERS | JSON, min_size=1, max_size=3), st.booleans())
@settings(max_examples=60)
def test_any_value_of_any_key(intact: Path, changes: Json, nested: bool) -> None:
    content = {**json.loads((intact / CONFIG).read_text()), **changes}
    folder = intact.parent / "any-config"
    folder.mkdir(exist_ok=True)
    shutil.copy(intact / WEIGHTS, folder)
    (folder / CONFIG).write_text(
        json.dumps({"model_type": "siglip", "vision_config": content} if nested else content)
    )
    try:
        SigLipVisionModel.from_hf(folder)
    except CheckpointError:
        return


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
def test_any_processor(
    intact: Path, model: SigLipVisionModel, content: Json, name: str, kind: str
) -> None:
    """The tower can do without, so it is loaded; and saved, where the processor is one for JSON."""
    folder = intact.parent / f"any-{name}"
    folder.mkdir(exist_ok=True)
    for file in (WEIGHTS, CONFIG):
        shutil.copy(intact / file, folder)
    content = {"image_processor_type": kind, **content}
    if name == "open_clip_config.json":
        content = {"preprocess_cfg": content, "pretrained_cfg": content}
    (folder / name).write_text(
        json.dumps({"image_processor": content} if name.startswith("processor") else content)
    )
    assert_loads(folder, model)
    SigLipVisionModel.from_hf(folder).save_timm(folder / "out")


# --- memory ---------------------------------------------------------------------------------------

MEASURE = r"""
import re, sys
from pathlib import Path
from siglip_port import CheckpointError, SigLipVisionModel
def peak():  # in megabytes, of this process alone
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1000
for path in sys.argv[1:2] + sys.argv[1:]:  # the first once before, for what is imported on the way
    before = peak()
    try:
        SigLipVisionModel.from_hf(path)
    except CheckpointError as error:
        print(peak() - before, str(error).splitlines()[0][-200:])
    else:
        raise SystemExit(f"{path} was loaded")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="others tell it elsewhere")
def test_memory_is_bounded(folder: Path, members: Members, tmp_path: Path) -> None:
    """Four bombs, in a process of its own, which would need gigabytes: they are refused before."""
    wide = Path(shutil.copytree(folder, tmp_path / "wide"))
    edit_config(wide, hidden_size=10**9, num_attention_heads=1, intermediate_size=10**9)
    header, large = tmp_path / "header.npz", tmp_path / "large.npz"
    lists = Path(shutil.copytree(folder, tmp_path / "lists"))
    with zipfile.ZipFile(header, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(BIAS, b"\x93NUMPY\2\0" + struct.pack("<I", 1 << 28) + bytes(1 << 28))
    with zipfile.ZipFile(large, "w", zipfile.ZIP_DEFLATED) as archive:
        for (
            name,
            content,
        ) in (
            members.items()
        ):  # all that is 24 wide, 8192 wide: 4 GB, by the headers and the directory
            shape = [
                {24: 8192, 12: 4096}.get(size, size) for size in np.load(io.BytesIO(content)).shape
            ]
            archive.writestr(name, start := npy_header(described(str(tuple(shape)))))
            archive.getinfo(name).file_size = len(start) + 4 * int(np.prod(shape))
    (lists / CONFIG).write_text('{"a": [' + "[]," * 1_000_000 + "[]]}")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, (wide, header, large, lists))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    used, messages = zip(
        *(line.split(maxsplit=1) for line in done.stdout.splitlines()[1:]), strict=True
    )
    assert "does not hold the tower" in messages[0]
    assert "EOF: reading array header" in messages[1]
    assert "more than 100 times as many, which no weights have" in messages[2]
    assert max(map(int, used[:3])) < 100
    assert int(used[3]) < 200

"""Damaged and malicious `.npz` files."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from siglip_port import CheckpointError, SigLipVisionModel
from siglip_port.checkpoint.formats import (
    UnreadableFileError,
    read_header,
)
from tests.helpers.checkpoints import ODD
from tests.helpers.damaged_files import Payload, assert_loads, assert_refused
from tests.helpers.flax import flax, write_npz
from tests.helpers.npz_files import BIAS, Members, describe_array, npy, npy_header, write_zip

load = SigLipVisionModel.from_hf

MEMBERS: dict[str, tuple[bytes, str]] = {
    "pickle": (b"", "expected one of F64, F32, F16, BF16, got a pickle"),
    "empty": (b"", "EOF: reading magic string"),
    "no magic": (b"0" * 200, "the magic string is not correct"),
    "negative": (
        npy_header(describe_array("(-24,)")) + b"\0" * 96,
        r"has invalid shape \(-24,\)",
    ),
    "enormous": (npy_header(describe_array(f"({10**30},)")) + b"\0" * 96, "has invalid shape"),
    "shorter than its header": (
        npy_header(describe_array("(10**9,)".replace("10**9", "1000000000"))),
        "expected 4000000.* from its header",
    ),
    "longer than its header": (
        npy(np.ones(24, np.float32)) + b"\0",
        "is 225 bytes, expected 224 from its header",
    ),
    "truncated": (npy(np.ones(24, np.float32))[:-1], "is 223 bytes, expected 224 from its header"),
    "other shape": (
        npy(np.ones(23, np.float32)),
        r"shape: expected \[24\] from the architecture, got \[23\]",
    ),
    "structured dtype": (npy(np.zeros(24, [("a", "<f4")])), "got \\[\\('a', '<f4'\\)\\]"),
    "integers": (npy(np.zeros(24, np.int32)), "got int32"),
    "bool in shape": (
        npy_header(describe_array("(True, 24)")) + b"\0" * 96,
        "has invalid shape",
    ),
    "Python 2": (
        npy_header(describe_array("(24L,)")) + b"\0" * 96,
        "is not a valid npz file .Reading `.npy` or `.npz` file required",
    ),
    "4 GB header": (
        b"\x93NUMPY\2\0\xff\xff\xff\xff" + b" " * 999,
        "EOF: reading array header",
    ),
    "deep": (npy_header(describe_array("(" * 5000 + ")" * 5000), b"\2\0"), "not a valid npz file"),
    "code": (npy_header("__import__('os').mkdir('unpickled')\n"), "not a valid npz file"),
}


@pytest.mark.parametrize("case", MEMBERS)
def test_invalid_arrays(
    case: str, members: Members, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content, message = MEMBERS[case]
    if case == "pickle":
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
    for compression in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        write_zip(path, members, compression)
        assert_refused(path, "has a compression method that NumPy does not use")
    write_zip(path, {**members, BIAS.replace("bias", "sole"): members[BIAS]})
    path.write_bytes(path.read_bytes().replace(b"sole.npy", b"bias.npy"))
    assert_refused(path, f"{BIAS.removesuffix('.npy')} occurs more than once")
    write_zip(path, {**members, "../params/img/x.npy": members[BIAS]})
    assert_loads(path, model)  # not a path, but the name of an ignored tensor
    write_zip(path, {**members, "params/img/../x.npy": members[BIAS]})
    assert_refused(path, "unexpected tensors")


def test_encrypted_array(members: Members, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_zip(path, {BIAS: members[BIAS]})
    content = bytearray(path.read_bytes())
    content[6] |= 1  # in the member's header and in the directory
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    assert_refused(path, "is encrypted")


def test_changed_bytes(members: Members, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_zip(path, members, zipfile.ZIP_STORED)
    name = "params/img/embedding/kernel.npy"
    content = path.read_bytes()
    path.write_bytes(content.replace(members[name][-96:], bytes(96)))
    assert_refused(
        path, "tensor params/img/embedding/kernel is damaged .Bad CRC-32.*; download the file again"
    )


def test_damaged_archive_start(tmp_path: Path) -> None:
    """Python's zipfile checks only the directory at the end."""
    path = tmp_path / "encoder.npz"
    np.savez(path, weight=np.ones(3, np.float32))
    assert read_header(path).tensors.keys() == {"weight"}
    content = path.read_bytes()
    path.write_bytes(content[:2] + b"?" + content[3:])
    with pytest.raises(UnreadableFileError, match=r"^not a zip archive$"):
        read_header(path)


def test_truncated_archive(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(
        CheckpointError, match=r"a.npz is not a valid npz file .* download it again"
    ):
        load(tmp_path / "a.npz")


@pytest.mark.parametrize("damage", ["data", "header", "before"])
def test_damaged_member(damage: str, tmp_path: Path) -> None:
    config = replace(ODD, image_size=42, num_encoder_blocks=1)
    path = tmp_path / "a.npz"
    write_npz(path, flax(config, SigLipVisionModel(config).state_dict(), scanned=True), "img/")
    content = bytearray(path.read_bytes())
    position = content.index(b"Transformer/encoder_norm/scale.npy")
    if damage == "before":
        content[:0] = b"shell script"
        content[-200:] = bytes(200)
    else:
        position = content.index(b"NUMPY", position) + (200 if damage == "data" else -1)
        content[position] ^= 255
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"a.npz.*(download it again|download the file again)"
    ):
        load(path)

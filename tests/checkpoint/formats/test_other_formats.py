"""What is no safetensors or `.npz` file at all."""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from siglip_port.checkpoint.source import WEIGHTS
from tests.helpers.damaged_files import Payload, assert_refused


def zipped(payload: Payload) -> bytes:
    file = io.BytesIO()
    torch.save({"a": payload}, file)
    return file.getvalue()


PICKLED = (
    "a pickle, which is refused.*; to load a pickle can run any code. "
    "Where you trust its origin, transformers'"
)


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
    "JSON": (lambda _: b'{"error": "not authorized"}', "it is JSON, as an error brings"),
    "LFS": (
        lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "a pointer of Git LFS.*git lfs pull",
    ),
    "GGUF": (lambda _: b"GGUF\3\0\0\0" + b"\0" * 99, "it is a GGUF file"),
    "gzip": (lambda _: b"\x1f\x8b\x08\0" + b"\0" * 99, "compressed by gzip.*; unpack it first"),
    "HDF5": (lambda _: b"\x89HDF\r\n\x1a\n" + b"\0" * 99, "it is an HDF5 file"),
    "one array": (lambda _: b"\x93NUMPY\1\0" + b"\0" * 99, "it is a single array of numpy"),
    "noise": (lambda _: bytes(range(200, 255)) * 9, "damaged or of another format: fetch it again"),
    "pickle, protocol 2": (functools.partial(pickle.dumps, protocol=2), PICKLED),
    "pickle, protocol 3": (functools.partial(pickle.dumps, protocol=3), PICKLED),
    "pickle, protocol 4": (functools.partial(pickle.dumps, protocol=4), PICKLED),
    "pickle, protocol 5": (functools.partial(pickle.dumps, protocol=5), PICKLED),
    "pickle, protocol 0": (
        lambda payload: pickle.dumps(payload, protocol=0),
        "damaged or of another format",
    ),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("case", OTHERS)
def test_other_formats(case: str, suffix: str, copied: Path, tmp_path: Path) -> None:
    """And nothing is unpickled."""
    make, message = OTHERS[case]
    if suffix == ".npz":
        message = {"torch.save": PICKLED, "nothing": "not a zip", "seven bytes": "not a zip"}.get(
            case, message
        )
    (copied / WEIGHTS).unlink()
    path = copied / f"model{suffix}"
    path.write_bytes(make(Payload(tmp_path / "unpickled")))
    assert_refused(path if suffix == ".npz" else copied, message)
    assert not (tmp_path / "unpickled").exists()

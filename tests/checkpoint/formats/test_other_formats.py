"""Files in other formats under the names of weights files."""

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


def zip_payload(payload: Payload) -> bytes:
    file = io.BytesIO()
    torch.save({"a": payload}, file)
    return file.getvalue()


PICKLED = (
    "found a pickle.*; pickles are refused: loading a pickle can run arbitrary code; if you trust "
    "the source, convert it with transformers: "
)


OTHERS: dict[str, tuple[Callable[[Payload], bytes], str]] = {
    "empty": (lambda _: b"", "file is empty"),
    "seven bytes": (lambda _: b"\0" * 7, "header is 7 bytes, file is 7"),
    "torch.save": (
        zip_payload,
        r"found a zip archive, such as a torch\.save pickle or an \.npz file.*arbitrary code",
    ),
    "HTML page": (
        lambda _: b"\n<!DOCTYPE html><html>Log in",
        "found a web page, such as a login or error page.*; download it again, l",
    ),
    "XML": (
        lambda _: b'<?xml version="1.0"?><Error>',
        "found a web page, such as a login or error page",
    ),
    "JSON": (lambda _: b'{"error": "not authorized"}', "found JSON, such as an error response"),
    "LFS": (
        lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "found a Git LFS pointer.*git lfs pull",
    ),
    "GGUF": (lambda _: b"GGUF\3\0\0\0" + b"\0" * 99, "found a GGUF file"),
    "gzip": (
        lambda _: b"\x1f\x8b\x08\0" + b"\0" * 99,
        "found gzip-compressed data.*; decompress it first",
    ),
    "HDF5": (lambda _: b"\x89HDF\r\n\x1a\n" + b"\0" * 99, "found an HDF5 file"),
    "one array": (lambda _: b"\x93NUMPY\1\0" + b"\0" * 99, "found a single NumPy array"),
    "noise": (
        lambda _: bytes(range(200, 255)) * 9,
        "(header is [0-9]+ bytes, file is 495|not a zip archive)[)]; download it again",
    ),
    "pickle, protocol 2": (functools.partial(pickle.dumps, protocol=2), PICKLED),
    "pickle, protocol 3": (functools.partial(pickle.dumps, protocol=3), PICKLED),
    "pickle, protocol 4": (functools.partial(pickle.dumps, protocol=4), PICKLED),
    "pickle, protocol 5": (functools.partial(pickle.dumps, protocol=5), PICKLED),
    "pickle, protocol 0": (
        lambda payload: pickle.dumps(payload, protocol=0),
        "(header is [0-9]+ bytes, file is [0-9]+|not a zip archive)[)]; download it again",
    ),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("case", OTHERS)
def test_other_formats(case: str, suffix: str, encoder_copy: Path, tmp_path: Path) -> None:
    """Other formats are named in the error, and nothing is unpickled."""
    content, message = OTHERS[case]
    if suffix == ".npz":
        message = {"torch.save": PICKLED, "empty": "not a zip", "seven bytes": "not a zip"}.get(
            case, message
        )
    (encoder_copy / WEIGHTS).unlink()
    path = encoder_copy / f"model{suffix}"
    path.write_bytes(content(Payload(tmp_path / "unpickled")))
    assert_refused(path if suffix == ".npz" else encoder_copy, message)
    assert not (tmp_path / "unpickled").exists()

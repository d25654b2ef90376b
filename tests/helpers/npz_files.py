"""The arrays of an `.npz` file, byte by byte."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

Members = dict[str, bytes]
"""The contents of an archive's files by name."""

BIAS = "params/img/Transformer/encoder_norm/bias.npy"


def npy(array: np.ndarray[Any, Any]) -> bytes:
    """Return an array as numpy writes it."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npy_header(text: str, version: bytes = b"\1\0") -> bytes:
    """Return the header of an array, with any text in it."""
    length = struct.pack("<H" if version == b"\1\0" else "<I", len(text))
    return b"\x93NUMPY" + version + length + text.encode()


def describe_array(shape: str, descr: str = "'<f4'") -> str:
    """Return the text of a header."""
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


def write_zip(path: Path, members: Members, compression: int = zipfile.ZIP_DEFLATED) -> None:
    """Write an archive."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)

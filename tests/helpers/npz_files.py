"""`.npz` files written byte by byte."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

Members = dict[str, bytes]
"""Contents of an archive's members by name."""

BIAS = "params/img/Transformer/encoder_norm/bias.npy"


def npy(array: np.ndarray[Any, Any]) -> bytes:
    """Return the bytes of a `.npy` file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npy_header(text: str, version: bytes = b"\1\0") -> bytes:
    """Return the header of a `.npy` file with this text."""
    length = struct.pack("<H" if version == b"\1\0" else "<I", len(text))
    return b"\x93NUMPY" + version + length + text.encode()


def describe_array(shape: str, descr: str = "'<f4'") -> str:
    """Return the text of a `.npy` header."""
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


def write_zip(path: Path, members: Members, compression: int = zipfile.ZIP_DEFLATED) -> None:
    """Write a zip archive."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)

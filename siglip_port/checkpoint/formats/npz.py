"""The `.npz` files of big_vision: zip archives of NumPy arrays, read without unpickling."""

from __future__ import annotations

import io
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from siglip_port.checkpoint.formats.headers import (
    Header,
    OtherFormatError,
    TensorInfo,
    count_elements,
)
from siglip_port.checkpoint.formats.other_formats import PICKLE, refuse_other_formats

MAX_MEMBERS = 100_000  # per archive; files of big_vision have hundreds
MAX_ARRAY_HEADER_BYTES = 16_384  # NumPy's own limit is 10,000

# NumPy has no bfloat16 and stores it as two untyped bytes.
DTYPE_NAMES = {"f8": "F64", "f4": "F32", "f2": "F16", "V2": "BF16"}


def read_npz_header(path: Path) -> Header:
    """Read the headers of the arrays in an archive, without their data.

    Raises:
        OtherFormatError: The file is in another known format.
        ValueError: The archive is damaged or too large.
    """
    with path.open("rb") as file:
        first = file.read(8)
    if not first.startswith(b"PK\3\4"):  # zipfile checks only the end
        refuse_other_formats(first)
        raise ValueError("not a zip archive")
    tensors: dict[str, TensorInfo] = {}
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > MAX_MEMBERS:
            raise ValueError(f"archive has {len(members)} members, limit is {MAX_MEMBERS}")
        for member in members:
            if member.filename.endswith("data.pkl"):
                raise OtherFormatError(*PICKLE)
            if not member.filename.endswith(".npy"):
                continue
            name = member.filename.removesuffix(".npy")
            if name in tensors:
                raise ValueError(f"{name} occurs more than once")
            tensors[name] = read_array_info(archive, member)
    return Header(tensors, path.stat().st_size)


def read_array_info(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> TensorInfo:
    """Read the header of one array, at most `MAX_ARRAY_HEADER_BYTES`."""
    # Python decompresses other methods in one step, without a limit.
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{member.filename} has a compression method that NumPy does not use")
    with archive.open(member) as file:
        start = io.BytesIO(file.read(MAX_ARRAY_HEADER_BYTES))
    shape, dtype = read_shape_and_dtype(start)
    size = count_elements(member.filename, shape) * dtype.itemsize
    if dtype.hasobject:  # pickled objects are never read
        return TensorInfo(shape, "a pickle", member.file_size)
    expected = start.tell() + size
    if expected != member.file_size:
        raise ValueError(
            f"{member.filename} is {member.file_size} bytes, expected {expected} from its header"
        )
    name = "structured"
    if dtype.names is None:
        name = f"{dtype.kind}{dtype.itemsize}"
    return TensorInfo(shape, DTYPE_NAMES.get(name, str(dtype)), size)


def read_shape_and_dtype(file: io.BytesIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read the header of an array, leaving the file at the start of its data."""
    version = np.lib.format.read_magic(file)
    read_array_header = np.lib.format.read_array_header_2_0
    if version == (1, 0):
        read_array_header = np.lib.format.read_array_header_1_0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # NumPy repairs Python 2 headers with a warning
        shape, _, dtype = read_array_header(file)
    return shape, dtype


def read_array(archive: zipfile.ZipFile, name: str) -> Tensor:
    """Read one array as a tensor."""
    with archive.open(f"{name}.npy") as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    if array.dtype.kind == "V":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))

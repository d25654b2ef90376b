"""Weights files: safetensors, and the `.npz` files of big_vision. Headers first, then tensors; never a pickle."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SUFFIXES = (".safetensors", ".npz")

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes a tower may be stored and loaded in, by their names in a safetensors header."""

_NUMPY = {"f8": "F64", "f4": "F32", "f2": "F16", "V2": "BF16"}  # numpy has no bfloat16: it writes bytes without a type


class UnreadableFileError(Exception):
    """A file is not whole, or not of the format that its name says."""


@dataclass(frozen=True)
class Stored:
    """A tensor as the header of its file describes it.

    Attributes:
        shape: as it is stored.
        dtype: its name in a safetensors header, such as `F32`.
        nbytes: its size in the file.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int


def read_header(path: Path) -> dict[str, Stored]:
    """Reads which tensors a file holds, and no tensor.

    Raises:
        OSError: the file cannot be read.
        UnreadableFileError: it is damaged, or of another format.
    """
    with path.open("rb"), _readable():  # to open it says best what forbids it
        if path.suffix == ".npz":
            return _npz_header(path)
        return {name: stored for name, (stored, _) in _safetensors_header(path).items()}


def _safetensors_header(path: Path) -> dict[str, tuple[Stored, int]]:
    """Reads the header alone, and where in the file each tensor begins.

    safetensors' own reader maps the whole file first, which fails for files larger than memory.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size - 8:
            raise ValueError(f"its header is said to have {length} bytes, the file has {size}")
        content = json.loads(file.read(length))
    found = {}
    for name, tensor in content.items():
        if name != "__metadata__":
            shape, (begin, end) = tuple(tensor["shape"]), tensor["data_offsets"]
            stored = Stored(shape, tensor["dtype"], nbytes(shape, tensor["dtype"]))
            if begin < 0 or end - begin != stored.nbytes:
                raise ValueError(f"{name} is said to have {end - begin} bytes, its shape asks for {stored.nbytes}")
            found[name] = stored, 8 + length + begin
    end = max((at + stored.nbytes for stored, at in found.values()), default=size)
    if end != size:
        raise ValueError(f"its tensors take {end} bytes, the file has {size}")
    return found


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # safetensors', and of zip files those of zipfile, zlib, struct and numpy
        raise UnreadableFileError(f"{error or type(error).__name__}") from error


def nbytes(shape: tuple[int, ...], dtype: str) -> int:
    """The size of a tensor in a file, by the number of bits in the name of its dtype (`I64`, `F8_E4M3`)."""
    bits = int("".join(c for c in dtype.split("_")[0] if c.isdigit()) or 8)
    return int(np.prod(shape, dtype=object)) * bits // 8


@contextmanager
def open_tensors(path: Path) -> Iterator[Callable[[str], Tensor]]:
    """Opens a file; gives a function that reads a tensor by name. Of safetensors, it is mapped, not copied.

    Raises:
        UnreadableFileError: of the function: the tensor is damaged.
    """
    with contextlib.ExitStack() as stack:
        if path.suffix == ".npz":
            with _readable():
                get = functools.partial(_npz_tensor, stack.enter_context(zipfile.ZipFile(path)))
        else:
            try:
                get = stack.enter_context(safe_open(path, framework="pt")).get_tensor
            except (OSError, RuntimeError, SafetensorError):  # too large to be mapped as a whole
                with _readable():
                    get = functools.partial(_safetensors_tensor, path, _safetensors_header(path))

        def read(name: str) -> Tensor:
            with _readable():
                tensor: Tensor = get(name)
                return tensor

        yield read


def _safetensors_tensor(path: Path, header: Mapping[str, tuple[Stored, int]], name: str) -> Tensor:
    stored, at = header[name]
    with path.open("rb") as file:
        file.seek(at)
        content = bytearray(file.read(stored.nbytes))
    return torch.frombuffer(content, dtype=DTYPES[stored.dtype]).reshape(stored.shape)


def _npz_tensor(archive: zipfile.ZipFile, name: str) -> Tensor:
    with archive.open(f"{name}.npy") as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    if array.dtype.kind == "V":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _npz_header(path: Path) -> dict[str, Stored]:
    header = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            if not member.endswith(".npy"):
                continue
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
            name = f"{dtype.kind}{dtype.itemsize}" if dtype.names is None else "structured"
            size = int(np.prod(shape, dtype=object)) * dtype.itemsize
            header[member.removesuffix(".npy")] = Stored(shape, _NUMPY.get(name, str(dtype)), size)
    return header

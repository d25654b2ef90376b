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
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SUFFIXES = (".safetensors", ".npz")

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes a tower may be stored and loaded in, by their names in a safetensors header."""

LONGEST_JSON = 25_000_000
"""Bytes of a header, an index or a configuration: the limit of huggingface_hub, far above any that is known."""

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


@dataclass(frozen=True)
class Header:
    """What a weights file says of itself.

    Attributes:
        tensors: by name.
        size: of the whole file, in bytes.
        begins: where in the file each tensor begins; empty for `.npz` files, whose tensors may be compressed.
        metadata: what else the file says, text by name; the `__metadata__` of safetensors.
    """

    tensors: Mapping[str, Stored]
    size: int
    begins: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_header(path: Path) -> Header:
    """Reads which tensors a file holds, and no tensor.

    Raises:
        OSError: the file cannot be read.
        UnreadableFileError: it is damaged, or of another format.
    """
    with path.open("rb") as file, readable():  # to open it says best what forbids it
        if path.suffix == ".npz":
            return _npz_header(path)
        # safetensors' own reader maps the whole file first, which fails for files larger than memory.
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        return parse_header(file.read(header_length(file.read(8), size)), size)


def header_length(first: bytes, size: int) -> int:
    """Returns how many bytes of JSON follow the first 8 bytes of a safetensors file.

    Args:
        first: these 8 bytes.
        size: of the whole file.

    Raises:
        ValueError: there cannot be as many, or more than anybody needs.
    """
    if len(first) < 8:
        raise ValueError(f"it has {size} bytes, too few for a header")
    (length,) = struct.unpack("<Q", first)
    if length > min(size - 8, LONGEST_JSON):
        raise ValueError(f"its header is said to have {length} bytes, the file has {size}")
    return int(length)


def parse_header(content: bytes, size: int) -> Header:
    """Understands the JSON at the beginning of a safetensors file.

    Args:
        content: the JSON.
        size: of the whole file.

    Raises:
        ValueError: it describes no file of this size.
    """
    found = json.loads(content)
    first = 8 + len(content)
    metadata = found.pop("__metadata__", {})
    tensors, begins = {}, {}
    for name, tensor in found.items():
        shape, (begin, end) = tuple(tensor["shape"]), tensor["data_offsets"]
        stored = Stored(shape, tensor["dtype"], nbytes(shape, tensor["dtype"]))
        if begin < 0 or end - begin != stored.nbytes:
            raise ValueError(f"{name} is said to have {end - begin} bytes, its shape asks for {stored.nbytes}")
        tensors[name], begins[name] = stored, first + begin
    last = max((begins[name] + stored.nbytes for name, stored in tensors.items()), default=size)
    if last != size:
        raise ValueError(f"its tensors take {last} bytes, the file has {size}")
    return Header(tensors, size, begins, metadata)


@contextmanager
def readable() -> Iterator[None]:
    """Turns whatever a damaged file does to its reader into an `UnreadableFileError`."""
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
            with readable():
                get = functools.partial(_npz_tensor, stack.enter_context(zipfile.ZipFile(path)))
        else:
            try:
                get = stack.enter_context(safe_open(path, framework="pt")).get_tensor
            except (OSError, RuntimeError, SafetensorError):  # too large to be mapped as a whole
                with readable():
                    get = functools.partial(_safetensors_tensor, path, read_header(path))

        def read(name: str) -> Tensor:
            with readable():
                tensor: Tensor = get(name)
                return tensor

        yield read


def _safetensors_tensor(path: Path, header: Header, name: str) -> Tensor:
    stored = header.tensors[name]
    with path.open("rb") as file:
        file.seek(header.begins[name])
        content = bytearray(file.read(stored.nbytes))
    return torch.frombuffer(content, dtype=DTYPES[stored.dtype]).reshape(stored.shape)


def _npz_tensor(archive: zipfile.ZipFile, name: str) -> Tensor:
    with archive.open(f"{name}.npy") as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    if array.dtype.kind == "V":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _npz_header(path: Path) -> Header:
    tensors = {}
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
            tensors[member.removesuffix(".npy")] = Stored(shape, _NUMPY.get(name, str(dtype)), size)
    return Header(tensors, path.stat().st_size)

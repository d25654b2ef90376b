"""Reading one weights file, safetensors or `.npz`: its header and its tensors."""

from __future__ import annotations

import contextlib
import functools
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from siglip_port.checkpoint.formats.headers import DTYPES, Header, UnreadableFileError
from siglip_port.checkpoint.formats.npz import read_array, read_npz_header
from siglip_port.checkpoint.formats.safetensors_header import header_length, parse_header

SUFFIXES = (".safetensors", ".npz")


def read_header(path: Path) -> Header:
    """Read the header of a file, without its tensors.

    Raises:
        OSError: The file cannot be opened.
        UnreadableFileError: The file is damaged or in another format.
    """
    with path.open("rb") as file, readable():  # an OSError of open() passes unchanged
        if path.suffix == ".npz":
            return read_npz_header(path)
        # safetensors' own reader maps the whole file, which fails for files larger than memory.
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        length = header_length(file.read(8), size)
        return parse_header(file.read(length), size)


@contextmanager
def open_tensors(path: Path) -> Iterator[Callable[[str], Tensor]]:
    """Open a file and return a function that reads a tensor by name.

    Tensors of safetensors files are memory-mapped. The function raises `UnreadableFileError` if the
    tensor is damaged.
    """
    with contextlib.ExitStack() as stack:
        get_tensor = open_reader(path, stack)

        def read_tensor(name: str) -> Tensor:
            with readable():
                return get_tensor(name)

        yield read_tensor


def open_reader(path: Path, stack: contextlib.ExitStack) -> Callable[[str], Tensor]:
    """Open a file, closed by `stack`, and return a function that reads a tensor by name."""
    if path.suffix == ".npz":
        with readable():
            archive = stack.enter_context(zipfile.ZipFile(path))
        return functools.partial(read_array, archive)
    try:
        file = stack.enter_context(safe_open(path, framework="pt"))
    except (OSError, RuntimeError, SafetensorError):  # too large to map
        with readable():
            return functools.partial(read_unmapped, path, read_header(path))
    get_tensor: Callable[[str], Tensor] = file.get_tensor
    return get_tensor


def read_unmapped(path: Path, header: Header, name: str) -> Tensor:
    """Read one tensor of a safetensors file into memory."""
    info = header.tensors[name]
    with path.open("rb") as file:
        file.seek(header.offsets[name])
        content = bytearray(file.read(info.nbytes))
    return torch.frombuffer(content, dtype=DTYPES[info.dtype]).reshape(info.shape)


@contextmanager
def readable() -> Iterator[None]:
    """Convert any error of reading a damaged file to `UnreadableFileError`."""
    try:
        yield
    except UnreadableFileError:
        raise
    except Exception as error:
        # from safetensors, or from zipfile, zlib, struct and NumPy
        raise UnreadableFileError(f"{error or type(error).__name__}") from error

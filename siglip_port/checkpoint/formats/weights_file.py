"""One weights file of either format: its header, then its tensors."""

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
    """Read which tensors a file holds, and no tensor.

    Raises:
        OSError: the file cannot be read.
        UnreadableFileError: it is damaged, or of another format.
    """
    with path.open("rb") as file, readable():  # to open it says best what forbids it
        if path.suffix == ".npz":
            return read_npz_header(path)
        # safetensors' own reader maps the whole file first, which fails for files larger than
        # memory.
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        length = header_length(file.read(8), size)
        return parse_header(file.read(length), size)


@contextmanager
def open_tensors(path: Path) -> Iterator[Callable[[str], Tensor]]:
    """Open a file; give a function that reads a tensor by name.

    Of safetensors, it is mapped, not copied.

    Raises:
        UnreadableFileError: of the function: the tensor is damaged.
    """
    with contextlib.ExitStack() as stack:
        get_tensor = open_reader(path, stack)

        def read_tensor(name: str) -> Tensor:
            with readable():
                return get_tensor(name)

        yield read_tensor


def open_reader(path: Path, stack: contextlib.ExitStack) -> Callable[[str], Tensor]:
    """Open a file, to be closed with `stack`; return what reads a tensor by name."""
    if path.suffix == ".npz":
        with readable():
            archive = stack.enter_context(zipfile.ZipFile(path))
        return functools.partial(read_array, archive)
    try:
        file = stack.enter_context(safe_open(path, framework="pt"))
    except (OSError, RuntimeError, SafetensorError):  # too large to be mapped as a whole
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
    """Turn whatever a damaged file does to its reader into an `UnreadableFileError`."""
    try:
        yield
    except UnreadableFileError:
        raise
    except Exception as error:
        # safetensors' own, and of zip files those of zipfile, zlib, struct and numpy
        raise UnreadableFileError(f"{error or type(error).__name__}") from error

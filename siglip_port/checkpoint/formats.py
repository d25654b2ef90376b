"""Weights files: safetensors, and the `.npz` files of big_vision. Headers first, then tensors.

Never a pickle.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import math
import os
import re
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SUFFIXES = (".safetensors", ".npz")

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes a tower may be stored and loaded in, by their names in a safetensors header."""

LONGEST_JSON = 25_000_000
"""Bytes of a header, an index or a configuration.

The limit of huggingface_hub, far above any that is known.
"""

MOST_UNPACKED = 100
"""How many times larger than its file a tower may be. Weights hardly compress.

What does is made to fill the memory.
"""

PICKLES_REFUSED = (
    "to load a pickle can run any code. Where you trust its origin, transformers' "
    "`SiglipVisionModel.from_pretrained(SOURCE).save_pretrained(FOLDER)` makes safetensors of it"
)

_DEEPEST_JSON = (
    100  # objects and lists inside each other; Rust's own reader of safetensors allows 127
)
_MOST_DIMENSIONS = 64  # torch's own limit
_MOST_MEMBERS = 100_000  # of an archive; those of big_vision have hundreds
_LONGEST_NPY = 16_384  # bytes of the header of an array in an archive; numpy's own limit is 10,000

_NUMPY = {
    "f8": "F64",
    "f4": "F32",
    "f2": "F16",
    "V2": "BF16",
}  # numpy has no bfloat16: it writes bytes without a type

_PICKLE = ("a pickle, which is refused", PICKLES_REFUSED)
_ARCHIVE = (
    "a zip archive: a pickle of torch.save, which is refused, or an .npz file",
    PICKLES_REFUSED,
)
_PAGE = (
    "a web page, as a login or an error brings",
    "fetch it again, logged in where that is needed",
)
# What else is found under the names of weights files, by its first bytes, in small letters: what it
# is, what to do.
_OTHERS = {
    b"pk\x03\x04": _ARCHIVE,
    **{bytes((0x80, protocol)): _PICKLE for protocol in range(2, 6)},
    b"<!docty": _PAGE,
    b"<html": _PAGE,
    b"<?xml": _PAGE,
    b"{": ("JSON, as an error brings", "fetch it again"),
    b"version ": (
        "a pointer of Git LFS in the place of the file",
        "fetch the file itself: git lfs pull",
    ),
    b"gguf": ("a GGUF file", "pass the safetensors that it was made from"),
    b"\x89hdf": ("an HDF5 file", "pass the checkpoint's safetensors"),
    b"\x93numpy": ("a single array of numpy", "pass an .npz or .safetensors file"),
    b"\x1f\x8b": ("compressed by gzip", "unpack it first"),
}


class UnreadableFileError(Exception):
    """A file is not whole, or not of the format that its name says.

    Attributes:
        advice: what to do, for messages.
    """

    advice = "it is damaged or of another format: fetch it again"


class OtherFormatError(UnreadableFileError):
    """A file is of another format than its name says, and of which one is known."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"it is {what}")
        self.advice = advice


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
        begins: where in the file each tensor begins; empty for `.npz` files, whose tensors may be
            compressed.
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
        # safetensors' own reader maps the whole file first, which fails for files larger than
        # memory.
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        return parse_header(file.read(header_length(file.read(8), size)), size)


def header_length(first: bytes, size: int) -> int:
    """Returns how many bytes of JSON follow the first 8 bytes of a safetensors file.

    Args:
        first: these 8 bytes.
        size: of the whole file.

    Raises:
        OtherFormatError: they are the first of a file of another format.
        ValueError: there cannot be as many, or more than anybody needs.
    """
    if not first:
        raise ValueError("it is empty")
    # What is long enough to be the length of a header is one, whatever else begins like it.
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
    if length > min(size - 8, LONGEST_JSON):
        _refuse_others(first)
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
    found = parse_json(content)
    if not isinstance(found, dict):
        raise ValueError("its header is no JSON object")
    metadata = found.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(
        isinstance(text, str) for text in metadata.values()
    ):
        raise ValueError("its __metadata__ must be texts by name")
    places = {name: _place_of(name, tensor) for name, tensor in found.items()}
    first, at = 8 + len(content), 0
    for name, (stored, begin) in sorted(
        places.items(), key=lambda item: (item[1][1], item[1][0].nbytes)
    ):
        if begin != at:
            raise ValueError(
                f"{name} is said to begin at {begin}, but the tensors before it end at {at}"
            )
        at += stored.nbytes
    if first + at != size:
        raise ValueError(f"its tensors take {first + at} bytes, the file has {size}")
    tensors = {name: stored for name, (stored, _) in places.items()}
    return Header(
        tensors, size, {name: first + begin for name, (_, begin) in places.items()}, metadata
    )


def parse_json(content: bytes) -> Any:  # noqa: ANN401 (whatever it says)
    """Reads JSON strictly: in UTF-8, no name twice in one object, and no deeper than anybody needs.

    Raises:
        ValueError: it is no such JSON.
    """
    try:
        found = json.loads(content.decode(), object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("its lists and objects lie too deep inside each other") from error
    level, depth = [found], 0
    while level:
        for text in level:
            if isinstance(text, str):
                text.encode()  # fails where it is half a character, which nobody could print
        depth += 1
        if depth > _DEEPEST_JSON:
            raise ValueError(
                f"its lists and objects lie more than {_DEEPEST_JSON} deep inside each other"
            )
        level = [
            part for whole in level if isinstance(whole, (dict, list)) for part in _parts(whole)
        ]
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a dict of an object.

    Python's own reader keeps the last of several values, others the first.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"it says {name!r} more than once")
    return found


def _parts(whole: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return whole if isinstance(whole, list) else itertools.chain(whole, whole.values())


def _place_of(name: str, tensor: object) -> tuple[Stored, int]:
    """Understands what a header says of one tensor.

    What it is, and where it begins after the header.
    """
    if not isinstance(tensor, dict) or tensor.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} must have a dtype, a shape and data_offsets, and nothing else")
    dtype, shape, offsets = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
    if (
        not isinstance(dtype, str)
        or not isinstance(shape, list)
        or not isinstance(offsets, list)
        or len(offsets) != 2
    ):
        raise ValueError(
            f"{name} must have a dtype, a shape and two data_offsets, found {str(tensor)[:200]}"
        )
    count, (begin, end) = _count(name, shape), offsets
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
        raise ValueError(f"{name} is said to lie from {begin!r} to {end!r}")
    # A dtype that is unknown here says nothing of its size; such a tensor is never read.
    bits = re.fullmatch(r"BOOL|B?[FIUC](\d{1,3})(_\w+)?", dtype)
    if bits and (end - begin) * 8 != count * int(bits[1] or 8):
        raise ValueError(
            f"{name} is said to have {end - begin} bytes, which {dtype} of shape {shape} has not"
        )
    return Stored(tuple(shape), dtype, end - begin), begin


def _count(name: str, shape: Collection[object]) -> int:
    """The number of elements, where a tensor can have this shape at all."""
    sizes = [size for size in shape if type(size) is int and size >= 0]  # True is an int, too
    if (
        len(sizes) < len(shape)
        or len(sizes) > _MOST_DIMENSIONS
        or math.prod(size or 1 for size in sizes) >= 2**63
    ):
        raise ValueError(
            f"{name} is said to have the shape {str(shape)[:200]}, which no tensor has"
        )
    return math.prod(sizes)


def _refuse_others(first: bytes) -> None:
    start = first.lstrip().lower()
    for begins, (what, advice) in _OTHERS.items():
        if start.startswith(begins):
            raise OtherFormatError(what, advice)


@contextmanager
def readable() -> Iterator[None]:
    """Turns whatever a damaged file does to its reader into an `UnreadableFileError`."""
    try:
        yield
    except UnreadableFileError:
        raise
    except (
        Exception
    ) as error:  # safetensors', and of zip files those of zipfile, zlib, struct and numpy
        raise UnreadableFileError(f"{error or type(error).__name__}") from error


@contextmanager
def open_tensors(path: Path) -> Iterator[Callable[[str], Tensor]]:
    """Opens a file; gives a function that reads a tensor by name.

    Of safetensors, it is mapped, not copied.

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
    with path.open("rb") as file:
        if not (first := file.read(8)).startswith(
            b"PK\3\4"
        ):  # zipfile alone would be content with what comes last
            _refuse_others(first)
            raise ValueError("not a zip archive: it does not begin as one does")
    tensors: dict[str, Stored] = {}
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > _MOST_MEMBERS:
            raise ValueError(f"it holds {len(members)} files, and at most {_MOST_MEMBERS} are read")
        for member in members:
            if member.filename.endswith("data.pkl"):
                raise OtherFormatError(*_PICKLE)
            if not member.filename.endswith(".npy"):
                continue
            if (name := member.filename.removesuffix(".npy")) in tensors:
                raise ValueError(f"it holds {name} more than once")
            tensors[name] = _npy_header(archive, member)
    return Header(tensors, path.stat().st_size)


def _npy_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Stored:
    """Reads the header of one array, and no more of it, however much it says that there is."""
    if member.compress_type not in (
        zipfile.ZIP_STORED,
        zipfile.ZIP_DEFLATED,
    ):  # of others, Python unpacks all at once
        raise ValueError(f"{member.filename} is compressed as numpy does not compress")
    with archive.open(member) as file:
        start = io.BytesIO(file.read(_LONGEST_NPY))
    version = np.lib.format.read_magic(start)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy mends, with a warning, what Python 2 wrote
        shape, _, dtype = read(start)
    size = _count(member.filename, shape) * dtype.itemsize
    if dtype.hasobject:  # it is never read
        return Stored(shape, "a pickle", member.file_size)
    if start.tell() + size != member.file_size:
        raise ValueError(
            f"{member.filename} has {member.file_size} bytes, its header asks for "
            f"{start.tell() + size}"
        )
    name = f"{dtype.kind}{dtype.itemsize}" if dtype.names is None else "structured"
    return Stored(shape, _NUMPY.get(name, str(dtype)), size)

"""Headers of weights files, and the errors of unreadable files."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Supported dtypes of stored and loaded models, by their names in a safetensors header."""

MAX_DIMENSIONS = 64  # torch's own limit


class UnreadableFileError(Exception):
    """A file is damaged, or not in the format of its suffix.

    Attributes:
        advice: What to do, for messages.
    """

    advice = "download it again"


class OtherFormatError(UnreadableFileError):
    """A file is in a known format other than that of its suffix."""

    def __init__(self, file_format: str, advice: str) -> None:
        super().__init__(f"found {file_format}")
        self.advice = advice


@dataclass(frozen=True)
class TensorInfo:
    """Description of a stored tensor, from the header of its file.

    Attributes:
        shape: Stored shape.
        dtype: Name in a safetensors header, such as `F32`.
        nbytes: Size in bytes, uncompressed.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class Header:
    """Header of a weights file.

    Attributes:
        tensors: Tensors by name.
        size: Size of the file in bytes.
        offsets: Position of each tensor in the file; empty for `.npz` files, whose tensors may be
            compressed.
        metadata: The `__metadata__` of a safetensors file; empty for `.npz` files.
    """

    tensors: Mapping[str, TensorInfo]
    size: int
    offsets: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


def count_elements(name: str, shape: Collection[object]) -> int:
    """Return the number of elements of a tensor of this shape.

    Raises:
        ValueError: The shape is invalid.
    """
    sizes = [size for size in shape if type(size) is int and size >= 0]  # bool is a subclass of int
    is_too_large = math.prod(size or 1 for size in sizes) >= 2**63
    if len(sizes) < len(shape) or len(sizes) > MAX_DIMENSIONS or is_too_large:
        raise ValueError(f"{name} has invalid shape {str(shape)[:200]}")
    return math.prod(sizes)

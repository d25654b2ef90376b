"""What the header of a weights file says, and the errors of a file that cannot be read."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes a model may be stored and loaded in, by their names in a safetensors header."""

MAX_DIMENSIONS = 64  # torch's own limit


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
class TensorInfo:
    """A stored tensor as the header of its file describes it.

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
        offsets: where in the file each tensor begins; empty for `.npz` files, whose tensors may be
            compressed.
        metadata: what else the file says, text by name; the `__metadata__` of safetensors.
    """

    tensors: Mapping[str, TensorInfo]
    size: int
    offsets: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


def count_elements(name: str, shape: Collection[object]) -> int:
    """Return the number of elements of a tensor of this shape.

    Raises:
        ValueError: no tensor can have this shape.
    """
    sizes = [size for size in shape if type(size) is int and size >= 0]  # True is an int, too
    is_too_large = math.prod(size or 1 for size in sizes) >= 2**63
    if len(sizes) < len(shape) or len(sizes) > MAX_DIMENSIONS or is_too_large:
        raise ValueError(
            f"{name} is said to have the shape {str(shape)[:200]}, which no tensor has"
        )
    return math.prod(sizes)

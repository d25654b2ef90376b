"""A guess at a bug, and whether it is right."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from siglip_port.parity.metrics import relative_error

MATCH = 1e-8
"""How near a guess must come to the port's values, as a relative error."""

NARROW_DTYPES = (torch.bfloat16, torch.float16)

Guess = tuple[str, Tensor]
"""What a bug is called, and what the reference's numbers would be with it."""


def matches(candidate: Tensor, value: Tensor) -> bool:
    """Whether a guess gives the port's values."""
    return relative_error(candidate, value) < MATCH


def first_match(guesses: Iterable[Guess], value: Tensor) -> str:
    """The name of the first guess that gives the port's values; empty if none does."""
    for label, candidate in guesses:
        if candidate.shape == value.shape and matches(candidate, value):
            return label
    return ""


def round_to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to a dtype and back."""
    return tensor.to(dtype).to(tensor.dtype)

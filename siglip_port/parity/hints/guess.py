"""Guesses at a bug, and the test whether one is right."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from siglip_port.parity.metrics import relative_error

MATCH = 1e-8
"""Largest relative error between a guess and the port's values."""

NARROW_DTYPES = (torch.bfloat16, torch.float16)

Guess = tuple[str, Tensor]
"""Name of a bug, and the reference's values with that bug."""


def matches(candidate: Tensor, value: Tensor) -> bool:
    """Return whether a guess reproduces the port's values."""
    return relative_error(candidate, value) < MATCH


def first_match(guesses: Iterable[Guess], value: Tensor) -> str:
    """Return the name of the first guess that reproduces the port's values; empty if none does."""
    for label, candidate in guesses:
        if candidate.shape == value.shape and matches(candidate, value):
            return label
    return ""


def round_to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to a dtype and back."""
    return tensor.to(dtype).to(tensor.dtype)

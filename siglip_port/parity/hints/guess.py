"""Guesses at a bug, and the test whether one is right."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from siglip_port.parity.metrics import relative_error

MATCH = 1e-8
"""Largest relative error between a guess and the port's values."""

MAX_REST = 0.05
"""Largest part of a difference that a hint may leave unexplained."""

NARROW_DTYPES = (torch.bfloat16, torch.float16)

Guess = tuple[str, Tensor]
"""Name of a bug, and the reference's values with that bug."""


def matches(candidate: Tensor, value: Tensor) -> bool:
    """Return whether a guess reproduces the port's values."""
    return relative_error(candidate, value) < MATCH


def explains(candidate: Tensor, value: Tensor, exact: Tensor) -> bool:
    """Return whether a guess reproduces the port's values, and nearly all of their difference.

    Args:
        candidate: The reference's values with a bug.
        value: The port's values.
        exact: The reference's values.
    """
    if not matches(candidate, value):
        return False
    rest = (candidate.double() - value.double()).norm()
    difference = (exact.double() - value.double()).norm()
    return bool(rest <= MAX_REST * difference) and bool(difference > 0)


def first_match(guesses: Iterable[Guess], value: Tensor, exact: Tensor) -> str:
    """Return the name of the first guess that explains the port's values; empty if none does."""
    for label, candidate in guesses:
        if candidate.shape == value.shape and explains(candidate, value, exact):
            return label
    return ""


def round_to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to a dtype and back."""
    return tensor.to(dtype).to(tensor.dtype)

"""Inputs of a module: tensors in any structure of tuples, lists and mappings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""Inputs of a module: a tensor, positional arguments, or keyword arguments."""

MapTensor = Callable[[Tensor], Tensor]


def map_tensors(inputs: Inputs, function: MapTensor, *, only_floating_point: bool = True) -> Inputs:
    """Apply a function to every floating point tensor in `inputs`, or to every tensor."""
    mapped: Inputs = map_value(inputs, function, only_floating_point)
    return mapped


def map_value(value: Any, function: MapTensor, only_floating_point: bool) -> Any:  # noqa: ANN401
    """Apply a function to the tensors in a value of any type."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or not only_floating_point:
            return function(value)
        return value
    if isinstance(value, Mapping):
        return {
            name: map_value(part, function, only_floating_point) for name, part in value.items()
        }
    if isinstance(value, (tuple, list)):
        parts = [map_value(part, function, only_floating_point) for part in value]
        if hasattr(value, "_fields"):  # a named tuple
            return type(value)(*parts)
        return type(value)(parts)
    return value


def tensors_in(inputs: Inputs) -> Iterator[Tensor]:
    """Yield every tensor in `inputs`, in order."""
    tensors: list[Tensor] = []

    def save(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    map_tensors(inputs, save, only_floating_point=False)
    yield from tensors


def check_inputs(inputs: object) -> Inputs:
    """Return the inputs; raise ValueError if they cannot be those of two compared modules."""
    if isinstance(inputs, list):
        raise ValueError(
            "inputs must be a tensor, a tuple of positional arguments or a dict of keyword "
            "arguments, got a list; pass tuple(inputs)"
        )
    if not isinstance(inputs, (Tensor, tuple, Mapping)):
        raise ValueError(
            "inputs must be a tensor, a tuple of positional arguments or a dict of keyword "
            f"arguments, got {type(inputs).__name__}"
        )
    if isinstance(inputs, Mapping):
        check_keywords(inputs)
    tensors = list(tensors_in(inputs))
    if not tensors:
        raise ValueError("inputs must contain a tensor, got none")
    for tensor in tensors:
        if tensor.numel() == 0:
            raise ValueError(
                f"inputs must not be empty, got a tensor of shape {list(tensor.shape)}"
            )
        if tensor.is_floating_point() and tensor.isnan().any():
            raise ValueError("inputs must not contain NaN, which makes both sides compute NaN")
        if tensor.is_complex():
            raise ValueError(f"inputs must be real numbers, got a tensor of {tensor.dtype}")
    return inputs


def check_keywords(inputs: Mapping[Any, Any]) -> None:
    """Raise ValueError if the inputs are no keyword arguments."""
    for name in inputs:
        if not isinstance(name, str):
            raise ValueError(
                "inputs as a dict must be keyword arguments by name, got the key "
                f"{name!r}; pass a dict that is a positional argument as a tuple, (inputs,)"
            )


def floating_point_dtype(inputs: Inputs) -> torch.dtype | None:
    """Return the dtype of the first floating point tensor in `inputs`; None without one."""
    for tensor in tensors_in(inputs):
        if tensor.is_floating_point():
            return tensor.dtype
    return None

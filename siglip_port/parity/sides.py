"""The two sides of a comparison: modules, and the inputs that they are called with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""What a module is called with: a tensor, positional arguments, or named ones."""

Call = Callable[[Any, Any], Mapping[str, Tensor]]
"""Calls a module with inputs, and returns its outputs by name."""

Weights = Callable[[Any], Mapping[str, Tensor]]
"""Returns the tensors of a port under the names of the reference's `state_dict`."""


def call_module(module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Call a module and name its outputs.

    Its own names, `output` for a single tensor, else `output.0`, ...
    """
    if isinstance(inputs, Mapping):
        returned = module(**inputs)
    elif isinstance(inputs, tuple):
        returned = module(*inputs)
    else:
        returned = module(inputs)
    if isinstance(returned, Tensor):
        return {"output": returned}
    if not isinstance(returned, Mapping):
        returned = {f"output.{i}": value for i, value in enumerate(returned)}
    return {name: value for name, value in returned.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Side:
    """One of the two implementations.

    Attributes:
        module: in `eval()` mode.
        call: how it is run; both sides must name their outputs alike.
        attentions: the implementations of attention that it can be switched to; the first is exact
            in float64.
        set_attention: switches it.
    """

    module: nn.Module
    call: Call = call_module
    attentions: tuple[str, ...] = ("",)
    set_attention: Callable[[str], None] = lambda _: None

    def run(self, inputs: Inputs) -> dict[str, Tensor]:
        """Return its outputs by name."""
        with torch.inference_mode():
            return dict(self.call(self.module, inputs))


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without `torch.`."""
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def cast(module: nn.Module, *dtypes: torch.dtype) -> Iterator[None]:
    """Cast a module's floating point tensors to one dtype after the other; undo it afterwards."""
    tensors = [*module.parameters(), *module.buffers()]
    originals = [tensor.data for tensor in tensors]
    try:
        for dtype in dtypes:
            module.to(dtype)
        yield
    finally:
        for tensor, data in zip(tensors, originals, strict=True):
            tensor.data = data


def map_tensors(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    """Apply a function to every floating point tensor of some inputs; the rest stays."""
    if isinstance(inputs, Mapping):
        return {name: map_tensors(value, function) for name, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(map_tensors(value, function) for value in inputs)
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        return function(inputs)
    return inputs


def cast_inputs(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Round inputs to a dtype."""
    return map_tensors(inputs, lambda tensor: tensor.to(dtype))


def clone_inputs(inputs: Inputs) -> Inputs:
    """Copy inputs, so that a module may write to them."""
    return map_tensors(inputs, Tensor.clone)


def perturb(
    inputs: Inputs, scale: float, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Inputs:
    """Multiply every number by 1 + `scale` N(0, 1), the noise drawn in `dtype`."""

    def perturb_tensor(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator, dtype=dtype)
        return tensor * (1 + scale * noise.to(tensor))

    return map_tensors(inputs, perturb_tensor)


def example(inputs: Inputs, i: int) -> Inputs:
    """The `i`th of a batch of inputs, as a batch of one."""
    if isinstance(inputs, Mapping):
        return {name: example(value, i) for name, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(example(value, i) for value in inputs)
    if isinstance(inputs, Tensor):
        return inputs[i : i + 1]
    return inputs


def batch_size(inputs: Inputs) -> int:
    """The length of the first axis of the first tensor."""
    if isinstance(inputs, Tensor):
        return len(inputs)
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    return batch_size(next(iter(values)))

"""The two sides of a comparison: modules and their inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""Inputs of a module: a tensor, positional arguments, or keyword arguments."""

Call = Callable[[Any, Any], Mapping[str, Tensor]]
"""Function (module, inputs) -> outputs by name."""

Result = TypeVar("Result")

Weights = Callable[[Any], Mapping[str, Tensor]]
"""Function (port) -> its tensors under the names of the reference's `state_dict`."""


def call_module(module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Call a module and name its outputs.

    Returns:
        Tensors by the module's own names; `output` for a single tensor, `output.0`, ... for a
        sequence.
    """
    if isinstance(inputs, Mapping):
        outputs = module(**inputs)
    elif isinstance(inputs, tuple):
        outputs = module(*inputs)
    else:
        outputs = module(inputs)
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    if not isinstance(outputs, Mapping):
        outputs = {f"output.{i}": value for i, value in enumerate(outputs)}
    return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


class ReferenceHost(Protocol):
    """Place of the reference: this process, as a `Side`, or another one."""

    def compute(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Return `function(side, *arguments)`, where `side` is the reference.

        `function` is a function of a module, and arguments and result can be pickled, so that the
        reference may be in another process.
        """


@dataclass(frozen=True)
class Side:
    """One of the two implementations.

    Attributes:
        module: Module in `eval()` mode.
        call: Function that runs it; both sides must name their outputs alike.
        attentions: Names of its attention implementations; the first is float64 throughout.
        set_attention: Function that switches to one of them.
        find_defined: Function that returns the positions [B, N] of some inputs at which tokens are
            defined, where others are padding; None for all.
    """

    module: nn.Module
    call: Call = call_module
    attentions: tuple[str, ...] = ("",)
    set_attention: Callable[[str], None] = lambda _: None
    find_defined: Callable[[Any], Tensor | None] = lambda _: None

    def run(self, inputs: Inputs) -> dict[str, Tensor]:
        """Run the module; return its outputs by name."""
        with torch.inference_mode():
            return dict(self.call(self.module, inputs))

    def compute(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Return `function(self, *arguments)`: see `ReferenceHost`."""
        return function(self, *arguments)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without `torch.`."""
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def cast(module: nn.Module, *dtypes: torch.dtype) -> Iterator[None]:
    """Cast a module's floating point tensors to each dtype in turn; restore them on exit."""
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
    """Apply a function to every floating point tensor in `inputs`."""
    if isinstance(inputs, Mapping):
        return {name: map_tensors(value, function) for name, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(map_tensors(value, function) for value in inputs)
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        return function(inputs)
    return inputs


def cast_inputs(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Cast floating point inputs to a dtype."""
    return map_tensors(inputs, lambda tensor: tensor.to(dtype))


def clone_inputs(inputs: Inputs) -> Inputs:
    """Copy floating point inputs, so that a module may modify them."""
    return map_tensors(inputs, Tensor.clone)


def perturb(
    inputs: Inputs, scale: float, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Inputs:
    """Multiply every element by 1 + `scale` * N(0, 1), with the noise drawn in `dtype`."""

    def perturb_tensor(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator, dtype=dtype)
        return tensor * (1 + scale * noise.to(tensor))

    return map_tensors(inputs, perturb_tensor)


def example(inputs: Inputs, i: int) -> Inputs:
    """Return example `i` of a batch of inputs, as a batch of one."""
    if isinstance(inputs, Mapping):
        return {name: example(value, i) for name, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(example(value, i) for value in inputs)
    if isinstance(inputs, Tensor):
        return inputs[i : i + 1]
    return inputs


def batch_size(inputs: Inputs) -> int:
    """Return the length of the first axis of the first tensor in `inputs`."""
    if isinstance(inputs, Tensor):
        return len(inputs)
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    return batch_size(next(iter(values)))

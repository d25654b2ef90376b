"""The two sides of a comparison: modules and their inputs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from siglip_port.parity.nested import Inputs as Inputs
from siglip_port.parity.nested import map_tensors as map_tensors
from siglip_port.parity.nested import tensors_in

Call = Callable[[Any, Any], Mapping[str, Tensor]]
"""Function (module, inputs) -> outputs by name."""

Result = TypeVar("Result")

Weights = Callable[[Any], Mapping[str, Tensor]]
"""Function (port) -> its tensors under the names of the reference's `state_dict`."""


PORT_ERRORS = (Exception, SystemExit)
"""What a port may raise."""


class CallError(TypeError):
    """The function that calls a side does not return tensors by name: an error of an argument."""


def call_module(module: Callable[..., Any], inputs: Inputs) -> dict[str, Tensor]:
    """Call a module, or any other callable, and name its outputs.

    Returns:
        Tensors by the module's own names: fields of a mapping, dataclass or named tuple, joined by
        dots where they are nested; `output` for a single tensor, `output.0`, ... for a sequence.
    """
    if isinstance(inputs, Mapping):
        outputs = module(**inputs)
    elif isinstance(inputs, tuple):
        outputs = module(*inputs)
    else:
        outputs = module(inputs)
    named = dict(name_outputs(outputs, ""))
    if not named:
        raise TypeError(
            f"{type(module).__name__} must return tensors, got {type(outputs).__name__}; pass a "
            "call function that returns tensors by name"
        )
    return named


def name_outputs(outputs: object, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in outputs of any structure, with their names.

    Anything but tensors, arrays and numbers is left out, such as None or a cache of keys.
    """
    if isinstance(outputs, Tensor):
        yield prefix or "output", outputs
    elif isinstance(outputs, np.ndarray):
        yield prefix or "output", torch.from_numpy(outputs)
    elif isinstance(outputs, (float, np.number)):
        yield prefix or "output", torch.tensor(float(outputs), dtype=torch.float64)
    else:
        for name, value in fields_of(outputs, prefix).items():
            yield from name_outputs(value, name)


def fields_of(outputs: object, prefix: str) -> dict[str, object]:
    """Return the fields of a container, by their full names; none of anything else."""
    if isinstance(outputs, Mapping):
        fields = {str(name): value for name, value in outputs.items()}
    elif dataclasses.is_dataclass(outputs):
        fields = {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
    elif isinstance(outputs, tuple) and hasattr(outputs, "_fields"):
        fields = dict(zip(outputs._fields, outputs, strict=True))
    elif isinstance(outputs, (tuple, list)):
        prefix = prefix or "output"
        fields = {str(i): value for i, value in enumerate(outputs)}
    else:
        fields = {}
    if not prefix:
        return fields
    return {f"{prefix}.{name}": value for name, value in fields.items()}


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
        module: Module in `eval()` mode; the port may be any other callable, which has no parameters
            and no modules.
        call: Function that runs it; both sides must name their outputs alike.
        attentions: Names of its attention implementations; the first is float64 throughout.
        set_attention: Function that switches to one of them.
        supports_float64: Whether it computes in float64 when `cast` to it and given such inputs.
        find_defined: Function that returns the positions [B, N] of some inputs at which tokens are
            defined, where others are padding; None for all.
    """

    module: Any
    call: Call = call_module
    attentions: tuple[str, ...] = ("",)
    set_attention: Callable[[str], None] = lambda _: None
    supports_float64: bool = True
    find_defined: Callable[[Any], Tensor | None] = lambda _: None

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by name; none of a callable that is no module."""
        if not isinstance(self.module, nn.Module):
            return {}
        return dict(self.module.named_parameters())

    def run(self, inputs: Inputs) -> dict[str, Tensor]:
        """Run the module; return its outputs by name, those without axes as one element [1]."""
        with torch.inference_mode():
            return with_axes(self.call(self.module, inputs))

    def compute(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Return `function(self, *arguments)`: see `ReferenceHost`."""
        return function(self, *arguments)


def with_axes(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return outputs by name, with an axis for those that have none, such as a loss."""
    named = {}
    for name, tensor in outputs.items():
        named[name] = tensor[None] if tensor.ndim == 0 else tensor
    return named


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without `torch.`."""
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def cast(module: object, *dtypes: torch.dtype) -> Iterator[None]:
    """Cast a module's floating point tensors to each dtype in turn; restore them on exit.

    A callable that is no module has its own dtype.
    """
    if not isinstance(module, nn.Module):
        yield
        return
    parameters = [(parameter, parameter.data) for parameter in module.parameters()]
    buffers = []  # casting replaces these, and only the values of parameters
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            buffers.append((part, name, buffer))
    try:
        for dtype in dtypes:
            module.to(dtype)
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for part, name, buffer in buffers:
            setattr(part, name, buffer)


@dataclass(frozen=True)
class Sample:
    """Inputs of a run in float64, and the weights of both sides in it.

    Attributes:
        inputs: Inputs in float64.
        weight_scale: Factor of all parameters, which any layout of them preserves.
    """

    inputs: Any
    weight_scale: float = 1.0

    def scale_weights(self, module: object) -> None:
        """Multiply the parameters of a module by the factor; call it within `cast`."""
        if self.weight_scale == 1.0 or not isinstance(module, nn.Module):
            return
        for parameter in module.parameters():
            parameter.data = parameter.data * self.weight_scale


def cast_inputs(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Cast floating point inputs to a dtype."""
    return map_tensors(inputs, lambda tensor: tensor.to(dtype))


def clone_inputs(inputs: Inputs) -> Inputs:
    """Copy floating point inputs, so that a module may modify them."""
    return map_tensors(inputs, Tensor.clone)


def perturb(
    inputs: Inputs, scale: float, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Inputs:
    """Change every element by `scale` * N(0, 1), relative to it and to the largest one.

    The noise is drawn in `dtype`. Zeros change, too, such as black pixels; masks of zeros and ones
    stay masks.
    """

    def perturb_tensor(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator, dtype=dtype).to(tensor)
        size = tensor.abs()
        if not is_mask(tensor):
            size = size + tensor.abs().max() / 10
        return tensor + scale * noise * size

    return map_tensors(inputs, perturb_tensor)


def is_mask(tensor: Tensor) -> bool:
    """Return whether a tensor contains nothing but zeros and ones."""
    return bool(((tensor == 0) | (tensor == 1)).all())


def example(inputs: Inputs, i: int) -> Inputs:
    """Return example `i` of a batch of inputs, as a batch of one.

    Tensors of another length along the first axis, such as position ids of shape [1, N], are the
    same for all examples.
    """
    length = batch_size(inputs)

    def select(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0 or len(tensor) != length:
            return tensor
        return tensor[i : i + 1]

    return map_tensors(inputs, select, only_floating_point=False)


def batch_size(inputs: Inputs) -> int:
    """Return the number of examples: the length of the first axis of the first tensor.

    Tensors without axes, or with a single row, count only if there are no others.
    """
    lengths = [len(tensor) for tensor in tensors_in(inputs) if tensor.ndim]
    for length in lengths:
        if length != 1:
            return length
    return len(lengths[:1])

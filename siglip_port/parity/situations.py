"""Situations in which a model is called, and what a call does in each of them.

Batch sizes, memory formats of the inputs, dtypes, gradient modes, training mode and other weights.
Everything here runs on either side, so that the reference defines what is expected.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from siglip_port.parity.metrics import bits, tensors_equal
from siglip_port.parity.sides import PORT_ERRORS, Inputs, Side, cast

MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad": torch.enable_grad,
}
"""Gradient modes by name."""


RANDOM_SEED = 7_919_031
"""Seed before each call; a port that sets a seed of its own changes the state."""

RANDOM_NUMBERS = "the random number generator"
"""Setting that calls may change by drawing some, but not by another seed."""


@dataclass(frozen=True)
class Situation:
    """Circumstances of a call.

    Attributes:
        name: End of the sentence "differs ...", such as `in a batch of 3`.
        inputs: Inputs, contiguous.
        dtype: Dtype of the weights.
        memory: Name in `MEMORY_FORMATS`.
        mode: Name in `MODES`.
        training: Whether the model is in training mode.
        changed_weights: Whether all weights are changed by `change_weight`.
        has_values: Whether values are compared, not only dtype, shape and the like.
    """

    name: str
    inputs: Inputs
    dtype: torch.dtype
    memory: str = "contiguous"
    mode: str = "inference"
    training: bool = False
    changed_weights: bool = False
    has_values: bool = True


class Traits(NamedTuple):
    """Properties of an output besides its values.

    Attributes:
        dtype: Dtype.
        shape: Shape.
        is_contiguous: Whether it is contiguous.
        requires_grad: Whether it requires gradients.
        on_input_device: Whether it is on the device of the inputs.
        type_name: Name of its class.
        shares: Tensor with which it shares memory: an input or a parameter; empty for none.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    is_contiguous: bool
    requires_grad: bool
    on_input_device: bool
    type_name: str
    shares: str


@dataclass(frozen=True)
class Outcome:
    """Result of a call.

    Attributes:
        outputs: Outputs by name.
        traits: Traits of the outputs.
        error: Class and message of the exception that the call raised; empty for none.
        place: Path of the innermost module that raised it.
        written: Names of inputs and parameters that the call wrote to.
        settings: Global settings of torch that the call changed.
        is_random: Whether two calls differ; only known in training mode.
    """

    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    traits: Mapping[str, Traits] = field(default_factory=dict)
    error: str = ""
    place: str = ""
    written: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    is_random: bool = False


# --- inputs ---------------------------------------------------------------------------------------


def map_all_tensors(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    """Apply a function to every tensor in `inputs`, of any dtype."""
    if isinstance(inputs, Mapping):
        return {name: map_all_tensors(value, function) for name, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(map_all_tensors(value, function) for value in inputs)
    if isinstance(inputs, Tensor):
        return function(inputs)
    return inputs


def all_tensors(inputs: Inputs) -> list[Tensor]:
    """List the tensors in `inputs`."""
    tensors: list[Tensor] = []

    def save(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    map_all_tensors(inputs, save)
    return tensors


def contiguous(tensor: Tensor) -> Tensor:
    """Return a contiguous copy."""
    return tensor.clone(memory_format=torch.contiguous_format)


def transposed(tensor: Tensor) -> Tensor:
    """Return a copy whose last two axes are swapped in memory."""
    if tensor.ndim < 2:
        return tensor.clone()
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def channels_last(tensor: Tensor) -> Tensor:
    """Return a copy in the format channels_last; contiguous unless it is 4-dimensional."""
    if tensor.ndim != 4:
        return contiguous(tensor)
    return tensor.clone(memory_format=torch.channels_last)


def sliced(tensor: Tensor) -> Tensor:
    """Return a copy that is every other element of a larger tensor, from the second on."""
    if tensor.ndim == 0:
        return tensor.clone()
    memory = torch.zeros(
        (*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), dtype=tensor.dtype, device=tensor.device
    )
    view = memory[..., 1 : 1 + 2 * tensor.shape[-1] : 2]
    view.copy_(tensor)
    return view


def expanded(tensor: Tensor) -> Tensor:
    """Return the first example, expanded to the batch without copies (stride 0)."""
    if tensor.ndim == 0:
        return tensor.clone()
    return tensor[:1].clone().expand_as(tensor)


def inference_tensor(tensor: Tensor) -> Tensor:
    """Return a copy that autograd refuses."""
    with torch.inference_mode():
        return tensor.clone()


def leaf(tensor: Tensor) -> Tensor:
    """Return a copy that requires gradients, if it is of a floating point dtype."""
    copy = tensor.clone()
    return copy.requires_grad_() if copy.is_floating_point() else copy


MEMORY_FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": contiguous,
    "transposed": transposed,
    "channels_last": channels_last,
    "sliced": sliced,
    "expanded": expanded,
    "inference_tensor": inference_tensor,
    "leaf": leaf,
}
"""Name -> function that returns a copy in this format."""


# --- states of a module ---------------------------------------------------------------------------


def parameters_of(module: object) -> dict[str, nn.Parameter]:
    """Return the parameters of a module by name; none of another callable."""
    return dict(module.named_parameters()) if isinstance(module, nn.Module) else {}


def state_of_module(module: object) -> dict[str, Tensor]:
    """Return the `state_dict` of a module; empty for another callable."""
    return dict(module.state_dict()) if isinstance(module, nn.Module) else {}


@contextlib.contextmanager
def in_training_mode(module: object) -> Iterator[None]:
    """Put a module into training mode; restore modes, buffers and random numbers on exit.

    A callable that is no module has no modes.
    """
    if not isinstance(module, nn.Module):
        yield
        return
    modes = [(part, part.training) for part in module.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    with torch.random.fork_rng():
        try:
            module.train()
            yield
        finally:
            for part, mode in modes:
                part.training = mode
            for buffer, original in buffers:
                buffer.data.copy_(original)


def change_weight(weight: Tensor) -> Tensor:
    """Change every element of a weight by a factor of 0.9 to 1.3 that depends on its value.

    Elements change independently, so ports may store weights transposed or fused.
    """
    if not weight.is_floating_point():
        return weight.detach().clone()
    return weight.detach() * (1.1 + 0.2 * torch.cos(5 * weight.detach()))


@contextlib.contextmanager
def with_own_weights(module: object) -> Iterator[None]:
    """Give a module copies of its parameters, and the originals again on exit."""
    parameters = list(parameters_of(module).values())
    originals = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = parameter.data.clone()
        yield
    finally:
        for parameter, data in zip(parameters, originals, strict=True):
            parameter.data = data


@contextlib.contextmanager
def with_changed_weights(module: object) -> Iterator[None]:
    """Change all parameters of a module by `change_weight`; restore them on exit."""
    with with_own_weights(module):
        for parameter in parameters_of(module).values():
            parameter.data = change_weight(parameter)
        yield


def weight_moments(side: Side, dtype: torch.dtype) -> tuple[float, ...]:
    """Return sums over all parameters that depend neither on their order nor their shapes."""
    moments = [0.0] * 5
    for parameter in parameters_of(side.module).values():
        values = parameter.detach().to(dtype).double()
        moments[0] += values.numel()
        moments[1] += float(values.sum())
        moments[2] += float(values.abs().sum())
        moments[3] += float(values.square().sum())
        moments[4] += float((values * values.square()).sum())
    return tuple(moments)


def same_moments(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    """Return whether two sides have the same weights, up to order and shapes."""
    pairs = zip(first, second, strict=True)
    return all(abs(a - b) <= 1e-9 * (1 + abs(a) + first[2]) for a, b in pairs)


# --- calls ----------------------------------------------------------------------------------------


def run_situations(
    side: Side, situations: list[Situation], dtype: torch.dtype
) -> dict[str, Outcome]:
    """Call a side in several situations; return the outcomes by the name of the situation."""
    if side.attentions[0]:
        side.set_attention(side.attentions[0])
    return {situation.name: run_situation(side, situation, dtype) for situation in situations}


def run_situation(side: Side, situation: Situation, dtype: torch.dtype) -> Outcome:
    """Call a side in one situation, on weights rounded to `dtype`."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(cast(side.module, dtype, situation.dtype))
        if situation.changed_weights:
            stack.enter_context(with_changed_weights(side.module))
        if not situation.training:
            stack.enter_context(torch.random.fork_rng())
            torch.manual_seed(RANDOM_SEED)
            return call_once(side, situation)
        stack.enter_context(in_training_mode(side.module))
        return call_twice(side, situation)


def call_twice(side: Side, situation: Situation) -> Outcome:
    """Call a side in training mode, and find out whether its outputs are random."""
    torch.manual_seed(RANDOM_SEED)
    outcome = call_once(side, situation)
    torch.manual_seed(RANDOM_SEED + 1)
    second = call_once(side, situation)
    for name, output in outcome.outputs.items():
        other = second.outputs.get(name)
        if other is not None and differs_more_than_rounding(other, output):
            return Outcome(outcome.outputs, outcome.traits, is_random=True)
    return outcome


def differs_more_than_rounding(tensor: Tensor, other: Tensor) -> bool:
    """Return whether two results of one function differ by more than the order of its sums."""
    if tensor.shape != other.shape:
        return True
    if not other.is_floating_point():
        return not torch.equal(tensor, other)
    distance = float((tensor.double() - other.double()).norm())
    return not distance <= 1e3 * torch.finfo(other.dtype).eps * float(other.double().norm())


def call_once(side: Side, situation: Situation) -> Outcome:
    """Call a side that has the weights and the mode of the situation."""
    inputs = map_all_tensors(situation.inputs, MEMORY_FORMATS[situation.memory])
    watched = watch_tensors(side.module, inputs)
    with MODES[situation.mode](), settings_restored():
        settings = read_settings()
        seed = torch.initial_seed()
        try:
            outputs = dict(side.call(side.module, inputs))
        except PORT_ERRORS as error:  # an outcome, which the gate reports
            return Outcome(error=describe_error(error), place=innermost_module(error, side.module))
        changed = changed_settings(settings)
        seed_is_kept = torch.initial_seed() == seed
    if seed_is_kept:  # drawn numbers harm nothing, another seed does
        changed = [name for name in changed if name != RANDOM_NUMBERS]
    written = [name for name, tensor, before in watched if before != state_of(tensor)]
    tensors = {name: value for name, value in outputs.items() if isinstance(value, Tensor)}
    traits = {name: read_traits(value, side.module, inputs) for name, value in tensors.items()}
    values = {name: contiguous(value.detach()) for name, value in tensors.items()}
    return Outcome(values, traits, written=tuple(written), settings=tuple(changed))


def describe_error(error: BaseException) -> str:
    """Return class and first line of an error."""
    message = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def innermost_module(error: BaseException, module: object) -> str:
    """Return the path of the innermost module whose call raised an error."""
    if not isinstance(module, nn.Module):
        return ""
    paths = {id(part): path for path, part in module.named_modules()}
    innermost = ""
    trace = error.__traceback__
    while trace is not None:
        innermost = paths.get(id(trace.tb_frame.f_locals.get("self"))) or innermost
        trace = trace.tb_next
    return innermost


class State(NamedTuple):
    """State of a tensor by which writes are detected.

    Attributes:
        version: Number of writes that autograd counted; 0 for inference tensors.
        contents: Bytes, only of inputs.
    """

    version: int
    contents: bytes


def state_of(tensor: Tensor) -> State:
    """Return the state of a tensor; without contents for a parameter."""
    version = 0 if tensor.is_inference() else tensor._version
    if isinstance(tensor, nn.Parameter):
        return State(version, b"")
    return State(version, bits(tensor.detach().flatten()).cpu().numpy().tobytes())


def watch_tensors(module: object, inputs: Inputs) -> list[tuple[str, Tensor, State]]:
    """Return name, tensor and state of all inputs and parameters."""
    tensors = {f"input {i}": tensor for i, tensor in enumerate(all_tensors(inputs))}
    tensors |= parameters_of(module)
    return [(name, tensor, state_of(tensor)) for name, tensor in tensors.items()]


def read_traits(output: Tensor, module: object, inputs: Inputs) -> Traits:
    """Read the traits of an output."""
    tensors = all_tensors(inputs)
    return Traits(
        dtype=output.dtype,
        shape=tuple(output.shape),
        is_contiguous=output.is_contiguous(),
        requires_grad=output.requires_grad,
        on_input_device=not tensors or output.device == tensors[0].device,
        type_name=type(output).__name__,
        shares=shared_memory(output, module, tensors),
    )


def shared_memory(output: Tensor, module: object, inputs: list[Tensor]) -> str:
    """Return which tensor shares memory with an output; empty for none."""
    memory = memory_of(output)
    if not output.numel():
        return ""
    if any(memory_of(tensor) == memory for tensor in inputs):
        return "an input"
    if any(memory_of(tensor) == memory for tensor in parameters_of(module).values()):
        return "a parameter"
    return ""


def memory_of(tensor: Tensor) -> int:
    """Return the address of the memory of a tensor, which views share."""
    return tensor.untyped_storage().data_ptr()


def read_settings() -> dict[str, Any]:
    """Read the global settings of torch that a call must leave as they are."""
    return {
        RANDOM_NUMBERS: torch.get_rng_state(),
        "the gradient mode": torch.is_grad_enabled(),
        "the default dtype": torch.get_default_dtype(),
        "the number of threads": torch.get_num_threads(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "the precision of float32 products": torch.get_float32_matmul_precision(),
    }


def changed_settings(before: Mapping[str, Any]) -> list[str]:
    """List the settings that differ from earlier ones."""
    changed = []
    for name, value in read_settings().items():
        if isinstance(value, Tensor):
            is_same = tensors_equal(value, before[name])
        else:
            is_same = value == before[name]
        if not is_same:
            changed.append(name)
    return changed


@contextlib.contextmanager
def settings_restored() -> Iterator[None]:
    """Restore the settings of torch on exit, so that a change affects no later call."""
    settings = read_settings()
    try:
        yield
    finally:
        for name in changed_settings(settings):
            RESTORE[name](settings[name])


RESTORE: dict[str, Callable[..., object]] = {
    RANDOM_NUMBERS: torch.set_rng_state,
    "the gradient mode": torch.set_grad_enabled,
    "the default dtype": torch.set_default_dtype,
    "the number of threads": torch.set_num_threads,
    "autocast": functools.partial(torch.set_autocast_enabled, "cpu"),
    "deterministic algorithms": torch.use_deterministic_algorithms,
    "the precision of float32 products": torch.set_float32_matmul_precision,
}
"""Setting of `read_settings` -> function that sets it."""

"""Gradients of both sides in float64: of inputs, parameters and taps."""

from __future__ import annotations

import contextlib
import hashlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from siglip_port.parity.metrics import bits
from siglip_port.parity.sides import (
    PORT_ERRORS,
    Inputs,
    ReferenceHost,
    Side,
    Weights,
    cast,
    cast_inputs,
    map_tensors,
)
from siglip_port.parity.situations import (
    Situation,
    describe_error,
    differs_more_than_rounding,
    parameters_of,
    run_situation,
)
from siglip_port.parity.taps import Recording, record, tap_hooks


@dataclass(frozen=True)
class Gradients:
    """Gradients of a fixed random combination of the outputs of a side.

    Attributes:
        outputs: Outputs by name, with gradients enabled; empty if the forward pass raised an error.
        differentiable: Outputs that require gradients.
        inputs: Gradients of the floating point inputs; None for no gradient.
        parameters: The same by name of the parameter.
        taps: The same by point, in order of computation.
        aliases: Points whose tensor has an earlier point, too -> that point: the input of a block
            is the output of the previous one.
        consumers: Points without aliases -> first point that is computed from it.
        error: Class and message of the exception that was raised; empty for none.
    """

    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    differentiable: tuple[str, ...] = ()
    inputs: tuple[Tensor | None, ...] = ()
    parameters: Mapping[str, Tensor | None] = field(default_factory=dict)
    taps: Mapping[str, Tensor | None] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    consumers: Mapping[str, str] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class ParameterInfo:
    """Properties of a parameter.

    Attributes:
        requires_grad: Whether it is trainable.
        digest: Digest of its values in the dtype of the weights, by which ports are matched.
    """

    requires_grad: bool
    digest: str


@dataclass(frozen=True)
class ReferenceGradients:
    """Gradients of the reference, and where to compute more.

    Attributes:
        host: Place of the reference.
        dtype: Dtype to which weights and inputs are rounded.
        inputs: Inputs in float64.
        points: Points at which gradients were recorded.
        gradients: Gradients in `eval()` mode.
        parameters: Properties of its parameters.
        trains_alike: Whether outputs are the same in training mode; not with dropout, for example.
    """

    host: ReferenceHost
    dtype: torch.dtype
    inputs: Inputs
    points: list[str]
    gradients: Gradients
    parameters: dict[str, ParameterInfo]
    trains_alike: bool

    def record(self) -> Recording:
        """Return outputs and taps of the reference in float64."""
        return self.host.compute(record_outputs, self.inputs, self.points, self.dtype)


def run_gradients(
    host: ReferenceHost, inputs: Inputs, points: list[str], dtype: torch.dtype
) -> ReferenceGradients:
    """Compute the gradients of the reference in float64.

    Args:
        host: Reference in `eval()` mode.
        inputs: Inputs of any floating point dtype.
        points: Points at which to record gradients.
        dtype: Dtype to which weights and inputs are rounded.
    """
    inputs = cast_inputs(cast_inputs(inputs, dtype), torch.float64)
    gradients = host.compute(reference_gradients, inputs, points, dtype)
    parameters = host.compute(describe_parameters, dtype)
    trains_alike = host.compute(is_same_in_training, inputs, dtype)
    return ReferenceGradients(host, dtype, inputs, points, gradients, parameters, trains_alike)


def reference_gradients(
    reference: Side,
    inputs: Inputs,
    points: list[str],
    dtype: torch.dtype,
) -> Gradients:
    """Compute the gradients of the reference."""
    select_exact_attention(reference)
    with cast(reference.module, dtype, torch.float64):
        return backpropagate(reference, inputs, GradientTaps(points))


def record_outputs(
    reference: Side, inputs: Inputs, points: list[str], dtype: torch.dtype
) -> Recording:
    """Run the reference in float64, and record its taps."""
    select_exact_attention(reference)
    with cast(reference.module, dtype, torch.float64):
        return record(reference.module, points, lambda: reference.run(inputs))


def select_exact_attention(reference: Side) -> None:
    """Select the attention implementation that supports float64 throughout."""
    if reference.attentions[0]:
        reference.set_attention(reference.attentions[0])


def describe_parameters(side: Side, dtype: torch.dtype) -> dict[str, ParameterInfo]:
    """Describe the parameters of a side."""
    return {
        name: ParameterInfo(parameter.requires_grad, digest(parameter, dtype))
        for name, parameter in parameters_of(side.module).items()
    }


def digest(tensor: Tensor, dtype: torch.dtype) -> str:
    """Return a digest of the shape and the values of a tensor, rounded to a dtype."""
    values = bits(tensor.detach().to(dtype).flatten()).cpu().numpy().tobytes()
    return hashlib.sha256(str(tuple(tensor.shape)).encode() + values).hexdigest()


def is_same_in_training(side: Side, inputs: Inputs, dtype: torch.dtype) -> bool:
    """Return whether a side computes the same outputs in training mode."""
    evaluated = run_situation(side, Situation("in eval mode", inputs, torch.float64), dtype)
    situation = Situation("in training mode", inputs, torch.float64, mode="no_grad", training=True)
    trained = run_situation(side, situation, dtype)
    if trained.error or trained.is_random:
        return False
    for name, output in evaluated.outputs.items():
        if differs_more_than_rounding(trained.outputs[name], output):
            return False
    return True


# --- one backward pass ----------------------------------------------------------------------------


class GradientTaps:
    """Gradients at the taps of one backward pass.

    A module may be called several times, for example once per image; the gradients are then joined
    in the order of the calls.

    Attributes:
        points: Points to record.
        aliases: Points whose tensor has an earlier point, too -> that point.

    Args:
        points: Points to record.
        forced: Gradients by point that replace those that arrive (teacher forcing), so that the
            error of a step is its own.
    """

    def __init__(self, points: list[str], forced: Mapping[str, Tensor] | None = None) -> None:
        self.points = points
        self.aliases: dict[str, str] = {}
        self._forced = forced or {}
        self._slots: dict[str, list[Tensor | None]] = {}
        self._nodes: dict[str, Node] = {}
        self._lengths: dict[str, int] = {}

    def visit(self, point: str, tensor: Tensor) -> None:
        """Watch a tensor of the forward pass; once if several points share it."""
        if self.is_alias(point, tensor.grad_fn):
            return
        slots = self._slots.setdefault(point, [])
        slots.append(None)
        start = self._lengths.get(point, 0)
        end = start + len(tensor)
        self._lengths[point] = end
        if not tensor.requires_grad:
            return
        number = len(slots) - 1

        def save(gradient: Tensor) -> Tensor | None:
            slots[number] = gradient.detach().clone()
            replacement = self._forced.get(point)
            if replacement is None or replacement[start:end].shape != gradient.shape:
                return None
            return replacement[start:end].to(gradient)

        tensor.register_hook(save)

    def is_alias(self, point: str, node: Node | None) -> bool:
        """Return whether the tensor of a point is that of an earlier one."""
        if node is None or point in self.aliases:
            return point in self.aliases
        for earlier, other in self._nodes.items():
            if node is other and earlier != point:
                self.aliases[point] = earlier
                return True
        self._nodes.setdefault(point, node)
        return False

    def gradients(self) -> dict[str, Tensor | None]:
        """Return the gradient at every point; None where one of its calls got none."""
        gradients: dict[str, Tensor | None] = {}
        for point, slots in self._slots.items():
            parts = [part for part in slots if part is not None]
            gradients[point] = torch.cat(parts) if len(parts) == len(slots) else None
        for point, earlier in self.aliases.items():
            gradients[point] = gradients[earlier]
        return gradients

    def consumers(self) -> dict[str, str]:
        """Return, for every point, the first one with a gradient that is computed from it."""
        gradients = self.gradients()
        points = {node: point for point, node in self._nodes.items()}
        consumers: dict[str, str] = {}
        for point, node in self._nodes.items():
            if gradients[point] is None:
                continue
            for source in sources_of(node, points):
                consumers.setdefault(source, point)
        return consumers


def sources_of(node: Node, points: Mapping[Node, str]) -> list[str]:
    """List the nearest points from which the tensor of a node is computed."""
    sources: list[str] = []
    visited = {node}
    waiting = [node]
    while waiting:
        for previous, _ in waiting.pop().next_functions:
            if previous is None or previous in visited:
                continue
            visited.add(previous)
            if previous in points:
                sources.append(points[previous])
            else:
                waiting.append(previous)
    return sources


def backpropagate(side: Side, inputs: Inputs, taps: GradientTaps) -> Gradients:
    """Run a side forward and backward.

    Args:
        side: Side to run, already cast to float64.
        inputs: Inputs in float64.
        taps: Taps at which gradients are recorded.
    """
    leaves: list[Tensor] = []

    def to_leaf(tensor: Tensor) -> Tensor:
        leaves.append(tensor.detach().clone().requires_grad_())
        return leaves[-1].clone()  # which may be written to: a finding of the gate `calls`

    parameters = parameters_of(side.module)
    outputs: dict[str, Tensor] = {}
    try:
        with (
            trainable(list(parameters.values())),
            torch.enable_grad(),
            watch(side.module, taps),
        ):
            outputs = dict(side.call(side.module, map_tensors(inputs, to_leaf)))
            differentiable = differentiable_outputs(outputs)
            variables = [*leaves, *parameters.values()]
            gradients = gradients_of(differentiable, variables)
    except PORT_ERRORS as error:  # an outcome, which the gate reports
        return Gradients(detach_all(outputs), error=describe_error(error))
    split = len(leaves)
    return Gradients(
        detach_all(outputs),
        tuple(differentiable),
        tuple(gradients[:split]),
        dict(zip(parameters, gradients[split:], strict=True)),
        taps.gradients(),
        taps.aliases,
        taps.consumers(),
    )


def watch(module: nn.Module, taps: GradientTaps) -> contextlib.AbstractContextManager[None]:
    """Watch the taps of a module, if there are any."""
    if not taps.points:
        return contextlib.nullcontext()
    return tap_hooks(module, taps.points, taps.visit)


@contextlib.contextmanager
def trainable(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Make all floating point parameters require gradients; restore them on exit."""
    flags = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)


def differentiable_outputs(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the outputs that require gradients."""
    return {name: output for name, output in outputs.items() if output.requires_grad}


def gradients_of(outputs: Mapping[str, Tensor], variables: list[Tensor]) -> list[Tensor | None]:
    """Return the gradients of a random combination of outputs; restore `grad` of the variables."""
    originals = [variable.grad for variable in variables]
    try:
        for variable in variables:
            variable.grad = None
        if outputs:
            weights = [random_like(name, output) for name, output in outputs.items()]
            torch.autograd.backward(list(outputs.values()), weights)
        return [variable.grad for variable in variables]
    finally:
        for variable, original in zip(variables, originals, strict=True):
            variable.grad = original


def random_like(name: str, output: Tensor) -> Tensor:
    """Return the factors of an output in the random combination, the same for both sides."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)


def detach_all(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detach all outputs."""
    return {name: output.detach() for name, output in outputs.items()}


# --- parameters of the port -----------------------------------------------------------------------


@dataclass(frozen=True)
class ExpectedGradient:
    """Gradient that a parameter of the port must have.

    Attributes:
        names: Parameters of the reference that it holds.
        gradient: Gradient.
    """

    names: tuple[str, ...]
    gradient: Tensor


def expected_gradients(
    port: object, run: ReferenceGradients, gradients: Gradients, weights: Weights | None
) -> dict[str, ExpectedGradient]:
    """Translate the gradients of the reference's parameters to those of the port.

    If `weights` keeps the graph, the gradient of a port's parameter is that of the tensors that are
    computed from it: a fused matrix gets the joined gradients of its parts. Otherwise parameters
    are matched by memory, or by shape and values.

    Args:
        port: Port in float64.
        run: Gradients of the reference.
        gradients: The gradients to translate.
        weights: Function that returns the port's tensors under the reference's names.
    """
    parameters = parameters_of(port)
    references = {name: value for name, value in gradients.parameters.items() if value is not None}
    expected: dict[str, ExpectedGradient] = {}
    with trainable(list(parameters.values())), torch.enable_grad():
        tensors = dict(weights(port)) if weights is not None else {}
        for name, tensor in tensors.items():
            if name in references and tensor.shape == references[name].shape:
                add_expected(expected, parameters, name, tensor, references[name])
    for name, parameter_name in match_by_values(parameters, run).items():
        if parameter_name not in expected and name in references:
            gradient = references[name]
            expected[parameter_name] = ExpectedGradient((name,), gradient)
    return expected


def add_expected(
    expected: dict[str, ExpectedGradient],
    parameters: Mapping[str, nn.Parameter],
    name: str,
    tensor: Tensor,
    gradient: Tensor,
) -> None:
    """Add the gradient of one tensor of the reference to the port's parameters behind it."""
    if tensor.requires_grad:
        variables = list(parameters.values())
        parts = torch.autograd.grad(
            tensor, variables, gradient.to(tensor), allow_unused=True, retain_graph=True
        )
        shares = zip(parameters, parts, strict=True)
    else:
        same = [key for key, value in parameters.items() if is_same_memory(value, tensor)]
        shares = zip(same, [gradient] * len(same), strict=True)
    for parameter_name, part in shares:
        if part is None:
            continue
        previous = expected.get(parameter_name)
        if previous is None:
            expected[parameter_name] = ExpectedGradient((name,), part)
        else:
            names = (*previous.names, name)
            expected[parameter_name] = ExpectedGradient(names, previous.gradient + part)


def is_same_memory(parameter: Tensor, tensor: Tensor) -> bool:
    """Return whether a tensor is a parameter without its graph."""
    same_layout = parameter.shape == tensor.shape and parameter.stride() == tensor.stride()
    return same_layout and parameter.data_ptr() == tensor.data_ptr()


def match_by_values(
    parameters: Mapping[str, nn.Parameter], run: ReferenceGradients
) -> dict[str, str]:
    """Match parameters of the reference to those of the port with the same values, if unique."""
    references: dict[str, list[str]] = {}
    for name, info in run.parameters.items():
        references.setdefault(info.digest, []).append(name)
    ports: dict[str, list[str]] = {}
    for name, parameter in parameters.items():
        ports.setdefault(digest(parameter, run.dtype), []).append(name)
    matches = {}
    for key, names in references.items():
        if len(names) == 1 and len(ports.get(key, ())) == 1:
            matches[names[0]] = ports[key][0]
    return matches

"""Repeated calls: results must not depend on earlier calls, outputs or weights.

Caches and static buffers are wrong as soon as what they were computed from has changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from siglip_port.parity.calls import (
    BASE,
    CHANGED_WEIGHTS,
    OTHER,
    CallTrace,
    ReferenceCalls,
    trace_situation,
)
from siglip_port.parity.gates.deviations import Deviation, first_difference
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.sides import PORT_ERRORS, Inputs, Side, cast, cast_inputs
from siglip_port.parity.situations import (
    Situation,
    all_tensors,
    change_weight,
    contiguous,
    describe_error,
    in_training_mode,
    innermost_module,
    map_all_tensors,
    memory_of,
    parameters_of,
    with_own_weights,
)
from siglip_port.parity.taps import Tap, port_to_reference

LONG_RUN = 120
"""Number of calls of the long run."""

LONG_RUN_BATCH = 3
"""Largest batch of the long run."""

Outputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Content:
    """Inputs of a call, and what to expect.

    Attributes:
        situation: Situation with the inputs.
        outputs: Expected outputs.
        bounds: Largest relative error by output.
    """

    situation: Situation
    outputs: Outputs
    bounds: dict[str, float]

    def copy_inputs(self) -> Inputs:
        """Return a copy of the inputs."""
        return map_all_tensors(self.situation.inputs, contiguous)


@dataclass(frozen=True)
class Step:
    """Call whose result is compared.

    Attributes:
        name: End of the sentence "differs ...".
        content: Name of the inputs.
        outputs: Outputs of the call.
    """

    name: str
    content: str
    outputs: Outputs


Contents = Mapping[str, Content]
Steps = Generator[Step, None, None]
Scenario = Callable[[Side, Contents, torch.dtype], Steps]
"""Function (port in float64, contents, dtype of its weights) -> calls to compare."""


def run(port: Side, contents: Contents, name: str) -> Outputs:
    """Call the port with a copy of some inputs."""
    return port.run(contents[name].copy_inputs())


def other_inputs(port: Side, contents: Contents, dtype: torch.dtype) -> Steps:
    """Call with other inputs of the same shape, and with a batch of another size, in between."""
    for name in reversed(list(contents)):
        if name == CHANGED_WEIGHTS:
            continue
        yield Step("after calls with other inputs", name, run(port, contents, name))


def same_tensor(port: Side, contents: Contents, dtype: torch.dtype) -> Steps:
    """Modify the tensors of the inputs between two calls, in two ways."""
    inputs = contents[BASE].copy_inputs()
    port.run(inputs)
    for tensor, other in zip(all_tensors(inputs), inputs_of(contents, OTHER), strict=True):
        tensor.copy_(other)
    yield Step("after the tensor of the inputs was modified in place", OTHER, port.run(inputs))
    for tensor, original in zip(all_tensors(inputs), inputs_of(contents, BASE), strict=True):
        tensor.data.copy_(original)  # does not count as a write
    yield Step("after the tensor of the inputs was modified through .data", BASE, port.run(inputs))


def inputs_of(contents: Contents, name: str) -> list[Tensor]:
    """List the tensors of some inputs."""
    return all_tensors(contents[name].situation.inputs)


def own_dtype(port: Side, contents: Contents, dtype: torch.dtype) -> Steps:
    """Call in the dtype of the weights in between."""
    if dtype == torch.float64:
        return
    with cast(port.module, dtype):
        port.run(cast_inputs(contents[BASE].copy_inputs(), dtype))
    yield Step("after a call in another dtype", BASE, run(port, contents, BASE))


def training(port: Side, contents: Contents, dtype: torch.dtype) -> Steps:
    """Call in training mode and with gradients enabled in between."""
    with in_training_mode(port.module), torch.no_grad():
        port.call(port.module, contents[BASE].copy_inputs())
    yield Step("after train() and eval()", BASE, run(port, contents, BASE))
    with torch.enable_grad():
        port.call(port.module, contents[BASE].copy_inputs())
    yield Step("after a call with gradients enabled", BASE, run(port, contents, BASE))


def overwritten_outputs(port: Side, contents: Contents, dtype: torch.dtype) -> Steps:
    """Overwrite the outputs of an earlier call; restore them, lest later checks fail, too."""
    outputs = run(port, contents, BASE)
    with torch.inference_mode():
        originals = {name: output.clone() for name, output in outputs.items()}
        for output in outputs.values():
            output.zero_()
        repeated = run(port, contents, BASE)
        copies = {name: output.clone() for name, output in repeated.items()}
        for name, output in outputs.items():
            output.copy_(originals[name])
    yield Step("after the outputs of an earlier call were overwritten", BASE, copies)


def changed_weights(port: Side, contents: Contents, dtype: torch.dtype) -> Steps:
    """Change the weights between calls: in place, by load_state_dict and through .data."""
    parameters = list(parameters_of(port.module).values())
    if not parameters:
        return
    originals = [parameter.detach().clone() for parameter in parameters]
    with with_own_weights(port.module):
        run(port, contents, BASE)
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(change_weight(parameter) - parameter)
        state = copy.deepcopy(port.module.state_dict())
        changed = run(port, contents, CHANGED_WEIGHTS)
        yield Step("after its weights were changed in place", CHANGED_WEIGHTS, changed)
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.data = original.clone()
        restored = run(port, contents, BASE)
        yield Step("after its weights were replaced through .data", BASE, restored)
        port.module.load_state_dict(state)
        changed = run(port, contents, CHANGED_WEIGHTS)
        yield Step("after load_state_dict() with other weights", CHANGED_WEIGHTS, changed)
    yield Step("after its weights were restored", BASE, run(port, contents, BASE))


def fixed_weights(port: Side, contents: Contents, dtype: torch.dtype) -> Steps:
    """Change the weights of a model that is not trained, between calls."""
    fixed = [one for one in parameters_of(port.module).values() if one.requires_grad]
    for parameter in fixed:
        parameter.requires_grad_(False)
    try:
        yield from changed_weights(port, contents, dtype)
    finally:
        for parameter in fixed:
            parameter.requires_grad_(True)


def long_run(port: Side, contents: Contents, dtype: torch.dtype) -> Steps:
    """Call many times, mostly with a batch of one, with contents in a changing order."""
    names = []
    for name, content in contents.items():
        small = len(all_tensors(content.situation.inputs)[0]) <= LONG_RUN_BATCH
        if small and name != CHANGED_WEIGHTS:
            names.append(name)
    smallest = min(names, key=lambda name: len(inputs_of(contents, name)[0]))
    for i in range(LONG_RUN):
        name = smallest
        if i % 8 == 7:
            name = names[i // 8 % len(names)]
        yield Step(f"in call {i + 1} of a long run", name, run(port, contents, name))
    yield Step("at the end of a long run", BASE, run(port, contents, BASE))


SCENARIOS: dict[str, Scenario] = {
    "after calls with other inputs": other_inputs,
    "after the tensor of the inputs was modified": same_tensor,
    "after a call in another dtype": own_dtype,
    "after train() and eval()": training,
    "after its weights were changed": changed_weights,
    "after its weights, which need no gradients, were changed": fixed_weights,
    "in a long run": long_run,
    "after the outputs of an earlier call were overwritten": overwritten_outputs,
}
"""Name -> scenario, the most specific ones first."""


class History:
    """Checks that results of a port do not depend on its earlier calls.

    Args:
        port: Port in `eval()` mode.
        calls: The reference's outcomes.
        taps: Taps that name the place of a difference.
        contents: Inputs and expected outputs, by the name of the situation.

    Attributes:
        checked: Number of compared calls.
    """

    def __init__(
        self, port: Side, calls: ReferenceCalls, taps: list[Tap], contents: Contents
    ) -> None:
        self.port = port
        self.calls = calls
        self.taps = taps
        self.contents = contents
        self.checked = 0

    def check(self) -> list[Deviation]:
        """Run all scenarios; return the first deviation of each."""
        if not {BASE, OTHER, CHANGED_WEIGHTS} <= self.contents.keys():
            return []  # the port raises: a finding of its own
        deviations = []
        with cast(self.port.module, self.calls.dtype, torch.float64):
            deviations += self.check_memory()
            for name, scenario in SCENARIOS.items():
                deviations += self.check_scenario(name, scenario)
        return deviations

    def check_memory(self) -> list[Deviation]:
        """Find outputs that share memory with those of another call."""
        first = run(self.port, self.contents, BASE)
        second = run(self.port, self.contents, OTHER)
        deviations = []
        for name in first:
            self.checked += 1
            if name in second and memory_of(first[name]) == memory_of(second[name]):
                message = "two calls return the same memory, so the second overwrites the first"
                remedy = "return a new tensor"
                deviations.append(Deviation("memory", message, "", remedy, name, name))
        return deviations

    def check_scenario(self, name: str, scenario: Scenario) -> list[Deviation]:
        """Run a scenario up to its first deviation."""
        steps = scenario(self.port, self.contents, self.calls.dtype)
        try:
            for number, step in enumerate(steps):
                self.checked += 1
                output, error = self.largest_excess(step)
                if output:
                    steps.close()
                    return [self.deviation(scenario, number, step, output, error)]
        except PORT_ERRORS as error:  # a finding
            place = innermost_module(error, self.port.module)
            reference = port_to_reference(self.taps).get(place, "")
            remedy = describe_error(error)
            place = place or "forward"
            return [Deviation("raises", "raises an error", name, remedy, reference, place)]
        return []

    def largest_excess(self, step: Step) -> tuple[str, float]:
        """Return the first output outside its bound, with its error; empty if none is."""
        content = self.contents[step.content]
        for name, expected in content.outputs.items():
            value = step.outputs[name]
            error = float("inf")
            if value.shape == expected.shape:
                error = relative_error(value, expected)
            if not error <= content.bounds[name]:
                return name, error
        return "", 0.0

    def deviation(
        self, scenario: Scenario, number: int, step: Step, output: str, error: float
    ) -> Deviation:
        """Describe a deviation; its place is the first tap that differs when it is repeated."""
        place = self.locate(scenario, number, step, output)
        message = "differs from a first call"
        remedy = "results must not depend on earlier calls"
        return Deviation("values", message, step.name, remedy, place.reference, place.port, error)

    def locate(self, scenario: Scenario, number: int, step: Step, output: str) -> Tap:
        """Repeat a scenario with taps; return the first one that differs in its last call."""
        if not self.taps:
            return Tap(output, output)
        situation = self.contents[step.content].situation
        points = [tap.reference for tap in self.taps]
        reference = self.calls.host.compute(trace_situation, situation, points, self.calls.dtype)
        trace = CallTrace(self.port, [tap.port for tap in self.taps])
        traced = Side(self.port.module, trace.call)
        steps = scenario(traced, self.contents, self.calls.dtype)
        for _ in range(number + 1):
            next(steps)
        port_taps = trace.taps()
        steps.close()
        bound = max(self.contents[step.content].bounds.values())
        return first_difference(
            output, port_taps, reference, self.taps, lambda error: error <= bound
        )

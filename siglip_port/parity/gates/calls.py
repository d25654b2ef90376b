"""The gate `calls`: what a call does besides computing values for one kind of inputs.

Both sides are called in the same situations: batch sizes, memory formats, dtypes and modes. Then
the port is called repeatedly, with state left by earlier calls (see `call_history`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from siglip_port.parity import bounds
from siglip_port.parity.calls import (
    BASE,
    CHANGED_WEIGHTS,
    TRAINING,
    ReferenceCalls,
    trace_situation,
)
from siglip_port.parity.gates.call_history import Content, History
from siglip_port.parity.gates.deviations import Deviation, first_difference, to_findings
from siglip_port.parity.gates.meaning import MEANING
from siglip_port.parity.metrics import relative_error, tensors_equal
from siglip_port.parity.results import GateResult
from siglip_port.parity.sides import Side, dtype_name
from siglip_port.parity.situations import (
    RANDOM_NUMBERS,
    Outcome,
    Situation,
    Traits,
    parameters_of,
    run_situations,
    same_moments,
    settings_restored,
    state_of_module,
    weight_moments,
)
from siglip_port.parity.taps import Tap, port_to_reference

UPCAST_FACTOR = 10.0
"""How much larger the error of a float32 step may be in one situation than in another."""

CHECKS_PER_OUTCOME = 3  # raises, writes to a tensor, changes a setting
CHECKS_PER_OUTPUT = len(Traits._fields) + 1  # traits and values


def check_calls(port: Side, calls: ReferenceCalls, taps: list[Tap]) -> GateResult:
    """Call a port in all situations of the reference, and repeatedly.

    Args:
        port: Port in `eval()` mode.
        calls: The reference's outcomes.
        taps: Taps that name the place of a difference.
    """
    state = {name: tensor.clone() for name, tensor in state_of_module(port.module).items()}
    outcomes = run_situations(port, list(calls.situations.values()), calls.dtype)
    sides = BothSides(port, calls, outcomes, taps)
    deviations: list[Deviation] = []
    checked = 0
    for name, expected in calls.outcomes.items():
        if not expected.error:
            deviations += compare_outcomes(sides, calls.situations[name])
            checked += CHECKS_PER_OUTCOME + CHECKS_PER_OUTPUT * len(expected.outputs)
    if sides.agree:
        history = History(port, calls, taps, contents_of(sides, deviations))
        with settings_restored():
            deviations += history.check()
        checked += history.checked
    deviations += changed_tensors(port, state)
    checked += len(state)
    findings = to_findings(deviations)
    bound = MEANING["calls"].bound
    return GateResult("calls", checked, bound, tuple(findings), notes=notes_of(sides))


def notes_of(sides: BothSides) -> tuple[str, ...]:
    """Return sentences for the verdict about what was not judged."""
    expected = sides.calls.outcomes[TRAINING]
    if not expected.is_random:
        return not_contiguous(sides)
    text = "training mode not judged: the reference has dropout"
    if not sides.outcomes[TRAINING].is_random:
        text += ", the port has none"
    return (*not_contiguous(sides), text)


def not_contiguous(sides: BothSides) -> tuple[str, ...]:
    """Return a sentence if outputs are not contiguous, unlike the reference's.

    This is no finding: elementwise operations keep the memory format of their inputs, so equal
    formulas differ in it.
    """
    names = []
    for name, expected in sides.calls.outcomes[BASE].traits.items():
        traits = sides.outcomes[BASE].traits.get(name, expected)
        if expected.is_contiguous and not traits.is_contiguous:
            names.append(name)
    if not names:
        return ()
    return (f"not contiguous, unlike the reference's: {', '.join(names)}",)


@dataclass(frozen=True)
class BothSides:
    """Outcomes of both sides in all situations.

    Attributes:
        port: Port.
        calls: The reference's outcomes.
        outcomes: The port's outcomes by the name of the situation.
        taps: Taps that name the place of a difference.
    """

    port: Side
    calls: ReferenceCalls
    outcomes: dict[str, Outcome]
    taps: list[Tap]

    @functools.cached_property
    def agree(self) -> bool:
        """Whether the outputs in the situation `BASE` agree up to float32 steps inside the port.

        If not, `numerics` has the finding, and other situations only show what follows from it.
        """
        expected = self.calls.outcomes[BASE].outputs
        if not expected.keys() <= self.outcomes[BASE].outputs.keys():
            return False
        for name in expected:
            noise = self.reference_noise(torch.float32, name)
            allowed = max(bounds.UPCAST_BOUND, bounds.ROUNDING_FACTOR * noise)
            if not self.base_error(name) <= allowed:
                return False
        return True

    @functools.cached_property
    def have_same_weights(self) -> bool:
        """Whether the port's parameters are the reference's, up to order and shapes.

        Weights that are folded into one another do not change as the reference's do.
        """
        moments = weight_moments(self.port, self.calls.dtype)
        return same_moments(moments, self.calls.moments)

    def base_error(self, output: str) -> float:
        """Return the error of an output of the port in float64."""
        return output_error(self.outcomes[BASE], self.calls.outcomes[BASE], output)

    def reference_noise(self, dtype: torch.dtype, output: str) -> float:
        """Return the rounding error of the reference in a dtype, at least that of one number."""
        unit = torch.finfo(dtype).eps / 2
        rounded = self.calls.outcomes.get(f"in {dtype_name(dtype)}", Outcome())
        if output not in rounded.outputs:
            return unit
        return max(unit, output_error(rounded, self.calls.outcomes[BASE], output))

    def bound(self, dtype: torch.dtype, output: str) -> float:
        """Return the largest difference of an output between port and reference in a dtype."""
        if dtype == torch.float64:
            return max(bounds.FLOAT64_BOUND, UPCAST_FACTOR * self.base_error(output))
        noise = self.reference_noise(dtype, output)
        rounded = self.outcomes[f"in {dtype_name(dtype)}"]
        own = output_error(rounded, self.calls.outcomes[BASE], output)
        return noise + bounds.ROUNDING_FACTOR * max(noise, own)


def output_error(outcome: Outcome, expected: Outcome, output: str) -> float:
    """Return the relative error of an output; infinite if it is missing or of another shape."""
    value = outcome.outputs.get(output)
    exact = expected.outputs[output]
    if value is None or value.shape != exact.shape:
        return float("inf")
    return relative_error(value, exact)


def compare_outcomes(sides: BothSides, situation: Situation) -> Iterator[Deviation]:
    """Yield the deviations of the port in one situation.

    Of the outputs whose values differ, only the first one counts; the others follow from it.
    """
    outcome = sides.outcomes[situation.name]
    expected = sides.calls.outcomes[situation.name]
    if outcome.error:
        yield raised(sides, situation, outcome)
        return
    yield from compare_effects(sides, situation)
    differing = None
    for name in expected.outputs:
        if name not in outcome.outputs:
            continue  # a finding of the gate `numerics`
        yield from compare_traits(sides, situation, name)
        if situation.has_values and sides.agree and differing is None:
            differing = compare_values(sides, situation, name)
    if differing is not None:
        yield differing


def raised(sides: BothSides, situation: Situation, outcome: Outcome) -> Deviation:
    """Return the deviation of a call that raised an error, with the innermost module."""
    reference = port_to_reference(sides.taps).get(outcome.place, "")
    place = outcome.place or "forward"
    return Deviation("raises", "raises an error", situation.name, outcome.error, reference, place)


def compare_effects(sides: BothSides, situation: Situation) -> Iterator[Deviation]:
    """Yield what the call changed beside its outputs, unless the reference changes it, too.

    Random numbers that show in the outputs are findings of the gate `sensitivity`.
    """
    outcome = sides.outcomes[situation.name]
    expected = sides.calls.outcomes[situation.name]
    for name in outcome.written:
        if name in expected.written:
            continue
        message = f"a call writes to {name}"
        if name.startswith("input "):
            remedy = "copy it before the first operation in place"
            yield Deviation("writes", message, situation.name, remedy, "inputs", "inputs")
        else:
            yield Deviation("writes", "a call writes to it", situation.name, port=name)
    for name in outcome.settings:
        is_shown = name == RANDOM_NUMBERS and not sides.agree
        if name not in expected.settings and not is_shown:
            remedy = "restore it before the call returns"
            message = f"a call changes {name} of torch"
            yield Deviation(name, message, situation.name, remedy, port="forward")


def compare_traits(sides: BothSides, situation: Situation, output: str) -> Iterator[Deviation]:
    """Yield the traits in which an output differs.

    Outputs that require no gradients are left to the gate `gradients`.
    """
    traits = sides.outcomes[situation.name].traits[output]
    expected = sides.calls.outcomes[situation.name].traits[output]
    for kind, message, remedy in differing_traits(traits, expected):
        if kind != "dtype" or follows_dtype(sides, situation):
            yield Deviation(kind, message, situation.name, remedy, output, output)


def differing_traits(traits: Traits, expected: Traits) -> Iterator[tuple[str, str, str]]:
    """Yield kind, message and remedy of the traits that differ."""
    if traits.dtype != expected.dtype:
        remedy = f"expected {dtype_name(expected.dtype)} as the reference's"
        yield "dtype", f"has dtype {dtype_name(traits.dtype)}", remedy
    if traits.shape != expected.shape:
        remedy = f"expected {list(expected.shape)} as the reference's"
        yield "shape", f"has shape {list(traits.shape)}", remedy
    if traits.requires_grad and not expected.requires_grad:
        yield "requires_grad", "requires gradients", "the reference's does not"
    if expected.on_input_device and not traits.on_input_device:
        yield "device", "is not on the device of the inputs", "the reference's is"
    if traits.type_name != expected.type_name:
        yield "type", f"is a {traits.type_name}", f"expected a {expected.type_name}"
    if traits.shares and not expected.shares:
        yield "shares", f"shares memory with {traits.shares}", "return a copy"


def follows_dtype(sides: BothSides, situation: Situation) -> bool:
    """Return whether the port has the dtype of the situation: one without parameters has its own.

    It is judged in the dtype of the weights only.
    """
    if situation.dtype == sides.calls.dtype:
        return True
    return any(p.is_floating_point() for p in parameters_of(sides.port.module).values())


def compare_values(sides: BothSides, situation: Situation, output: str) -> Deviation | None:
    """Return the deviation of an output whose values differ, with its place."""
    outcome = sides.outcomes[situation.name]
    expected = sides.calls.outcomes[situation.name]
    if outcome.outputs[output].shape != expected.outputs[output].shape:
        return None  # a deviation of its traits
    if situation.changed_weights and not sides.have_same_weights:
        return compare_with_unchanged(sides, situation, output)
    if expected.is_random or outcome.is_random:
        return compare_randomness(sides, situation, output)
    error = output_error(outcome, expected, output)
    bound = sides.bound(situation.dtype, output)
    if error <= bound:
        return None
    place = locate(sides, situation, output, bound)
    message = "differs from the reference"
    remedy = f"bound {bound:.1e}"
    return Deviation("values", message, situation.name, remedy, place.reference, place.port, error)


def compare_with_unchanged(sides: BothSides, situation: Situation, output: str) -> Deviation | None:
    """Return the deviation of an output that other weights do not change."""
    value = sides.outcomes[situation.name].outputs[output]
    if not parameters_of(sides.port.module):
        return None
    if not tensors_equal(value.flatten(), sides.outcomes[BASE].outputs[output].flatten()):
        return None
    message = "is the same as before"
    return Deviation("values", message, situation.name, "a cache is stale", output, output)


def compare_randomness(sides: BothSides, situation: Situation, output: str) -> Deviation | None:
    """Return the deviation of an output that only the port draws at random.

    A port may lack the dropout of its reference: see `notes_of`.
    """
    is_random = sides.outcomes[situation.name].is_random
    expected = sides.calls.outcomes[situation.name].is_random
    if expected or not is_random:
        return None
    place = locate(sides, situation, output, sides.bound(situation.dtype, output))
    message = "differs between two calls"
    remedy = "the reference's is the same; is there a dropout that the reference lacks?"
    return Deviation("random", message, situation.name, remedy, place.reference, place.port)


def locate(sides: BothSides, situation: Situation, output: str, bound: float) -> Tap:
    """Return the first tap that differs in a situation in which an output does."""
    if not sides.taps:
        return Tap(output, output)
    calls = sides.calls
    points = [tap.reference for tap in sides.taps]
    reference = calls.host.compute(trace_situation, situation, points, calls.dtype)
    port_points = [tap.port for tap in sides.taps]
    port = trace_situation(sides.port, situation, port_points, calls.dtype)
    return first_difference(output, port.taps, reference, sides.taps, lambda error: error <= bound)


def contents_of(sides: BothSides, deviations: list[Deviation]) -> dict[str, Content]:
    """Return inputs of repeated calls, with the outputs that are expected each time.

    These are the reference's, or the port's own where they are known to differ.
    """
    differing = {deviation.situation for deviation in deviations}
    contents = {}
    for name, situation in sides.calls.situations.items():
        if situation.dtype != torch.float64 or not situation.has_values:
            continue
        if situation.memory != "contiguous" or situation.training or situation.mode == "no_grad":
            continue
        outcome = sides.outcomes[name]
        if outcome.error or sides.calls.outcomes[name].error:
            continue
        is_known = name != CHANGED_WEIGHTS or sides.have_same_weights
        expected: Mapping[str, Tensor] = outcome.outputs
        if is_known and name not in differing:
            expected = sides.calls.outcomes[name].outputs
        shared = [output for output in expected if output in outcome.outputs]
        bound = {output: sides.bound(torch.float64, output) for output in shared}
        contents[name] = Content(situation, {output: expected[output] for output in shared}, bound)
    return contents


def changed_tensors(port: Side, state: Mapping[str, Tensor]) -> Iterator[Deviation]:
    """Yield the tensors of the port that have other values after all calls."""
    after = state_of_module(port.module)
    for name, before in state.items():
        if name not in after or not tensors_equal(after[name].flatten(), before.flatten()):
            yield Deviation("state", "is changed by calls of the port", port=name)

"""The gate `gradients`: both sides have the same gradients in float64.

A wrong step of the backward pass makes all gradients before it wrong. To find it, the pass is
repeated with the reference's gradient at every tap (teacher forcing), so that only wrong steps
differ.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from siglip_port.parity import bounds
from siglip_port.parity.calls import CallTrace
from siglip_port.parity.gates.deviations import first_difference
from siglip_port.parity.gates.meaning import MEANING
from siglip_port.parity.gradients import (
    ExpectedGradient,
    Gradients,
    GradientTaps,
    ReferenceGradients,
    backpropagate,
    expected_gradients,
)
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.results import Finding, GateResult
from siglip_port.parity.sides import Side, Weights, cast
from siglip_port.parity.situations import in_training_mode, parameters_of
from siglip_port.parity.taps import Tap


@dataclass(frozen=True)
class Tolerance:
    """Largest difference of a gradient.

    Attributes:
        bound: Largest relative error.
        negligible: Root mean square of a gradient, relative to that of all, below which it may be
            rounding. That of the bias of the keys is zero, for example.
    """

    bound: float
    negligible: float


EXACT = Tolerance(bounds.GRADIENT_BOUND, 1e-6)
WITH_FLOAT32_STEPS = Tolerance(bounds.GRADIENT_UPCAST_BOUND, 1e-3)

IN_PLACE = "modified by an inplace operation"
"""Part of torch's message for a forward pass that is right, but leaves nothing to differentiate."""


NOT_DIFFERENTIABLE = "is not implemented"
"""Part of torch's message for an operator without a derivative."""


def check_gradients(
    port: Side, run: ReferenceGradients, taps: list[Tap], weights: Weights | None = None
) -> GateResult:
    """Compare the gradients of a port with the reference's.

    Args:
        port: Port in `eval()` mode.
        run: Gradients of the reference.
        taps: Taps that name the place of a difference.
        weights: Function that returns the port's tensors under the names of the reference's
            `state_dict`; None to match parameters by their values.
    """
    flags = {name: p.requires_grad for name, p in parameters_of(port.module).items()}
    with cast(port.module, run.dtype, torch.float64):
        check = GradientCheck(port, run, taps, weights)
        check.evaluate(flags)
    return GateResult(
        "gradients",
        check.checked,
        MEANING["gradients"].bound,
        tuple(check.findings),
        notes=check.notes,
    )


@dataclass
class GradientCheck:
    """State of the gate while it runs.

    Attributes:
        port: Port in float64.
        run: Gradients of the reference.
        taps: Taps that name the place of a difference.
        weights: Function that returns the port's tensors under the reference's names.
        tolerance: Largest difference of a gradient.
        findings: Failed checks.
        checked: Number of checks.
        not_judged: Reason why gradients were not compared, or which; empty if all were.
    """

    port: Side
    run: ReferenceGradients
    taps: list[Tap]
    weights: Weights | None
    tolerance: Tolerance = EXACT
    findings: list[Finding] = field(default_factory=list)
    checked: int = 0
    not_judged: str = ""

    def evaluate(self, flags: Mapping[str, bool]) -> None:
        """Compare gradients in eval mode, in training mode and with checkpointing.

        Args:
            flags: Whether each parameter of the port is trainable as loaded.
        """
        self.checked += max(1, len(self.run.gradients.outputs))
        if not self.run.gradients.differentiable:
            reason = self.run.gradients.error or "it returns outputs without gradients"
            self.not_judged = f"the reference has none ({reason})"
            return
        gradients = self.backpropagate()
        if not self.can_be_judged(gradients):
            return
        expected = self.run.gradients
        missing = [name for name in expected.differentiable if name not in gradients.differentiable]
        if missing:
            self.judge_missing(missing, gradients.differentiable)
            return
        parameters = expected_gradients(self.port.module, self.run, expected, self.weights)
        self.findings += untrained_parameters(flags, parameters, self.run)
        comparison = GradientComparison(expected, parameters, self.tolerance)
        self.checked += comparison.count
        if comparison.differ(gradients):
            self.findings += self.locate(comparison, gradients)
        elif self.run.trains_alike:
            self.compare_in_training(comparison)

    def judge_missing(self, missing: list[str], differentiable: tuple[str, ...]) -> None:
        """Judge outputs without gradients, while others have some.

        One that follows outputs with gradients has lost them. If the first outputs have none, the
        port computes them without, as one without any gradients does.
        """
        names = self.run.gradients.differentiable
        for name in missing:
            if any(names.index(other) < names.index(name) for other in differentiable):
                message = "has no gradients, expected some as in the reference and earlier outputs"
                self.findings.append(Finding(message, name, name))
        if not self.findings:
            self.not_judged = f"the port returns {', '.join(missing)} without gradients"

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentence for the verdict about gradients that were not compared."""
        if not self.not_judged:
            return ()
        return (f"gradients not judged: {self.not_judged}",)

    def backpropagate(self) -> Gradients:
        """Run the port forward and backward."""
        return backpropagate(self.port, self.run.inputs, GradientTaps([]))

    def can_be_judged(self, gradients: Gradients) -> bool:
        """Return whether gradients can be compared; add findings, or the reason why not."""
        if gradients.error:
            if gradients.outputs and IN_PLACE in gradients.error:
                self.not_judged = "the port has no backward pass, as it works in place"
            elif gradients.outputs and self.may_lack_backward(gradients):
                self.not_judged = f"the port has no backward pass ({gradients.error})"
            else:
                step = "in its backward pass" if gradients.outputs else "with gradients enabled"
                place = "backward" if gradients.outputs else "forward"
                message = f"raises an error {step}; {gradients.error}"
                self.findings.append(Finding(message, port=place))
            return False
        if not self.outputs_agree(gradients.outputs):
            return False
        if not gradients.differentiable:
            self.not_judged = "the port returns all outputs without gradients"
            return False
        return True

    def may_lack_backward(self, gradients: Gradients) -> bool:
        """Return whether an error of the backward pass is a limit of the port in float64 only.

        An operator may have no derivative, and a step of a fixed dtype none in float64.
        """
        is_limit = NOT_DIFFERENTIABLE in gradients.error
        is_fixed = self.outputs_agree(gradients.outputs) and self.tolerance is WITH_FLOAT32_STEPS
        return is_limit or is_fixed

    def outputs_agree(self, outputs: Mapping[str, Tensor]) -> bool:
        """Return whether outputs with gradients enabled are the reference's.

        If they differ without gradients, too, the gate `numerics` has the finding.
        """
        errors = output_errors(outputs, self.run.gradients.outputs)
        if max(errors.values()) <= bounds.FLOAT64_BOUND:
            return True
        plain = output_errors(self.port.run(self.run.inputs), self.run.gradients.outputs)
        for name, error in errors.items():
            if not math.isfinite(plain[name]):
                continue
            if not error <= max(bounds.FLOAT64_BOUND, 10 * plain[name]):
                self.findings.append(self.locate_output(name, error))
                return False
        if max(plain.values()) <= bounds.FLOAT32_MODEL_BOUND:
            self.tolerance = WITH_FLOAT32_STEPS
            return True
        self.not_judged = "the outputs differ"
        return False

    def locate_output(self, name: str, error: float) -> Finding:
        """Return the finding for an output that differs with gradients enabled only."""
        place = Tap(name, name)
        if self.taps:
            points = [tap.port for tap in self.taps]
            reference = self.run.record()
            port = taps_with_gradients(self.port, self.run, points)
            place = first_difference(name, port, reference, self.taps, bounds.within_float64_bound)
        message = f"differs with gradients enabled only; bound {bounds.FLOAT64_BOUND:g}"
        return Finding(message, place.reference, place.port, error)

    def compare_in_training(self, comparison: GradientComparison) -> None:
        """Compare gradients in training mode, and with gradient checkpointing."""
        module = self.port.module
        with in_training_mode(module):
            agrees = self.compare_once(comparison, "in training mode", has_checkpoints=False)
            if self.findings or not agrees:
                return
            with checkpointing(module) as is_enabled:
                if is_enabled:
                    situation = "with gradient checkpointing"
                    self.compare_once(comparison, situation, has_checkpoints=True)

    def compare_once(
        self, comparison: GradientComparison, situation: str, *, has_checkpoints: bool
    ) -> bool:
        """Compare gradients in one situation in which the reference's are the same.

        Returns:
            Whether the outputs are the reference's.
        """
        gradients = self.backpropagate()
        self.checked += comparison.count
        if gradients.error and self.tolerance is WITH_FLOAT32_STEPS:
            # Steps of a fixed dtype cannot always be repeated in a model that was cast to float64.
            self.not_judged = f"{situation}, the port raises {gradients.error} in float64"
            return False
        if gradients.error:
            message = f"raises an error {situation}; {gradients.error}"
            self.findings.append(Finding(message, port="backward"))
            return False
        errors = output_errors(gradients.outputs, self.run.gradients.outputs)
        if not max(errors.values()) <= bounds.FLOAT32_MODEL_BOUND:
            if has_checkpoints:  # otherwise, a finding of the gate `calls`
                name = max(errors, key=errors.__getitem__)
                self.findings.append(
                    Finding(f"differs {situation}; bound 1e-05", name, name, errors[name])
                )
            return False
        if comparison.differ(gradients):
            located = [comparison.joint_finding(gradients)]
            if not has_checkpoints:  # which call modules again in the backward pass
                located = self.locate(comparison, gradients)
            for finding in located:
                message = f"{situation}: {finding.message}"
                self.findings.append(replace(finding, message=message))
        return True

    def locate(self, comparison: GradientComparison, gradients: Gradients) -> list[Finding]:
        """Return findings for the steps whose backward pass is wrong; otherwise for parameters."""
        reference = self.run.gradients
        forced = {}
        for tap in self.taps:
            gradient = reference.taps.get(tap.reference)
            if gradient is not None:
                forced[tap.port] = gradient
        if forced:
            taps = GradientTaps([tap.port for tap in self.taps], forced)
            isolated = backpropagate(self.port, self.run.inputs, taps)
            if not isolated.error:
                findings = wrong_steps(self.taps, reference, isolated, self.tolerance)
                tapped = {tap.reference for tap in self.taps}
                findings += comparison.parameter_findings(isolated, findings, tapped)
                if findings:
                    return findings
        return [comparison.joint_finding(gradients)]


@contextlib.contextmanager
def checkpointing(module: object) -> Iterator[bool]:
    """Enable gradient checkpointing; yield whether the module has it, and it was disabled."""
    enable = getattr(module, "gradient_checkpointing_enable", None)
    disable = getattr(module, "gradient_checkpointing_disable", None)
    if getattr(module, "is_gradient_checkpointing", False) or not callable(disable):
        yield False
        return
    if not callable(enable):
        yield False
        return
    enable()
    try:
        yield True
    finally:
        disable()


def output_errors(
    outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return the relative error of every output; infinite for another shape, 0 if it is missing.

    Missing outputs are findings of the gate `numerics`.
    """
    errors = {}
    for name, exact in expected.items():
        value = outputs.get(name)
        if value is None:
            errors[name] = 0.0
        elif value.shape != exact.shape:
            errors[name] = math.inf
        else:
            errors[name] = relative_error(value, exact)
    return errors


def taps_with_gradients(
    port: Side, run: ReferenceGradients, points: list[str]
) -> dict[str, Tensor]:
    """Run the port in float64 with gradients enabled; return its taps."""
    trace = CallTrace(port, points)
    with torch.enable_grad():
        trace.call(port.module, run.inputs)
    return trace.taps()


def untrained_parameters(
    flags: Mapping[str, bool], expected: Mapping[str, ExpectedGradient], run: ReferenceGradients
) -> Iterator[Finding]:
    """Yield the parameters that are frozen in the port only, unless all of its are."""
    if not any(flags.values()):
        return
    for name, parameter in expected.items():
        trainable = [run.parameters[part].requires_grad for part in parameter.names]
        if all(trainable) and not flags[name]:
            message = "requires_grad is False, expected True as in the reference"
            yield Finding(message, parameter.names[0], name)


# --- comparison of gradients ----------------------------------------------------------------------


@dataclass(frozen=True)
class GradientComparison:
    """Expected gradients of inputs and parameters.

    Attributes:
        reference: Gradients of the reference.
        parameters: Expected gradients by the port's names.
        tolerance: Largest difference of a gradient.
    """

    reference: Gradients
    parameters: Mapping[str, ExpectedGradient]
    tolerance: Tolerance

    @property
    def count(self) -> int:
        """Number of gradients to compare."""
        return len(self.parameters) + len(self.reference.inputs)

    @property
    def rounding(self) -> float:
        """Root mean square of a gradient that may be rounding."""
        tensors = [parameter.gradient for parameter in self.parameters.values()]
        return self.tolerance.negligible * root_mean_square(tensors)

    def differ(self, gradients: Gradients) -> bool:
        """Return whether any gradient is outside its bound."""
        return bool(self.wrong_inputs(gradients) or self.wrong_parameters(gradients))

    def wrong_inputs(self, gradients: Gradients) -> list[float]:
        """Return the errors of the gradients of inputs that differ."""
        errors = []
        for value, expected in zip(gradients.inputs, self.reference.inputs, strict=True):
            if expected is None:
                continue
            error = gradient_error(value, expected, 0.0)
            if not error <= self.tolerance.bound:
                errors.append(error)
        return errors

    def wrong_parameters(self, gradients: Gradients) -> dict[str, float]:
        """Return the port's parameters whose gradients differ -> relative error."""
        rounding = self.rounding
        errors = {}
        for name, expected in self.parameters.items():
            value = gradients.parameters.get(name)
            error = gradient_error(value, expected.gradient, rounding)
            if not error <= self.tolerance.bound:
                errors[name] = error
        return errors

    def parameter_findings(
        self, gradients: Gradients, steps: list[Finding], tapped: set[str]
    ) -> list[Finding]:
        """Return a finding per parameter whose gradient differs on its own.

        Args:
            gradients: Gradients of the teacher-forced pass.
            steps: Findings of wrong steps; with these, only parameters count that belong to another
                tapped module, as others may have got a wrong gradient.
            tapped: Modules with a tap.
        """
        findings = []
        for name, error in self.wrong_parameters(gradients).items():
            value = gradients.parameters.get(name)
            expected = self.parameters[name]
            module = expected.names[0].rpartition(".")[0]
            is_inside = any(f"{module}.".startswith(f"{step.reference}.") for step in steps)
            follows = is_inside or value is None or module not in tapped
            if steps and follows:
                continue
            place = Tap(expected.names[0], name)
            findings.append(gradient_finding(place, value, expected.gradient, error))
        return findings

    def joint_finding(self, gradients: Gradients) -> Finding:
        """Return one finding for all gradients: the last parameter, as errors spread backward."""
        errors = self.wrong_parameters(gradients)
        if not errors:
            error = max(self.wrong_inputs(gradients))
            return Finding("the gradient of the inputs differs", "inputs", "inputs", error)
        name = list(errors)[-1]
        expected = self.parameters[name]
        value = gradients.parameters.get(name)
        place = Tap(expected.names[0], name)
        finding = gradient_finding(place, value, expected.gradient, errors[name])
        if len(errors) == 1:
            return finding
        message = f"{finding.message}, and so do those of {len(errors) - 1} more parameters"
        return replace(finding, message=message)


def root_mean_square(tensors: list[Tensor]) -> float:
    """Return the root mean square of all elements; 0 without any."""
    count = sum(tensor.numel() for tensor in tensors)
    squares = sum(float(tensor.square().sum()) for tensor in tensors)
    return math.sqrt(squares / count) if count else 0.0


def gradient_error(value: Tensor | None, expected: Tensor, rounding: float) -> float:
    """Return the relative error of a gradient.

    Args:
        value: Gradient of the port; None counts as zeros.
        expected: Expected gradient.
        rounding: Root mean square of a gradient that may be rounding; a smaller one is judged as if
            it were of this size.
    """
    norm = max(float(expected.norm()), rounding * math.sqrt(expected.numel()))
    if norm == 0:
        return 0.0
    if value is None:
        return float(expected.norm()) / norm
    if value.shape != expected.shape:
        return math.inf
    difference = value - expected
    if expected.ndim == 2:
        # A table without gradient in some rows, such as that of padding tokens, excludes them.
        difference = difference * expected.any(dim=1, keepdim=True)
    return float(difference.norm()) / norm


@dataclass(frozen=True)
class WrongTap:
    """Tap at which a wrong gradient arrives.

    Attributes:
        tap: Tap.
        value: Gradient of the port; None if none arrives.
        expected: Gradient of the reference.
        error: Relative error.
    """

    tap: Tap
    value: Tensor | None
    expected: Tensor
    error: float


def wrong_steps(
    taps: list[Tap], reference: Gradients, port: Gradients, tolerance: Tolerance
) -> list[Finding]:
    """Return findings for the steps of the backward pass that are wrong, the last step first.

    Gradients that were lost at one step are missing before it, too, up to the next tap that gets
    some; from there on, it has the reference's.

    Args:
        taps: Taps.
        reference: Gradients of the reference.
        port: Gradients of the port in the teacher-forced pass.
        tolerance: Largest difference of a gradient.
    """
    gradients = [gradient for gradient in reference.taps.values() if gradient is not None]
    rounding = tolerance.negligible * root_mean_square(gradients)
    findings = []
    is_lost = False
    for group in reversed(taps_by_tensor(taps, reference, port)):
        wrong = wrong_taps(group, reference, port, tolerance.bound, rounding)
        if wrong and not is_lost:
            worst = wrong[-1]
            place = wrong_step(taps, group, wrong, reference)
            findings.append(gradient_finding(place, worst.value, worst.expected, worst.error))
        is_lost = any(tap.value is None for tap in wrong)
    return findings


def taps_by_tensor(taps: list[Tap], reference: Gradients, port: Gradients) -> list[list[Tap]]:
    """Group the taps that are one tensor of the reference, in order of computation.

    Taps without a gradient of the reference are left out, and so are those that the port does not
    reach.
    """
    port_points = {tap.reference: tap.port for tap in taps}
    groups: dict[str, list[Tap]] = {}
    for point, gradient in reference.taps.items():
        port_point = port_points.get(point, "")
        if gradient is not None and port_point in port.taps:
            first = reference.aliases.get(point, point)
            groups.setdefault(first, []).append(Tap(point, port_point))
    order = list(reference.taps)
    return sorted(groups.values(), key=lambda group: order.index(group[0].reference))


def wrong_taps(
    group: list[Tap], reference: Gradients, port: Gradients, bound: float, rounding: float
) -> list[WrongTap]:
    """Return the taps of one tensor at which the port's gradient differs or is missing.

    One of another shape is not compared: a port may call a module in parts.
    """
    wrong = []
    for tap in group:
        value = port.taps[tap.port]
        expected = reference.taps[tap.reference]
        assert expected is not None  # see `taps_by_tensor`
        error = gradient_error(value, expected, rounding)
        if bound < error < math.inf:
            wrong.append(WrongTap(tap, value, expected, error))
    missing = [tap for tap in wrong if tap.value is None]
    return missing or wrong


def wrong_step(
    taps: list[Tap], group: list[Tap], wrong: list[WrongTap], reference: Gradients
) -> Tap:
    """Return the step whose backward pass gives a wrong gradient to a tensor.

    It is the one after the last tap that is wrong: another tap of the same tensor, or what is
    computed from it. If no gradient arrives, it was lost right after the tap.
    """
    last = wrong[-1]
    position = group.index(last.tap)
    if position + 1 < len(group):
        return group[position + 1]
    if last.value is None:
        return last.tap
    consumer = reference.consumers.get(group[0].reference)
    for tap in taps:
        if tap.reference == consumer:
            return tap
    return last.tap


def gradient_finding(place: Tap, value: Tensor | None, expected: Tensor, error: float) -> Finding:
    """Return the finding for a gradient that differs or is missing."""
    hint = explain(value, expected)
    if value is None:
        message = "has no gradient, expected one as in the reference"
        return Finding(message, place.reference, place.port, hint=hint)
    message = "its gradient differs in float64"
    return Finding(message, place.reference, place.port, error, hint)


def explain(value: Tensor | None, expected: Tensor) -> str:
    """Return a bug that explains a wrong gradient; empty if none does."""
    if value is None:
        return "detach(), no_grad() or .data after this step"
    if value.shape != expected.shape or not expected.any():
        return ""
    if not value.any():
        return "zero gradient"
    factor = float((value * expected).sum() / expected.square().sum())
    if float((value - factor * expected).norm()) <= bounds.GRADIENT_BOUND * float(value.norm()):
        return f"{factor:.4g}x the reference's gradient"
    return ""

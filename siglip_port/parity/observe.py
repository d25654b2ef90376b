"""Run the reference, in float64 and in its own dtype, and compare runs of either side with it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from siglip_port.parity import bounds
from siglip_port.parity.metrics import (
    ErrorMeter,
    ErrorStatistics,
    RelativeError,
    is_finite,
    share_of_differences,
)
from siglip_port.parity.roughness import roughness
from siglip_port.parity.sides import (
    Inputs,
    ReferenceHost,
    Sample,
    Side,
    cast,
    cast_inputs,
    clone_inputs,
    dtype_name,
)
from siglip_port.parity.taps import Recording, join, record, tap_hooks
from siglip_port.text import fold_blocks

NEVER_CALLED = "the port never calls this module"
OTHER_SHAPES = "the port calls this module with other shapes"


@dataclass(frozen=True)
class Observation:
    """Exact results of the reference, and its rounding error.

    Attributes:
        exact: Outputs and taps in float64.
        noise: Rounding error of the reference in a dtype at every tap and output; the largest over
            its attention implementations.
        outputs: Outputs in that dtype, by attention implementation.
    """

    exact: Recording
    noise: dict[str, RelativeError]
    outputs: dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class ReferenceRun:
    """Observation of the reference on some inputs, and where to compute more.

    Attributes:
        host: Place of the reference.
        dtype: Dtype to which weights and inputs are rounded in all runs.
        inputs: Inputs in `dtype`.
        observation: Results.
        statistics: Cached errors of the reference on perturbed inputs, by points.
    """

    host: ReferenceHost
    dtype: torch.dtype
    inputs: Inputs
    observation: Observation
    statistics: dict[tuple[str, ...], dict[str, ErrorStatistics]] = field(default_factory=dict)

    @property
    def exact(self) -> Recording:
        """Outputs and taps in float64."""
        return self.observation.exact

    @property
    def noise(self) -> dict[str, RelativeError]:
        """Rounding error of the reference at every tap and output."""
        return self.observation.noise

    @property
    def outputs(self) -> dict[str, dict[str, Tensor]]:
        """Outputs in `dtype`, by attention implementation."""
        return self.observation.outputs

    @property
    def exact_inputs(self) -> Inputs:
        """Inputs in float64."""
        return cast_inputs(self.inputs, torch.float64)

    @functools.cached_property
    def points(self) -> list[str]:
        """Names of all comparisons, taps and outputs, in order of computation."""
        return order_of_computation(self.exact)

    def record(self, sample: Sample) -> Recording:
        """Run the reference in float64 on a sample."""
        return self.host.compute(record_exactly, sample, list(self.exact.taps), self.dtype)


def order_of_computation(exact: Recording) -> list[str]:
    """List taps and outputs in order: an output follows the tap whose tensor it is, or all taps."""
    points = list(exact.taps)
    for name, output in exact.outputs.items():
        position = len(points)
        for tap, tensor in exact.taps.items():
            if tensor.dtype == output.dtype and torch.equal(tensor, output):
                position = points.index(tap) + 1
                break
        points.insert(position, name)
    return list(dict.fromkeys(points))


def run_reference(
    host: ReferenceHost,
    inputs: Inputs,
    points: list[str],
    dtype: torch.dtype,
    attentions: tuple[str, ...] | None = None,
) -> ReferenceRun:
    """Run the reference once in float64, and once in `dtype` with each attention implementation.

    Args:
        host: Reference in `eval()` mode.
        inputs: Inputs of any floating point dtype.
        points: Points to record.
        dtype: Dtype to which weights and inputs are rounded.
        attentions: Attention implementations whose rounding error counts; None for all of them.

    Raises:
        ValueError: The weights or results contain NaN or Inf, an output is all zeros, or a
            step of the float64 run is in float32.
    """
    inputs = cast_inputs(inputs, dtype)
    observation = host.compute(observe, inputs, points, dtype, attentions)
    return ReferenceRun(host, dtype, inputs, observation)


def observe(
    reference: Side,
    inputs: Inputs,
    points: list[str],
    dtype: torch.dtype,
    attentions: tuple[str, ...] | None,
) -> Observation:
    """Run the reference in float64 and in `dtype`: see `run_reference`."""
    reference.set_attention(reference.attentions[0])
    exact = run_exactly(reference, inputs, points, dtype)
    observation = Observation(exact, noise={}, outputs={})
    for attention in attentions or reference.attentions:
        reference.set_attention(attention)
        measure_noise(reference, inputs, dtype, attention, observation)
    reference.set_attention(reference.attentions[0])
    return observation


def run_exactly(
    reference: Side, inputs: Inputs, points: list[str], dtype: torch.dtype
) -> Recording:
    """Run the reference in float64 on weights and inputs rounded to `dtype`."""
    exact_inputs = cast_inputs(inputs, torch.float64)
    with cast(reference.module, dtype, torch.float64):
        check_weights_finite(reference.module, dtype)
        exact = record_defined(reference, exact_inputs, points)
        check_comparable(exact)
        check_float64_throughout(reference, exact_inputs, exact.outputs)
    return exact


def record_exactly(
    reference: Side, sample: Sample, points: list[str], dtype: torch.dtype
) -> Recording:
    """Run the reference in float64 on a sample and weights rounded to `dtype`, without checks."""
    with cast(reference.module, dtype, torch.float64):
        sample.scale_weights(reference.module)
        return record_defined(reference, sample.inputs, points)


def record_defined(reference: Side, inputs: Inputs, points: list[str]) -> Recording:
    """Run the reference and record its tensors, and the positions at which they are defined."""
    recording = record(reference.module, points, lambda: reference.run(inputs))
    return replace(recording, defined=reference.find_defined(inputs))


def check_weights_finite(reference: nn.Module, dtype: torch.dtype) -> None:
    """Raise ValueError if a weight is not finite: NaN on both sides hides every difference."""
    names = [name for name, weight in reference.named_parameters() if not is_finite(weight)]
    if names:
        raise ValueError(
            f"the reference's weights contain NaN or Inf in {dtype_name(dtype)} "
            f"({', '.join(fold_blocks(names))}), expected finite values; use other weights or a "
            "wider dtype"
        )


def check_comparable(exact: Recording) -> None:
    """Raise ValueError if a tensor is not finite or all zeros: such values match anything."""
    for name, tensor in {**exact.outputs, **exact.taps}.items():
        if not is_finite(tensor):
            raise ValueError(
                f"the reference computes NaN or Inf in float64 ({name}), expected finite "
                "values; check the inputs, and use smaller weights"
            )
        if tensor.is_floating_point() and not tensor.any():
            raise ValueError(
                f"the reference computes only zeros ({name}), which cannot show a difference; "
                "fill its weights with siglip_port.parity.randomize"
            )


def check_float64_throughout(
    reference: Side, inputs: Inputs, outputs: Mapping[str, Tensor]
) -> None:
    """Raise ValueError if a step of the float64 run is in float32."""
    for name, size in roughness(reference, inputs, outputs).items():
        if size > bounds.FLOAT64_BOUND:
            raise ValueError(
                f"the reference does not compute in float64 throughout ({name} has rounding of "
                f"{size:.0e}, expected at most {bounds.FLOAT64_BOUND:g}); use sdpa if it is a "
                "transformers model, whose eager attention has a float32 softmax"
            )


def measure_noise(
    reference: Side, inputs: Inputs, dtype: torch.dtype, attention: str, observation: Observation
) -> None:
    """Run the reference in `dtype`, and add its outputs and its rounding error at every point."""
    exact = observation.exact
    with cast(reference.module, dtype):
        own_points = dict(zip(exact.taps, exact.taps, strict=True))
        rounded = compare_run(reference, inputs, exact, own_points)
    observation.outputs[attention] = rounded.outputs
    noise = observation.noise
    for name, error in rounded.errors.items():
        if not math.isfinite(error.overall):
            raise ValueError(
                f"the reference computes NaN or Inf in {dtype_name(dtype)} ({name}), "
                "expected finite values; use a wider dtype or smaller weights"
            )
        previous = noise.get(name, RelativeError(0.0, 0.0))
        noise[name] = RelativeError(
            max(error.overall, previous.overall), max(error.worst, previous.worst)
        )


@dataclass(frozen=True)
class ComparedRun:
    """Run of one side, compared with the exact results.

    Attributes:
        outputs: Outputs by name.
        errors: Error at each tap and output, by the reference's names; infinite for an output of
            another shape.
        uncompared: Taps that could not be compared -> reason. A port may fuse modules, or call them
            in parts.
        values: Values at the taps in `capture`.
    """

    outputs: dict[str, Tensor]
    errors: dict[str, RelativeError]
    uncompared: dict[str, str]
    values: dict[str, Tensor]


def compare_run(
    side: Side,
    inputs: Inputs,
    exact: Recording,
    points: Mapping[str, str],
    *,
    forced: bool = False,
    capture: frozenset[str] = frozenset(),
) -> ComparedRun:
    """Run a side and compare it with the exact results.

    Args:
        side: Side to run, already cast to its dtype.
        inputs: Inputs in that dtype.
        exact: float64 run of the reference.
        points: Points of this side -> points of the reference.
        forced: Whether to replace the value at each tap with the exact one (teacher forcing), so
            that the error of a module is its own.
        capture: Points of the reference at which to return this side's values.
    """
    taps = TapComparison(exact, points, forced=forced, capture=capture)
    with torch.inference_mode(), tap_hooks(side.module, list(points), taps.visit):
        outputs = side.run(clone_inputs(inputs))
    errors = taps.errors() | compare_outputs(outputs, exact.outputs)
    return ComparedRun(outputs, errors, taps.uncompared(), taps.values())


def compare_outputs(
    outputs: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> dict[str, RelativeError]:
    """Return the error of every output that both sides have."""
    errors = {}
    for name, expected in exact.items():
        if name not in outputs:
            continue
        if not expected.is_floating_point():
            errors[name] = share_of_differences(outputs[name], expected)
            continue
        meter = ErrorMeter(expected)
        meter.add(outputs[name])
        errors[name] = meter.error()
    return errors


def substitute(value: Tensor, exact: Tensor) -> Tensor:
    """Return the replacement for a value at a tap in a teacher-forced run."""
    return exact.to(value.dtype, copy=True)  # a copy: the side may modify it in place


class TapComparison:
    """Comparison of the values at the taps of a side with the exact ones.

    Args:
        exact: float64 run of the reference.
        points: Points of this side -> points of the reference.
        forced: Whether to replace values with the exact ones.
        capture: Points of the reference at which to save values.
    """

    def __init__(
        self,
        exact: Recording,
        points: Mapping[str, str],
        *,
        forced: bool,
        capture: frozenset[str],
    ) -> None:
        self.exact = exact.taps
        self.points = points
        self.forced = forced
        self.capture = capture
        self.meters: dict[str, ErrorMeter] = {}
        for name in points.values():
            if name in exact.taps:
                self.meters[name] = ErrorMeter(exact.taps[name], exact.defined)
        self.visited: set[str] = set()
        self._parts: dict[str, list[Tensor]] = {}
        self._mismatched: dict[str, Tensor] = {}

    def visit(self, point: str, value: Tensor) -> Tensor | None:
        """Compare a value; return its replacement, if any."""
        name = self.points[point]
        meter = self.meters.get(name)
        if meter is None:
            return None
        self.visited.add(name)
        is_captured = name in self.capture and meter.is_first_pass
        exact = meter.add(value)
        if exact is None:
            if is_captured:
                self._mismatched.setdefault(name, value.clone())
            return None
        if is_captured:
            self._parts.setdefault(name, []).append(meter.last_defined(value, exact))
        return substitute(value, exact) if self.forced else None

    def errors(self) -> dict[str, RelativeError]:
        """Return the error at every tap that was compared completely."""
        return {name: meter.error() for name, meter in self.meters.items() if meter.is_complete}

    def uncompared(self) -> dict[str, str]:
        """Return the taps that could not be compared, in order of computation, with the reason."""
        reasons = {}
        for name in self.exact:
            meter = self.meters.get(name)
            if meter is None or meter.is_complete:
                continue
            if name in self.visited:
                reasons[name] = OTHER_SHAPES
            else:
                reasons[name] = NEVER_CALLED
        return reasons

    def values(self) -> dict[str, Tensor]:
        """Return the captured values; only the first one where the shape differs."""
        return self._mismatched | {name: join(parts) for name, parts in self._parts.items()}

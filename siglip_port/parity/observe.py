"""Runs the reference, exactly and with its own rounding, and compares runs of a side with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from siglip_port.parity import bounds
from siglip_port.parity.metrics import ErrorMeter, RelativeError, is_finite
from siglip_port.parity.sides import (
    Inputs,
    Side,
    cast,
    cast_inputs,
    clone_inputs,
    dtype_name,
    perturb,
)
from siglip_port.parity.taps import Recording, join, listening, record
from siglip_port.text import fold_blocks


@dataclass
class ReferenceRun:
    """What the reference computes on some inputs: exactly, and with its own rounding.

    Attributes:
        reference: that computed it.
        dtype: in which weights and inputs are given; all runs see the same numbers.
        inputs: rounded to it.
        exact: outputs and taps in float64.
        noise: at every output and tap, the reference's own error in `dtype`; the larger one of its
            attentions.
        outputs: what it returns in `dtype`, by attention.
    """

    reference: Side
    dtype: torch.dtype
    inputs: Inputs
    exact: Recording
    noise: dict[str, RelativeError] = field(default_factory=dict)
    outputs: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def exact_inputs(self) -> Inputs:
        """The inputs in float64."""
        return cast_inputs(self.inputs, torch.float64)

    @property
    def points(self) -> list[str]:
        """All places that are compared: taps in the order of the computation, then outputs."""
        return [*self.exact.taps, *self.exact.outputs]


def run_reference(
    reference: Side,
    inputs: Inputs,
    points: list[str],
    dtype: torch.dtype,
    attentions: tuple[str, ...] | None = None,
) -> ReferenceRun:
    """Run the reference once in float64, and once with each attention in `dtype`.

    Args:
        reference: in `eval()` mode.
        inputs: of any floating point dtype.
        points: where to look inside.
        dtype: in which weights and inputs are given.
        attentions: whose rounding counts; None for all that the reference has.

    Raises:
        ValueError: what it computes is no truth: not finite, or not float64 throughout; or its
            weights are not finite.
    """
    inputs = cast_inputs(inputs, dtype)
    reference.set_attention(reference.attentions[0])
    run = ReferenceRun(reference, dtype, inputs, run_exactly(reference, inputs, points, dtype))
    for attention in attentions or reference.attentions:
        reference.set_attention(attention)
        measure_noise(run, attention)
    reference.set_attention(reference.attentions[0])
    return run


def run_exactly(
    reference: Side, inputs: Inputs, points: list[str], dtype: torch.dtype
) -> Recording:
    """Run the reference in float64 on weights and inputs that are rounded to `dtype`."""
    exact_inputs = cast_inputs(inputs, torch.float64)
    with cast(reference.module, dtype, torch.float64):
        check_weights_finite(reference.module, dtype)
        exact = record(reference.module, points, lambda: reference.run(exact_inputs))
        check_is_truth(exact)
        check_float64_throughout(reference, exact_inputs, exact.outputs)
    return exact


def check_weights_finite(reference: nn.Module, dtype: torch.dtype) -> None:
    """Refuse weights that are not finite: in what is NaN on both sides, no difference shows."""
    names = [name for name, weight in reference.named_parameters() if not is_finite(weight)]
    if names:
        raise ValueError(
            f"the reference's weights hold NaN or infinity in {dtype_name(dtype)}, so there is "
            f"nothing to compare with: {', '.join(fold_blocks(names))}"
        )


def check_is_truth(exact: Recording) -> None:
    """Refuse values that agree with anything: NaN, infinity, nothing but zeros."""
    for name, tensor in {**exact.outputs, **exact.taps}.items():
        if not is_finite(tensor):
            raise ValueError(
                f"the reference itself gives NaN or infinity ({name}), so there is nothing to "
                "compare with: the inputs hold such numbers, or the weights are so large that "
                "they make them"
            )
        if not tensor.any():
            raise ValueError(
                f"the reference gives nothing but zeros ({name}): two dead models would agree; "
                "give it weights that matter, with `siglip_port.parity.randomize` for example"
            )


def check_float64_throughout(
    reference: Side, inputs: Inputs, outputs: Mapping[str, Tensor]
) -> None:
    """Refuse a float64 run with a step in float32, by second differences along a random direction.

    A smooth function of a step h = 1e-8 has second differences of about 1e-16. A float32 step
    inside, as the softmax of transformers' eager attention is, makes them 1e-8, since it rounds
    each of the three runs another way.
    """

    def outputs_at(step: float) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return reference.run(perturb(inputs, step, generator, torch.float64))

    ahead = outputs_at(1e-8)
    behind = outputs_at(-1e-8)
    for name, output in outputs.items():
        second_difference = ahead[name] - 2 * output + behind[name]
        roughness = float(second_difference.norm() / output.norm())
        if roughness > bounds.FLOAT64_BOUND:
            raise ValueError(
                f"the float64 run of the reference is not float64 throughout ({name} is rough to "
                f"{roughness:.0e}), so it is no truth; transformers' eager attention has a float32 "
                "softmax: use sdpa"
            )


def measure_noise(run: ReferenceRun, attention: str) -> None:
    """Run the reference in its own dtype, and add what its rounding does at every point."""
    reference = run.reference
    with cast(reference.module, run.dtype):
        own_points = dict(zip(run.exact.taps, run.exact.taps, strict=True))
        rounded = compare_run(reference, run.inputs, run.exact, own_points)
    run.outputs[attention] = rounded.outputs
    for name, error in rounded.errors.items():
        if not math.isfinite(error.overall):
            raise ValueError(
                f"the reference itself gives NaN or infinity in {dtype_name(run.dtype)} ({name}), "
                "so there is nothing to compare with: the dtype is too narrow for these weights"
            )
        known = run.noise.get(name, RelativeError(0.0, 0.0))
        run.noise[name] = RelativeError(
            max(error.overall, known.overall), max(error.worst, known.worst)
        )


@dataclass(frozen=True)
class ComparedRun:
    """One run of a side, compared with the truth on its way.

    Attributes:
        outputs: what it returned.
        errors: at each tap and output, in the reference's names. An output of another shape has an
            infinite one.
        unseen: taps that cannot be compared, and why. That is no bug in itself: a port may fuse
            modules, or call them in pieces.
        values: what passed the taps whose values were asked for.
    """

    outputs: dict[str, Tensor]
    errors: dict[str, RelativeError]
    unseen: dict[str, str]
    values: dict[str, Tensor]


def compare_run(
    side: Side,
    inputs: Inputs,
    exact: Recording,
    points: Mapping[str, str],
    *,
    forced: bool = False,
    keep: frozenset[str] = frozenset(),
) -> ComparedRun:
    """Run a side beside the truth.

    Args:
        side: in the dtype in which it is to be run.
        inputs: in that dtype.
        exact: the truth.
        points: the side's points -> the truth's.
        forced: whether, after each tap, the truth goes on instead of the side's own: then each
            module is given right inputs, and its error is its own.
        keep: points of the truth at which the side's values are kept.
    """
    taps = TapComparison(exact.taps, points, forced=forced, keep=keep)
    with torch.inference_mode(), listening(side.module, list(points), taps.visit):
        outputs = side.run(clone_inputs(inputs))
    errors = taps.errors() | compare_outputs(outputs, exact.outputs)
    return ComparedRun(outputs, errors, taps.unseen(), taps.values())


def compare_outputs(
    outputs: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> dict[str, RelativeError]:
    """The error of every output that both sides have."""
    errors = {}
    for name, truth in exact.items():
        if name in outputs:
            meter = ErrorMeter(truth)
            meter.add(outputs[name])
            errors[name] = meter.error()
    return errors


def substitute(value: Tensor, truth: Tensor) -> Tensor:
    """What goes on after a tap, instead of the side's own value, where right inputs are given."""
    return truth.to(value.dtype, copy=True)  # a copy, since the side may write to it


class TapComparison:
    """Compares what passes the taps of a side with the truth there."""

    def __init__(
        self,
        truth: Mapping[str, Tensor],
        points: Mapping[str, str],
        *,
        forced: bool,
        keep: frozenset[str],
    ) -> None:
        self.truth = truth
        self.points = points
        self.forced = forced
        self.keep = keep
        self.meters = {name: ErrorMeter(truth[name]) for name in points.values() if name in truth}
        self.reached: set[str] = set()
        self._parts: dict[str, list[Tensor]] = {}
        self._misfits: dict[str, Tensor] = {}

    def visit(self, point: str, value: Tensor) -> Tensor | None:
        """Compare a value; return what takes its place, if anything."""
        name = self.points[point]
        meter = self.meters.get(name)
        if meter is None:
            return None
        self.reached.add(name)
        keep = name in self.keep and meter.is_first_pass
        truth = meter.add(value)
        if truth is None:
            if keep:
                self._misfits.setdefault(name, value.clone())
            return None
        if keep:
            self._parts.setdefault(name, []).append(value.clone())
        return substitute(value, truth) if self.forced else None

    def errors(self) -> dict[str, RelativeError]:
        """The error at every tap whose values cover the truth."""
        return {name: meter.error() for name, meter in self.meters.items() if meter.is_complete}

    def unseen(self) -> dict[str, str]:
        """The taps that cannot be compared, in the order of the computation, and why."""
        reasons = {}
        for name in self.truth:
            meter = self.meters.get(name)
            if meter is None or meter.is_complete:
                continue
            if name in self.reached:
                reasons[name] = "the port calls this module with other shapes"
            else:
                reasons[name] = "the port never calls this module"
        return reasons

    def values(self) -> dict[str, Tensor]:
        """The values that were asked for; of another shape than the truth's, only the first."""
        return self._misfits | {name: join(parts) for name, parts in self._parts.items()}

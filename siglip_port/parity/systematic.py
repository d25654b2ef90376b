"""Errors on inputs that differ slightly: rounding changes completely, the error of a bug does not.

Either side is run on perturbed inputs; the part of its errors that these runs have in common is its
*systematic* error (see `siglip_port.parity.metrics.ErrorStatistics`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from siglip_port.parity.metrics import ErrorStatistics, SystematicErrorMeter
from siglip_port.parity.observe import (
    ComparedRun,
    ReferenceRun,
    compare_run,
    record_exactly,
)
from siglip_port.parity.sides import Inputs, Sample, Side, cast, cast_inputs, map_tensors, perturb
from siglip_port.parity.taps import Recording

Meters = dict[str, SystematicErrorMeter]
"""Meters by the reference's name of a tap or output."""


def perturbed_samples(
    inputs: Inputs, scale: float, count: int, dtype: torch.dtype, *, with_weights: bool = False
) -> list[Sample]:
    """Perturb inputs several times; return them in float64, rounded to `dtype`.

    Args:
        inputs: Inputs of any floating point dtype.
        scale: Relative size of the changes.
        count: Number of results.
        dtype: Dtype that represents the inputs exactly.
        with_weights: Whether to change the weights of both sides, too. The rounding of what depends
            on no input, such as resized positions, is the same for all inputs.
    """
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(count):
        sample = perturb(cast_inputs(inputs, torch.float64), scale, generator)
        factor = 1 + scale * float(torch.randn((), generator=generator)) if with_weights else 1.0
        rounded = cast_inputs(cast_inputs(sample, dtype), torch.float64)
        samples.append(Sample(rounded, factor))
    return samples


def can_be_perturbed(inputs: Inputs) -> bool:
    """Return whether inputs contain floating point tensors; token ids cannot change slightly."""
    tensors: list[Tensor] = []

    def remember(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    map_tensors(inputs, remember)
    return bool(tensors)


def run_sample(
    side: Side,
    inputs: Inputs,
    exact: Recording,
    points: Mapping[str, str],
    meters: Meters,
    *,
    forced: bool,
) -> ComparedRun:
    """Run a side, already cast, on one of the inputs, and add its errors to the meters.

    Args:
        side: Side to run.
        inputs: Inputs in its dtype.
        exact: float64 run of the reference on these inputs.
        points: Points of this side -> points of the reference.
        meters: Meters of the points to measure.
        forced: Whether the run is teacher-forced.
    """
    capture = frozenset(meters)
    run = compare_run(side, inputs, exact, points, forced=forced, capture=capture)
    for name, meter in meters.items():
        value = run.outputs.get(name) if name in exact.outputs else run.values.get(name)
        expected = exact.outputs.get(name, exact.taps.get(name))
        if value is not None and expected is not None and value.shape == expected.shape:
            meter.add(value, expected)
    return run


def port_statistics(
    port: Side,
    run: ReferenceRun,
    samples: Sequence[Sample],
    points: Mapping[str, str],
    names: Sequence[str],
    dtypes: tuple[torch.dtype, ...],
    *,
    forced: bool,
) -> Iterator[dict[str, ErrorStatistics]]:
    """Run the port on one sample after the other; yield the statistics from the second one on.

    Args:
        port: Port in its own dtype.
        run: Run of the reference, for its place and taps.
        samples: Inputs and weights.
        points: Points of the port -> points of the reference.
        names: Points to measure, by the reference's names.
        dtypes: Dtypes to which the port is cast in turn.
        forced: Whether the runs are teacher-forced.
    """
    meters = {name: SystematicErrorMeter() for name in names}
    for i, sample in enumerate(samples):
        exact = run.record(sample)
        with cast(port.module, *dtypes):
            sample.scale_weights(port.module)
            inputs = cast_inputs(sample.inputs, dtypes[-1])
            run_sample(port, inputs, exact, points, meters, forced=forced)
        if i > 0:
            yield {name: meter.statistics() for name, meter in meters.items()}


def reference_statistics(
    reference: Side,
    samples: Sequence[Sample],
    points: Sequence[str],
    names: Sequence[str],
    dtypes: tuple[torch.dtype, ...],
    attentions: Sequence[str],
) -> dict[str, ErrorStatistics]:
    """Measure the reference's own errors in a dtype, teacher-forced at some of its points.

    Args:
        reference: Reference in its own dtype.
        samples: Inputs and weights.
        points: Points at which it is forced: those that the port is.
        names: Points and outputs to measure.
        dtypes: Dtypes to which the reference is cast in turn; the first is that of the weights.
        attentions: Attention implementations; the largest error counts.

    Returns:
        The largest errors by point and output.
    """
    own_points = {point: point for point in points}
    meters: dict[str, Meters] = {}
    for attention in attentions:
        meters[attention] = {name: SystematicErrorMeter() for name in names}
    for sample in samples:
        exact = record_exactly(reference, sample, list(points), dtypes[0])
        for attention in attentions:
            reference.set_attention(attention)
            with cast(reference.module, *dtypes):
                sample.scale_weights(reference.module)
                inputs = cast_inputs(sample.inputs, dtypes[-1])
                run_sample(reference, inputs, exact, own_points, meters[attention], forced=True)
        reference.set_attention(reference.attentions[0])
    return {name: largest_statistics(meters, name) for name in names}


def largest_statistics(meters: Mapping[str, Meters], name: str) -> ErrorStatistics:
    """Return the largest total and systematic error of a point over attention implementations."""
    statistics = [meters_of_one[name].statistics() for meters_of_one in meters.values()]
    total = max(one.total for one in statistics)
    systematic = max(one.systematic for one in statistics)
    return ErrorStatistics(total, systematic)

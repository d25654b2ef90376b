"""Separate float32 rounding inside a port from bugs that are as small.

A softmax, a Linear or a whole model that is float32 at every dtype is not a bug. Its error in
float64 is no larger than that of the reference in float32, and it changes completely if the inputs
change by 1e-3, or inputs and weights. The error of a bug is a smooth function of them, and hardly
changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from siglip_port.parity import bounds
from siglip_port.parity.metrics import ErrorStatistics, RelativeError
from siglip_port.parity.observe import ReferenceRun, compare_run
from siglip_port.parity.sides import Inputs, Sample, Side, cast, cast_inputs
from siglip_port.parity.systematic import (
    can_be_perturbed,
    perturbed_samples,
    port_statistics,
    reference_statistics,
)
from siglip_port.parity.taps import Recording, Tap, port_to_reference

PERTURBATION = 1e-3
SAMPLES = 6
"""Number of perturbed inputs."""


def float32_noise(run: ReferenceRun) -> dict[str, RelativeError]:
    """Return the rounding error of the reference in float32 at every tap and output."""
    if run.dtype == torch.float32:
        return run.noise
    return run.host.compute(measure_float32_noise, run.exact_inputs, run.exact, run.dtype)


def measure_float32_noise(
    reference: Side, inputs: Inputs, exact: Recording, dtype: torch.dtype
) -> dict[str, RelativeError]:
    """Run the reference in float32 on weights and inputs that were rounded to `dtype`."""
    own_points = {point: point for point in exact.taps}
    with cast(reference.module, dtype, torch.float32):
        return compare_run(reference, cast_inputs(inputs, torch.float32), exact, own_points).errors


def within_float32_noise(
    errors: Mapping[str, RelativeError], noise: Mapping[str, RelativeError], name: str
) -> bool:
    """Return whether an error in float64 can be float32 rounding, by its size."""
    return name in noise and errors[name].overall <= bounds.ROUNDING_FACTOR * noise[name].overall


def find_float32_rounding(
    port: Side,
    run: ReferenceRun,
    taps: list[Tap],
    names: Sequence[str],
    *,
    forced: bool,
) -> list[str]:
    """Return the points at which the port's difference in float64 is float32 rounding.

    Args:
        port: Port in its own dtype.
        run: Run of the reference.
        taps: Compared taps.
        names: Points that differ in float64 by no more than the reference's error in float32.
        forced: Whether they differ in a teacher-forced run.
    """
    if not names:
        return []
    rounding: list[str] = []
    for with_weights in (False, True):
        if not with_weights and not can_be_perturbed(run.inputs):
            continue
        samples = perturbed_samples(
            run.exact_inputs, PERTURBATION, SAMPLES, torch.float32, with_weights=with_weights
        )
        left = [name for name in names if name not in rounding]
        if left:
            rounding += rounding_among(left, port, run, taps, samples, forced=forced)
    return rounding


def rounding_among(
    names: Sequence[str],
    port: Side,
    run: ReferenceRun,
    taps: list[Tap],
    samples: list[Sample],
    *,
    forced: bool,
) -> list[str]:
    """Return the points whose errors differ between samples: see `find_float32_rounding`."""
    points = port_to_reference(taps)
    dtypes = (run.dtype, torch.float64)
    statistics: dict[str, ErrorStatistics] = {}
    for statistics in port_statistics(port, run, samples, points, names, dtypes, forced=forced):
        if not any(may_be_rounding(one) for one in statistics.values()):
            return []
    unclear = [name for name in names if is_unclear(statistics[name])]
    own_errors: dict[str, ErrorStatistics] = {}
    if unclear:
        own_errors = run.host.compute(
            reference_statistics,
            samples,
            list(run.exact.taps) if forced else [],
            unclear,
            (run.dtype, torch.float32),
            tuple(run.outputs)[:1],
        )
    return [name for name in names if is_rounding(statistics[name], own_errors.get(name))]


def may_be_rounding(port: ErrorStatistics) -> bool:
    """Return whether the errors differ between inputs, if anything does at this point."""
    return not port.varies or port.systematic <= bounds.ROUGH_SHARE * port.total


def is_unclear(port: ErrorStatistics) -> bool:
    """Return whether the reference's own systematic error decides."""
    return (
        port.varies
        and may_be_rounding(port)
        and port.systematic > bounds.SYSTEMATIC_SHARE * port.total
    )


def is_rounding(port: ErrorStatistics, reference: ErrorStatistics | None) -> bool:
    """Return whether the port's errors are those of float32 rounding.

    Args:
        port: Errors of the port in float64.
        reference: Errors of the reference in float32; None if they are not needed.
    """
    if not may_be_rounding(port):
        return False
    if not is_unclear(port):
        return True
    if reference is None:
        return False
    return port.systematic <= bounds.SYSTEMATIC_FACTOR * reference.systematic

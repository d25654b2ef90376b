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
    left = list(names)
    errors: dict[str, ErrorStatistics] = {}
    samples: list[Sample] = []
    for with_weights in (False, True):
        if not left or not (with_weights or can_be_perturbed(run.inputs)):
            continue
        samples = perturbed_samples(
            run.exact_inputs, PERTURBATION, SAMPLES, torch.float32, with_weights=with_weights
        )
        errors = errors_on(samples, left, port, run, taps, forced=forced)
        left = [name for name in left if not averages_out(errors[name])]
    own_errors = own_errors_on(samples, left, run, forced=forced) if left else {}
    bugs = [name for name in left if not is_like_own(errors[name], own_errors[name])]
    return [name for name in names if name not in bugs]


def errors_on(
    samples: list[Sample],
    names: list[str],
    port: Side,
    run: ReferenceRun,
    taps: list[Tap],
    *,
    forced: bool,
) -> dict[str, ErrorStatistics]:
    """Measure the port's errors in float64 on samples: see `find_float32_rounding`."""
    points = port_to_reference(taps)
    dtypes = (run.dtype, torch.float64)
    *_, errors = port_statistics(port, run, samples, points, names, dtypes, forced=forced)
    return errors


def own_errors_on(
    samples: list[Sample], names: list[str], run: ReferenceRun, *, forced: bool
) -> dict[str, ErrorStatistics]:
    """Measure the reference's errors in float32 on samples."""
    return run.host.compute(
        reference_statistics,
        samples,
        list(run.exact.taps) if forced else [],
        names,
        (run.dtype, torch.float32),
        tuple(run.outputs)[:1],
    )


def is_like_own(port: ErrorStatistics, own: ErrorStatistics) -> bool:
    """Return whether errors have a systematic part as large as the reference's in float32.

    One that is all of the port's must be most of the reference's, as that of constants is.
    """
    if not port.systematic <= bounds.SYSTEMATIC_FACTOR * own.systematic:
        return False
    is_all = port.systematic > bounds.ROUGH_SHARE * port.total
    return not is_all or own.systematic > bounds.SYSTEMATIC_SHARE * own.total


def averages_out(errors: ErrorStatistics) -> bool:
    """Return whether errors differ between samples, if anything does at this point."""
    return not errors.varies or errors.systematic <= bounds.SYSTEMATIC_SHARE * errors.total

"""The gate `rounding`: the port's rounding error in a dtype is comparable to the reference's.

In bfloat16 and float16, bugs may hide in rounding. There, both sides also run on inputs that differ
slightly: rounding averages out, a bug does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from siglip_port.parity import bounds
from siglip_port.parity.gates.float32_upcasts import float32_noise, within_float32_noise
from siglip_port.parity.gates.float64_runs import points_outside_bound, run_in_float64
from siglip_port.parity.gates.missing_outputs import find_missing_outputs
from siglip_port.parity.metrics import ErrorStatistics, RelativeError
from siglip_port.parity.observe import ReferenceRun, compare_run
from siglip_port.parity.results import Finding, GateResult, Measurement, ratio
from siglip_port.parity.sides import Sample, Side, cast, dtype_name
from siglip_port.parity.systematic import (
    can_be_perturbed,
    perturbed_samples,
    port_statistics,
    reference_statistics,
)
from siglip_port.parity.taps import Tap, port_to_reference, reference_to_port

PERTURBATION = 2.0**-6
"""Relative change of the inputs: several times the spacing of bfloat16."""

SAMPLES = 8
"""Number of perturbed inputs."""

FEWER_SAMPLES = 3
"""The same for large models, whose many elements average out as well."""

LARGE = 20_000_000
"""Number of elements at all taps from which a model is large."""


def check_rounding(port: Side, run: ReferenceRun, taps: list[Tap]) -> GateResult:
    """Compare the port's error against float64 with the reference's, in the dtype of the run.

    Args:
        port: Port in `eval()` mode.
        run: Run of the reference.
        taps: Taps to compare; those with other values in float64 that do not affect the outputs are
            not judged.
    """
    gate = judge_rounding(port, run, taps)
    if gate.passed or not port.supports_float64:
        return gate
    differing = find_differing_taps(port, run, taps)
    if not differing:
        return gate
    taps = [tap for tap in taps if tap.reference not in differing]
    return replace(judge_rounding(port, run, taps), differing_taps=tuple(differing))


def judge_rounding(port: Side, run: ReferenceRun, taps: list[Tap]) -> GateResult:
    """Compare the errors of both sides at all of some taps, and at the outputs."""
    with cast(port.module, run.dtype):
        port_run = compare_run(port, run.inputs, run.exact, port_to_reference(taps))
    port_names = reference_to_port(taps)
    dtype = dtype_name(run.dtype)
    measurements = []
    for name in run.points:
        if name in port_run.errors:
            tap = Tap(name, port_names.get(name, name))
            error = port_run.errors[name]
            measurements.append(measure_rounding(dtype, tap, error, run.noise[name]))
    findings = find_missing_outputs(run, port_run)
    compared = [measurement.reference for measurement in measurements]
    steps = measure_steps(port, run, taps, compared)
    findings += first_findings(
        compared,
        find_excess_rounding(measurements, steps),
        find_systematic_errors(dtype, steps, port_names),
    )
    return GateResult(
        f"rounding {dtype}",
        len(measurements),
        bounds.ROUNDING_ORIGIN,
        tuple(findings),
        tuple(measurements),
    )


def find_differing_taps(port: Side, run: ReferenceRun, taps: list[Tap]) -> list[str]:
    """List taps that differ in float64 although the outputs agree: see `gates.suspects`."""
    if not taps:
        return []
    free = run_in_float64(port, run, taps)
    differing = points_outside_bound(run, free)
    if any(name in run.exact.outputs for name in differing):
        noise = float32_noise(run)
        differing = [
            name for name in differing if not within_float32_noise(free.errors, noise, name)
        ]
    if any(name in run.exact.outputs for name in differing):
        return []
    return differing


def measure_rounding(
    dtype: str, tap: Tap, error: RelativeError, noise: RelativeError
) -> Measurement:
    """Measure the port's error at one tap against bounds derived from the reference's error."""
    bound = bounds.ROUNDING_FACTOR * noise.overall
    worst = ratio(error.worst, bounds.WORST_FACTOR * noise.worst)
    return Measurement(dtype, tap.reference, tap.port, error.overall, bound, noise.overall, worst)


def find_excess_rounding(
    measurements: list[Measurement], steps: Mapping[str, StepErrors]
) -> list[Finding]:
    """Find the first tap outside its bound; the taps after it inherit its error.

    Args:
        measurements: Errors of the free-running run.
        steps: Errors of single steps, if they were measured: small ones add up until they are
            outside the bound, and the first tap there is later than the step that causes them.
    """
    for position, measurement in enumerate(measurements):
        if not measurement.passed:
            factor = max(measurement.ratio, bounds.WORST_FACTOR * measurement.worst)
            message = (
                f"rounding error in {measurement.run} is {factor:.3g}x the reference's, bound "
                f"{bounds.ROUNDING_FACTOR:g}x"
            )
            hint = "narrower dtype or different formula in this step (first outside its bound)"
            cause = largest_step(measurements[: position + 1], steps)
            if cause != measurement:
                message += f" at {measurement.reference}"
                hint = "narrower dtype or different formula in this step (largest error of its own)"
            return [Finding(message, cause.reference, cause.port, measurement.error, hint)]
    return []


def largest_step(measurements: list[Measurement], steps: Mapping[str, StepErrors]) -> Measurement:
    """Return the measurement whose step has the largest error, relative to the reference's.

    Args:
        measurements: Errors up to the first one outside its bound, which is the result if its own
            step is outside, too, or if steps were not measured.
        steps: Errors of single steps.
    """
    last = measurements[-1]
    if last.reference not in steps:
        return last
    if steps[last.reference].ratio > bounds.ROUNDING_FACTOR:
        return last
    return max(reversed(measurements), key=lambda one: steps[one.reference].ratio)


def first_findings(
    points: Sequence[str], excess: list[Finding], systematic: list[Finding]
) -> list[Finding]:
    """Join the findings: steps with a systematic error, and excess rounding before all of them."""
    if not systematic or not excess:
        return [*excess, *systematic]
    if points.index(excess[0].reference) < points.index(systematic[0].reference):
        return [*excess, *systematic]
    return systematic


# --- bugs hidden in rounding ----------------------------------------------------------------------


@dataclass(frozen=True)
class StepErrors:
    """Errors of a step in a low dtype, teacher-forced, on perturbed inputs.

    Attributes:
        port: Errors of the port.
        reference: Errors of the reference.
    """

    port: ErrorStatistics
    reference: ErrorStatistics

    @property
    def ratio(self) -> float:
        """Error of the port divided by the reference's."""
        return ratio(self.port.total, self.reference.total)

    @property
    def bound(self) -> float:
        """Largest systematic error of the port."""
        return max(
            bounds.SYSTEMATIC_FACTOR * self.reference.systematic,
            bounds.SYSTEMATIC_NOISE * self.reference.total,
        )


def measure_steps(
    port: Side, run: ReferenceRun, taps: list[Tap], compared: Sequence[str]
) -> dict[str, StepErrors]:
    """Measure the errors of single steps; nothing in float32 or for inputs like token ids.

    Args:
        port: Port in `eval()` mode.
        run: Run of the reference.
        taps: Taps that can be compared.
        compared: Points that the port computes, by the reference's names.
    """
    is_low = torch.finfo(run.dtype).bits < 32
    if not is_low or not can_be_perturbed(run.inputs):
        return {}
    samples = perturbed_samples(run.inputs, PERTURBATION, count_samples(run), run.dtype)
    points = {tap.port: tap.reference for tap in taps if tap.reference in compared}
    *_, port_errors = port_statistics(
        port, run, samples, points, compared, (run.dtype,), forced=True
    )
    own_errors = own_statistics(run, samples, list(points.values()), compared)
    return {name: StepErrors(port_errors[name], own_errors[name]) for name in compared}


def count_samples(run: ReferenceRun) -> int:
    """Return the number of perturbed inputs."""
    size = sum(tensor.numel() for tensor in run.exact.taps.values())
    return FEWER_SAMPLES if size > LARGE else SAMPLES


def find_systematic_errors(
    dtype: str, steps: Mapping[str, StepErrors], port_names: Mapping[str, str]
) -> list[Finding]:
    """Find the steps whose error in a low dtype does not average out, as rounding does."""
    findings = []
    for name, step in steps.items():
        error = step.port.systematic
        if not error <= step.bound:
            message = (
                f"systematic error in {dtype}, which does not average out over perturbed inputs as "
                f"rounding does, bound {step.bound:.1e}"
            )
            findings.append(Finding(message, name, port_names.get(name, name), error))
    return findings


def own_statistics(
    run: ReferenceRun, samples: Sequence[Sample], points: list[str], names: Sequence[str]
) -> dict[str, ErrorStatistics]:
    """Return the reference's own errors in the dtype of the run; cached in the run."""
    key = (*points, "", *names)
    if key not in run.statistics:
        run.statistics[key] = run.host.compute(
            reference_statistics,
            samples,
            points,
            list(names),
            (run.dtype,),
            tuple(run.outputs),
        )
    return run.statistics[key]

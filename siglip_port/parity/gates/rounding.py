"""The gate `rounding`: in a dtype, the port is not much further from float64 than the reference."""

from __future__ import annotations

from siglip_port.parity import bounds
from siglip_port.parity.gates.missing_outputs import find_missing_outputs
from siglip_port.parity.metrics import RelativeError
from siglip_port.parity.observe import ReferenceRun, compare_run
from siglip_port.parity.results import Finding, GateResult, Measurement, ratio
from siglip_port.parity.sides import Side, cast, dtype_name
from siglip_port.parity.taps import Tap, port_to_reference, reference_to_port


def check_rounding(port: Side, run: ReferenceRun, taps: list[Tap]) -> GateResult:
    """Compare the port's distance from float64 with the reference's own, in the run's dtype.

    Args:
        port: in `eval()` mode.
        run: of the reference.
        taps: where to compare.
    """
    with cast(port.module, run.dtype):
        compared = compare_run(port, run.inputs, run.exact, port_to_reference(taps))
    port_names = reference_to_port(taps)
    dtype = dtype_name(run.dtype)
    measurements = []
    for name in run.points:
        if name in compared.errors:
            tap = Tap(name, port_names.get(name, name))
            error = compared.errors[name]
            measurements.append(measure_rounding(dtype, tap, error, run.noise[name]))
    findings = find_missing_outputs(run, compared)
    findings += first_coarse_step(measurements)
    return GateResult(
        f"rounding {dtype}",
        len(measurements),
        bounds.ROUNDING_ORIGIN,
        tuple(findings),
        tuple(measurements),
    )


def measure_rounding(
    dtype: str, tap: Tap, error: RelativeError, noise: RelativeError
) -> Measurement:
    """The port's error at one place, beside a bound made of the reference's own."""
    bound = bounds.ROUNDING_FACTOR * noise.overall
    worst = ratio(error.worst, bounds.WORST_FACTOR * noise.worst)
    return Measurement(dtype, tap.reference, tap.port, error.overall, bound, noise.overall, worst)


def first_coarse_step(measurements: list[Measurement]) -> list[Finding]:
    """What is said of the first place that is outside its bound, if any."""
    for measurement in measurements:
        if not measurement.passed:
            coarseness = max(measurement.ratio, bounds.WORST_FACTOR * measurement.worst)
            message = (
                f"rounds {coarseness:.1f} x as coarsely as the reference in {measurement.run}, "
                f"bound {bounds.ROUNDING_FACTOR:g}"
            )
            hint = "the first step that does: computed in a narrower dtype, or by another formula"
            error = measurement.error
            return [Finding(message, measurement.reference, measurement.port, error, hint)]
    return []

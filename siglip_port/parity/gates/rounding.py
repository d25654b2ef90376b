"""The gate `rounding`: the port's rounding error in a dtype is comparable to the reference's."""

from __future__ import annotations

from siglip_port.parity import bounds
from siglip_port.parity.gates.missing_outputs import find_missing_outputs
from siglip_port.parity.metrics import RelativeError
from siglip_port.parity.observe import ReferenceRun, compare_run
from siglip_port.parity.results import Finding, GateResult, Measurement, ratio
from siglip_port.parity.sides import Side, cast, dtype_name
from siglip_port.parity.taps import Tap, port_to_reference, reference_to_port


def check_rounding(port: Side, run: ReferenceRun, taps: list[Tap]) -> GateResult:
    """Compare the port's error against float64 with the reference's, in the dtype of the run.

    Args:
        port: Port in `eval()` mode.
        run: Run of the reference.
        taps: Taps to compare.
    """
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
    findings += find_excess_rounding(measurements)
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
    """Measure the port's error at one tap against bounds derived from the reference's error."""
    bound = bounds.ROUNDING_FACTOR * noise.overall
    worst = ratio(error.worst, bounds.WORST_FACTOR * noise.worst)
    return Measurement(dtype, tap.reference, tap.port, error.overall, bound, noise.overall, worst)


def find_excess_rounding(measurements: list[Measurement]) -> list[Finding]:
    """Find the first tap outside its bound; the taps after it inherit its error."""
    for measurement in measurements:
        if not measurement.passed:
            factor = max(measurement.ratio, bounds.WORST_FACTOR * measurement.worst)
            message = (
                f"rounding error in {measurement.run} is {factor:.3g}x the reference's, bound "
                f"{bounds.ROUNDING_FACTOR:g}x"
            )
            hint = "narrower dtype or different formula in this step (first outside its bound)"
            error = measurement.error
            return [Finding(message, measurement.reference, measurement.port, error, hint)]
    return []

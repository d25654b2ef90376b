"""Compare the results of a port, read from files, with a golden folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from siglip_port.parity import bounds
from siglip_port.parity.gates.rounding import measure_rounding
from siglip_port.parity.golden.folder import (
    PORT_FILE,
    Expected,
    GoldenCase,
    GoldenError,
    GoldenFolder,
    read_tensors,
)
from siglip_port.parity.metrics import ErrorMeter
from siglip_port.parity.results import Comparison, Finding, GateResult, Measurement, Section
from siglip_port.parity.sides import dtype_name
from siglip_port.parity.taps import Tap


def judge_folder(golden: GoldenFolder, dtype: torch.dtype | None = None) -> Comparison:
    """Judge the file `port.safetensors` of every case that has results in the port's dtype.

    Args:
        golden: Golden folder.
        dtype: Dtype in which the port computed; None for that of its tensors.

    Returns:
        One section per case, with one gate.

    Raises:
        GoldenError: There are no results of a port, a file is damaged, or no case has results in
            the port's dtype.
    """
    ports = {}
    for case in golden.cases:
        path = case.checkpoint / PORT_FILE
        if path.is_file():
            ports[case.name] = read_port(path)
    if not ports:
        raise GoldenError(
            f"{golden.path}: no case has a {PORT_FILE}; run the port on its inputs and write its "
            f"outputs, for example to {golden.cases[0].checkpoint / PORT_FILE}"
        )
    name = dtype_name(dtype or dtype_of(ports))
    known = known_names(golden)
    sections = []
    for case in golden.cases:
        if recorded_dtype(name) not in case.expected:
            continue
        gate = missing_results(case, name)
        if case.name in ports:
            port = without_unrecorded(ports[case.name], case.expected[recorded_dtype(name)], known)
            gate = judge_case(case, port, name)
        sections.append(Section(case.name, case.weights, (gate,)))
    if not sections:
        raise GoldenError(
            f"{golden.path}: the port's results are in {name}, in which no case has expected "
            "results; pass --dtype with the dtype in which the port computed"
        )
    return Comparison(tuple(sections), f"{len(sections)} of {len(golden.cases)} golden cases")


def known_names(golden: GoldenFolder) -> set[str]:
    """Return the names of all outputs and taps of a folder."""
    names: set[str] = set()
    for case in golden.cases:
        for expected in case.expected.values():
            names |= expected.tensors.keys()
    return names


def without_unrecorded(
    port: Mapping[str, Tensor], expected: Expected, known: set[str]
) -> dict[str, Tensor]:
    """Drop taps that only other cases record; names that no case has remain, and are findings."""
    return {
        name: tensor
        for name, tensor in port.items()
        if name in expected.tensors or name not in known
    }


def missing_results(case: GoldenCase, dtype: str) -> GateResult:
    """Return the result for a case that the port did not run."""
    place = f"{case.name}/{PORT_FILE}"
    finding = Finding("missing: the port has no results for this case", port=place)
    return GateResult(f"rounding {dtype}", 1, bounds.ROUNDING_ORIGIN, (finding,))


def read_port(path: Path) -> dict[str, Tensor]:
    """Read the results of a port.

    Raises:
        GoldenError: The file is damaged, empty, or contains no floating point tensors.
    """
    tensors = read_tensors(path)
    if not any(tensor.is_floating_point() for tensor in tensors.values()):
        raise GoldenError(f"{path}: expected floating point tensors by name, found none")
    return tensors


def judge_case(case: GoldenCase, port: Mapping[str, Tensor], dtype: str) -> GateResult:
    """Judge the results of a port for one case.

    Args:
        case: The case, which has expected results in this dtype.
        port: Outputs, and taps as far as the port has them, by the names of the reference.
        dtype: Name of the dtype in which the port computed.
    """
    return judge_results(case.expected[recorded_dtype(dtype)], port, dtype)


def recorded_dtype(dtype: str) -> str:
    """Return the dtype of the expected results for a port that computes in `dtype`.

    Ports in float64 get the weights and inputs of those in float32.
    """
    return "float32" if dtype == "float64" else dtype


def judge_results(expected: Expected, port: Mapping[str, Tensor], dtype: str) -> GateResult:
    """Judge results of a port.

    Results in float64 are compared with the float64 bound, others with the reference's rounding
    error in their dtype.

    Args:
        expected: Expected results.
        port: Outputs, and taps as far as the port has them, by the names of the reference.
        dtype: Name of the dtype in which the port computed.
    """
    findings = unusable_tensors(expected, port)
    measurements = []
    for point, exact in expected.tensors.items():
        if point in port and port[point].shape == exact.shape:
            measurements.append(measure(expected, point, port[point], dtype))
    wrong = [measurement for measurement in measurements if not measurement.passed]
    if wrong:
        findings.append(first_difference(wrong[0], len(wrong)))
    if dtype == "float64":
        gate, origin = "numerics", bounds.FLOAT64_ORIGIN
    else:
        gate, origin = f"rounding {dtype}", bounds.ROUNDING_ORIGIN
    return GateResult(gate, len(measurements), origin, tuple(findings), tuple(measurements))


def dtype_of(ports: Mapping[str, Mapping[str, Tensor]]) -> torch.dtype:
    """Return the narrowest floating point dtype of all results."""
    dtypes = set()
    for tensors in ports.values():
        dtypes |= {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def unusable_tensors(expected: Expected, port: Mapping[str, Tensor]) -> list[Finding]:
    """Find missing outputs, unknown names and other shapes."""
    findings = []
    for name in expected.outputs:
        if name not in port:
            findings.append(Finding("the port does not return this output", name, name))
    for name, tensor in port.items():
        if name not in expected.tensors:
            message = f"{name!r} is no output or tap of this case"
            findings.append(Finding(message, port=name))
        elif tensor.shape != expected.tensors[name].shape:
            shape = list(expected.tensors[name].shape)
            findings.append(
                Finding(f"shape {list(tensor.shape)}, expected {shape}", name, name, math.inf)
            )
    return findings


def measure(expected: Expected, point: str, value: Tensor, dtype: str) -> Measurement:
    """Measure the error of a port at one point, with its bound."""
    meter = ErrorMeter(expected.tensors[point])
    meter.add(value)
    error = meter.error()
    if dtype == "float64":
        return Measurement(dtype, point, point, error.overall, bounds.FLOAT64_BOUND)
    return measure_rounding(dtype, Tap(point, point), error, expected.noise[point])


def first_difference(measurement: Measurement, count: int) -> Finding:
    """Return the finding for the first point outside its bound; later ones may inherit its error.

    Args:
        measurement: Error at the first point.
        count: Number of points outside their bounds.
    """
    if measurement.run == "float64":
        message = f"differs in float64, bound {measurement.bound:g}"
    else:
        factor = max(measurement.ratio, bounds.WORST_FACTOR * measurement.worst)
        message = (
            f"error in {measurement.run} is {factor:.3g}x the reference's, bound "
            f"{bounds.ROUNDING_FACTOR:g}x"
        )
    if count > 1:
        message += f" (first of {count} points outside their bounds)"
    return Finding(message, measurement.reference, measurement.port, measurement.error)

"""The JSON report, from which all other reports are rendered."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from siglip_port.parity.causes import Cause
from siglip_port.parity.metrics import cosine, relative_error
from siglip_port.parity.report.origin import describe_origin
from siglip_port.parity.results import Comparison, Finding, GateResult, Measurement, Section

SCHEMA = 3
"""Version of the JSON keys. It is raised if a key is renamed or removed, not for a new key."""

Json = dict[str, Any]
JsonValue = Any


def to_json(
    comparison: Comparison, *, environment: Mapping[str, object] | None = None, **more: object
) -> Json:
    """Convert a comparison to JSON values; NaN and infinity become strings.

    Args:
        comparison: Comparison to convert.
        environment: What to add to the report's origin (`describe_origin`), such as the checkpoint.
        more: Further keys, such as provenance.
    """
    findings = []
    for section, gate, finding in comparison.findings:
        address = {"section": section.name, "gate": gate.name}
        findings.append({**address, **finding_to_json(finding), "text": str(finding)})
    causes = [cause_to_json(cause) for cause in comparison.causes]
    report: Json = finite(
        {
            "schema": SCHEMA,
            "equal": comparison.equal,
            "verdict": comparison.verdict,
            "weights": comparison.label,
            "environment": {**describe_origin(), **(environment or {})},
            **more,
            "causes": causes,
            "findings": findings,
            "sections": [section_to_json(section) for section in comparison.sections],
        }
    )
    return report


def cause_to_json(cause: Cause) -> Json:
    """Convert one cause: its shown finding, with folded places and all checkpoints."""
    return {
        **finding_to_json(cause.finding),
        "gate": cause.gate,
        "reference": ", ".join(filter(None, (place.reference for place in cause.places))),
        "port": ", ".join(filter(None, (place.port for place in cause.places))),
        "sections": [section.name for section in cause.sections],
        "findings": len(cause.members),
        "is_consequence": cause.is_consequence,
        "text": cause.text,
    }


def section_to_json(section: Section) -> Json:
    """Convert the gates of one checkpoint."""
    gates = [gate_to_json(gate) for gate in section.gates]
    return {"name": section.name, "weights": section.weights, "gates": gates}


def gate_to_json(gate: GateResult) -> Json:
    """Convert the result of one gate."""
    return {
        "name": gate.name,
        "checked": gate.checked,
        "bound": gate.bound,
        "findings": [finding_to_json(finding) for finding in gate.findings],
        "measurements": [measurement_to_json(item) for item in gate.measurements],
        "uncompared_taps": gate.uncompared_taps,
        "float32_upcasts": gate.float32_upcasts,
        "differing_taps": gate.differing_taps,
        "notes": gate.notes,
        "passed": gate.passed,
    }


def measurement_to_json(measurement: Measurement) -> Json:
    """Convert one measurement."""
    return {
        "run": measurement.run,
        "reference": measurement.reference,
        "port": measurement.port,
        "error": measurement.error,
        "bound": measurement.bound,
        "bound_ratio": measurement.bound_ratio,
        "reference_error": measurement.noise,
        "worst_vector_ratio": measurement.worst,
        "passed": measurement.passed,
    }


def finding_to_json(finding: Finding) -> Json:
    """Convert one finding."""
    return dataclasses.asdict(finding)


def finite(value: object) -> JsonValue:
    """Convert values that JSON does not support, such as NaN and infinity, to strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    return str(value)


def dumps(report: Json) -> str:
    """Serialize a report."""
    return json.dumps(report, indent=1, allow_nan=False) + "\n"


def section_gates(report: Json) -> Iterator[tuple[Json, Json]]:
    """Yield every gate of a report, with its section."""
    for section in report["sections"]:
        for gate in section["gates"]:
            yield section, gate


def output_metrics(port: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> list[Json]:
    """Compute the usual metrics of every output. No gate depends on them.

    Args:
        port: Outputs of the port.
        reference: Outputs of the reference, in the same dtype.
    """
    metrics = []
    for name, expected in reference.items():
        value = port.get(name)
        if value is None or value.shape != expected.shape:
            continue
        cosines = cosine(value, expected)
        difference = value.double() - expected.double()
        metrics.append(
            {
                "point": name,
                "shape": list(value.shape),
                "cosine_mean": float(cosines.mean()),
                "cosine_min": float(cosines.min()),
                "max_abs_diff": float(difference.abs().max()),
                "relative_error": relative_error(value, expected),
                "norm_ratio": float(value.double().norm() / expected.double().norm()),
            }
        )
    return metrics

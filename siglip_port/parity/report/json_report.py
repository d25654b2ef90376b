"""The JSON report. It is the source of truth: all other reports are made of it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from siglip_port.parity.metrics import cosine, relative_error
from siglip_port.parity.results import Comparison, Finding, GateResult, Measurement, Section

SCHEMA = 2
"""Of the report. It changes when a key changes its meaning or goes.

New keys leave it as it is.
"""

Json = dict[str, Any]
JsonValue = Any


def to_json(comparison: Comparison, **more: object) -> Json:
    """All results. What is not finite becomes a text, as JSON has no such numbers.

    Args:
        comparison: the results.
        more: further keys, such as environment and provenance.
    """
    findings = []
    for section, gate, finding in comparison.findings:
        address = {"section": section.name, "gate": gate.name}
        findings.append({**address, **finding_to_json(finding), "text": str(finding)})
    report: Json = finite(
        {
            "schema": SCHEMA,
            "equal": comparison.equal,
            "verdict": comparison.verdict,
            "weights": comparison.label,
            **more,
            "findings": findings,
            "sections": [section_to_json(section) for section in comparison.sections],
        }
    )
    return report


def section_to_json(section: Section) -> Json:
    """The gates of one checkpoint."""
    gates = [gate_to_json(gate) for gate in section.gates]
    return {"name": section.name, "weights": section.weights, "gates": gates}


def gate_to_json(gate: GateResult) -> Json:
    """The result of one gate."""
    return {
        "name": gate.name,
        "checked": gate.checked,
        "bound": gate.bound,
        "findings": [finding_to_json(finding) for finding in gate.findings],
        "measurements": [measurement_to_json(item) for item in gate.measurements],
        "unseen": gate.unseen,
        "islands": gate.float32_upcasts,
        "passed": gate.passed,
    }


def measurement_to_json(measurement: Measurement) -> Json:
    """One measurement, and the share of its bound that it takes up."""
    fields = dataclasses.asdict(measurement)
    return {**fields, "passed": measurement.passed, "share": measurement.share}


def finding_to_json(finding: Finding) -> Json:
    """One finding."""
    fields = dataclasses.asdict(finding)
    return {"what": fields.pop("message"), **fields}


def finite(value: object) -> JsonValue:
    """Turn what JSON does not know into texts, NaN and infinity among them."""
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
    """The JSON as text."""
    return json.dumps(report, indent=1, allow_nan=False) + "\n"


def section_gates(report: Json) -> Iterator[tuple[Json, Json]]:
    """Every gate of a report, with the section that it belongs to."""
    for section in report["sections"]:
        for gate in section["gates"]:
            yield section, gate


def output_metrics(port: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> list[Json]:
    """Metrics that people ask for, of every output; no gate rests on them.

    Args:
        port: its outputs.
        reference: its outputs, in the same dtype.
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
                "max_abs": float(difference.abs().max()),
                "relative_error": relative_error(value, expected),
                "norm_ratio": float(value.double().norm() / expected.double().norm()),
            }
        )
    return metrics

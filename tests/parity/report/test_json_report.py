from __future__ import annotations

import json
import math

import pytest
import torch

from siglip_port.parity.report import SCHEMA, dumps, output_metrics, to_json
from siglip_port.parity.results import Comparison, Finding, GateResult, Section
from tests.parity.report.comparisons import make_comparison


def test_json_contains_no_nan_or_infinity() -> None:
    report = to_json(make_comparison(math.inf), environment={"threads": 2})
    content = json.loads(dumps(report), parse_constant=pytest.fail)
    assert content["schema"] == SCHEMA
    assert content["equal"] is False
    assert content["environment"]["threads"] == 2
    assert content["environment"]["torch"] == torch.__version__
    assert content["findings"][0]["error"] == "inf"
    numerics = content["sections"][0]["gates"][1]
    assert numerics["passed"] is False
    assert numerics["measurements"][0]["bound_ratio"] == "inf"


def test_json_keys() -> None:
    """Keys are part of the schema; attributes of the classes are not."""
    report = to_json(make_comparison())
    assert list(report) == [
        *("schema", "equal", "verdict", "weights", "environment", "causes", "findings"),
        "sections",
    ]
    assert {"date", "command", "siglip_port", "torch", "python", "machine"} <= report[
        "environment"
    ].keys()
    assert list(report["findings"][0]) == [
        *("section", "gate", "message", "reference", "port", "error", "hint", "kind", "text"),
    ]
    assert list(report["causes"][0]) == [
        *("message", "reference", "port", "error", "hint", "kind", "gate"),
        *("sections", "findings", "is_consequence", "text"),
    ]
    (section,) = report["sections"]
    assert list(section) == ["name", "weights", "gates"]
    gate = section["gates"][1]
    assert list(gate) == [
        *("name", "checked", "bound", "findings", "measurements"),
        *("uncompared_taps", "float32_upcasts", "differing_taps", "notes", "passed"),
    ]
    assert list(gate["findings"][0]) == [
        *("message", "reference", "port", "error", "hint", "kind"),
    ]
    assert list(gate["measurements"][0]) == [
        *("run", "reference", "port", "error", "bound", "bound_ratio"),
        *("reference_error", "worst_vector_ratio", "passed"),
    ]


def test_json_of_uncompared_taps_and_float32_upcasts() -> None:
    gate = GateResult("numerics", 1, "", uncompared_taps=("a",), float32_upcasts=("b",))
    report = to_json(Comparison((Section("encoder", "N1", (gate,)),)))
    content = report["sections"][0]["gates"][0]
    assert content["uncompared_taps"] == ["a"]
    assert content["float32_upcasts"] == ["b"]


def test_json_of_causes_has_folded_places() -> None:
    findings = [
        Finding("differs", f"layers.{i}.fc1", f"blocks.{i}.fc1", 0.1 * (i + 1)) for i in range(3)
    ]
    gate = GateResult("numerics", 3, "", tuple(findings))
    sections = (Section("encoder", "N1", (gate,)), Section("small", "N1", (gate,)))
    report = to_json(Comparison(sections))
    assert len(report["findings"]) == 6
    (cause,) = report["causes"]
    assert cause["reference"] == "layers.{0...2}.fc1"
    assert cause["port"] == "blocks.{0...2}.fc1"
    assert cause["error"] == pytest.approx(0.3)
    assert cause["sections"] == ["encoder", "small"]
    assert cause["findings"] == 6
    assert cause["is_consequence"] is False
    assert report["verdict"].endswith(cause["text"])


def test_output_metrics() -> None:
    port = {"a": torch.tensor([[3.0, 4.0]])}
    reference = {"a": torch.tensor([[6.0, 8.0]])}
    (metrics,) = output_metrics(port, reference)
    assert metrics["cosine_min"] == pytest.approx(1)
    assert metrics["max_abs_diff"] == 4
    assert metrics["relative_error"] == 0.5
    assert metrics["norm_ratio"] == 0.5


def test_output_metrics_with_other_shape() -> None:
    assert output_metrics({"a": torch.ones(1, 2)}, {"a": torch.ones(1, 3)}) == []

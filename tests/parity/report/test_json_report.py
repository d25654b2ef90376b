from __future__ import annotations

import json
import math

import pytest
import torch

from siglip_port.parity.report import SCHEMA, dumps, output_metrics, to_json
from siglip_port.parity.results import Comparison, GateResult, Section
from tests.parity.report.comparisons import make_comparison


def test_json_contains_no_nan_or_infinity() -> None:
    report = to_json(make_comparison(math.inf), environment={"threads": 2})
    content = json.loads(dumps(report), parse_constant=pytest.fail)
    assert content["schema"] == SCHEMA
    assert content["equal"] is False
    assert content["environment"] == {"threads": 2}
    assert content["findings"][0]["error"] == "inf"
    numerics = content["sections"][0]["gates"][1]
    assert numerics["passed"] is False
    assert numerics["measurements"][0]["bound_ratio"] == "inf"


def test_json_keys() -> None:
    """Keys are part of the schema; attributes of the classes are not."""
    report = to_json(make_comparison())
    assert list(report) == ["schema", "equal", "verdict", "weights", "findings", "sections"]
    assert list(report["findings"][0]) == [
        *("section", "gate", "message", "reference", "port", "error", "hint", "text"),
    ]
    (section,) = report["sections"]
    assert list(section) == ["name", "weights", "gates"]
    gate = section["gates"][1]
    assert list(gate) == [
        *("name", "checked", "bound", "findings", "measurements"),
        *("uncompared_taps", "float32_upcasts", "differing_taps", "passed"),
    ]
    assert list(gate["findings"][0]) == ["message", "reference", "port", "error", "hint"]
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

from __future__ import annotations

import math

import pytest

from siglip_port.parity import Comparison
from siglip_port.parity.results import Finding, GateResult, Measurement, Section, first_names, ratio


def measurement(
    error: float, bound: float = 1.0, noise: float = 0.0, worst: float = 0.0
) -> Measurement:
    return Measurement("float32", "a", "b", error, bound, noise, worst)


@pytest.mark.parametrize(
    ("error", "worst", "passed"),
    [(1, 0, True), (1.1, 0, False), (0, 1.1, False), (math.nan, 0, False), (math.inf, 0, False)],
)
def test_measurement_passes_within_its_bounds(error: float, worst: float, passed: bool) -> None:
    assert measurement(error, worst=worst).passed == passed


def test_infinite_error_exceeds_infinite_bound() -> None:
    assert not measurement(math.inf, bound=math.inf).passed


def test_ratio() -> None:
    assert ratio(6, 2) == 3
    assert ratio(0, 0) == 0
    assert ratio(1, 0) == math.inf
    assert measurement(6, bound=4, noise=2).ratio == 3
    assert measurement(6, bound=4, noise=2).bound_ratio == 1.5


@pytest.mark.parametrize(
    ("finding", "text"),
    [
        (Finding("differs"), "differs"),
        (Finding("differs", "a", "a"), "a: differs"),
        (Finding("differs", "a", "b"), "a (port: b): differs"),
        (Finding("differs", port="b"), "port: b: differs"),
        (Finding("differs", error=0.25), "differs, relative error 2.5e-01"),
        (Finding("differs", error=math.inf), "differs"),
        (Finding("differs", hint="a cast"), "differs; looks like: a cast"),
    ],
)
def test_finding_in_one_line(finding: Finding, text: str) -> None:
    assert str(finding) == text


def make_comparison(*gates: GateResult) -> Comparison:
    return Comparison((Section("a", "b", gates),))


def test_comparison_without_gates_is_different() -> None:
    assert not Comparison(()).equal
    assert Comparison(()).verdict == "DIFFERENT (weights as given): no gate ran"


def test_gate_without_checks_fails() -> None:
    comparison = make_comparison(GateResult("numerics", 0, ""))
    assert not comparison.equal
    assert comparison.verdict == (
        "DIFFERENT (weights as given): numerics: gate numerics checked nothing"
    )


def test_verdict_has_most_precise_location() -> None:
    comparison = make_comparison(
        GateResult("sensitivity", 1, "", (Finding("constant"),)),
        GateResult("numerics", 1, "", (Finding("differs", "a"),)),
        GateResult("rounding float32", 1, "", (Finding("coarse"),)),
    )
    assert comparison.verdict == (
        "DIFFERENT (weights as given): numerics: a: differs; and 2 more findings"
    )
    assert str(comparison).splitlines()[:-1] == [
        "  numerics: a: differs",
        "  rounding float32: coarse",
        "  sensitivity: constant",
    ]


def test_verdict_counts_checks() -> None:
    comparison = make_comparison(
        GateResult("weights", 3, ""), GateResult("numerics", 7, "", uncompared_taps=("x", "y"))
    )
    assert comparison.verdict == (
        "EQUAL (weights as given): passed weights (3), numerics (7); modules not called by the "
        "port, compared at later taps only: x, y"
    )


def test_findings_are_truncated() -> None:
    findings = tuple(Finding(f"number {i}") for i in range(12))
    lines = str(make_comparison(GateResult("weights", 1, "", findings))).splitlines()
    assert lines[9] == "  weights: number 9"
    assert lines[10] == "  ... and 2 more"


def test_first_names() -> None:
    assert first_names({"b", "a"}) == "a, b"
    assert first_names(set("edcba")) == "a, b, c and 2 more"

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
def test_measurement_is_inside_its_bounds(error: float, worst: float, passed: bool) -> None:
    assert measurement(error, worst=worst).passed == passed


def test_infinity_is_not_inside_an_infinite_bound() -> None:
    assert not measurement(math.inf, bound=math.inf).passed


def test_ratio() -> None:
    assert ratio(6, 2) == 3
    assert ratio(0, 0) == 0
    assert ratio(1, 0) == math.inf
    assert measurement(6, bound=4, noise=2).ratio == 3
    assert measurement(6, bound=4, noise=2).share == 1.5


@pytest.mark.parametrize(
    ("finding", "text"),
    [
        (Finding("it differs"), "it differs"),
        (Finding("it differs", "a", "a"), "a: it differs"),
        (Finding("it differs", "a", "b"), "a (port: b): it differs"),
        (Finding("it differs", port="b"), "port: b: it differs"),
        (Finding("it differs", error=0.25), "it differs, relative error 2.5e-01"),
        (Finding("it differs", error=math.inf), "it differs"),
        (Finding("it differs", hint="a cast"), "it differs; looks like: a cast"),
    ],
)
def test_finding_in_one_line(finding: Finding, text: str) -> None:
    assert str(finding) == text


def compared(*gates: GateResult) -> Comparison:
    return Comparison((Section("a", "b", gates),))


def test_comparison_of_nothing_is_not_equal() -> None:
    assert not Comparison(()).equal
    assert Comparison(()).verdict == "DIFFERENT (weights as given): no gate was run"


def test_gate_that_checked_nothing_is_not_passed() -> None:
    comparison = compared(GateResult("numerics", 0, ""))
    assert not comparison.equal
    assert comparison.verdict == (
        "DIFFERENT (weights as given): numerics: gate numerics checked nothing"
    )


def test_verdict_has_the_best_address() -> None:
    comparison = compared(
        GateResult("sensitivity", 1, "", (Finding("dead"),)),
        GateResult("numerics", 1, "", (Finding("differs", "a"),)),
        GateResult("rounding float32", 1, "", (Finding("coarse"),)),
    )
    assert comparison.verdict == (
        "DIFFERENT (weights as given): numerics: a: differs; and 2 more findings"
    )
    assert str(comparison).splitlines()[:-1] == [
        "  numerics: a: differs",
        "  rounding float32: coarse",
        "  sensitivity: dead",
    ]


def test_verdict_of_equality_counts() -> None:
    comparison = compared(
        GateResult("weights", 3, ""), GateResult("numerics", 7, "", unseen=("x", "y"))
    )
    assert comparison.verdict == (
        "EQUAL (weights as given): passed weights (3), numerics (7); computed without the module "
        "tapped there, so seen only by what follows: x, y"
    )


def test_many_findings_are_cut_off() -> None:
    findings = tuple(Finding(f"number {i}") for i in range(12))
    lines = str(compared(GateResult("weights", 1, "", findings))).splitlines()
    assert lines[9] == "  weights: number 9"
    assert lines[10] == "  ... and 2 more"


def test_first_names() -> None:
    assert first_names({"b", "a"}) == "a, b"
    assert first_names(set("edcba")) == "a, b, c and 2 more"

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


def test_numerics_precedes_its_symptoms() -> None:
    comparison = make_comparison(
        GateResult("sensitivity", 1, "", (Finding("constant"),)),
        GateResult("numerics", 1, "", (Finding("differs", "a"),)),
        GateResult("interface", 1, "", (Finding("embed differs", error=0.1),)),
        GateResult("rounding float32", 1, "", (Finding("coarse"),)),
    )
    assert comparison.verdict == (
        "DIFFERENT (weights as given): numerics: a: differs; and 2 more findings"
    )
    assert comparison.lines() == [
        "  numerics: a: differs",
        "  interface: embed differs, relative error 1.0e-01",
        "  sensitivity: constant",
        "  rounding float32: not judged until numerics passes",
    ]
    assert str(comparison).splitlines() == [*comparison.lines(), comparison.verdict]
    assert [item.gate.name for item in comparison.findings][-1] == "rounding float32"


def test_root_causes_come_first_and_are_never_left_out() -> None:
    missing = Finding("not returned", "pooled", kind="missing output")
    raised = Finding("the port raises TypeError", "b", kind="error")
    steps = tuple(Finding("differs", name) for name in "abcdefghijkl")
    comparison = make_comparison(
        GateResult("numerics", 1, "", steps),
        GateResult("rounding float32", 1, "", (missing,)),
        GateResult("interface", 1, "", (raised,)),
        GateResult("weights", 1, "", (Finding("differs", "w.weight"),)),
        GateResult("config", 1, "", (Finding("other", "eps"),)),
        GateResult("environment", 1, "", (Finding("autocast"),)),
    )
    expected = [
        "  environment: autocast",
        "  config: eps: other",
        "  weights: w.weight: differs",
        "  rounding float32: pooled: not returned",
        "  interface: b: the port raises TypeError",
        *(f"  numerics: {name}: differs" for name in "abcde"),
        "  ... and 7 more",
    ]
    assert comparison.lines() == expected


def test_findings_without_numerics_are_causes() -> None:
    comparison = make_comparison(
        GateResult("sensitivity", 1, "", (Finding("constant"),)),
        GateResult("rounding bfloat16", 1, "", (Finding("coarse", "fc1"),)),
        GateResult("pixels", 1, "", (Finding("an image, pil: blurred"),)),
        GateResult("interface", 1, "", (Finding("embed differs"),)),
    )
    assert comparison.verdict == (
        "DIFFERENT (weights as given): interface: embed differs; also: "
        "pixels: an image, pil: blurred; rounding bfloat16: fc1: coarse; sensitivity: constant"
    )


def test_every_cause_is_in_the_verdict() -> None:
    """A wrong eps everywhere, another activation in the last block, and embed() on its own."""
    hint = "eps 1e-06 instead of 1e-05"
    findings = []
    for i in range(12):
        for name in ("layer_norm1", "layer_norm2"):
            place = f"encoder.layers.{i}.{name}", f"blocks.{i}.{name[5:]}"
            findings.append(Finding("differs", *place, (i + 1) * 1e-7, hint))
    findings.append(Finding("differs", "encoder.layers.11.mlp.fc2:input", "", 1e-3, "exact GELU"))
    comparison = make_comparison(
        GateResult("numerics", 1, "", tuple(findings)),
        GateResult("interface", 1, "", (Finding("embed() is not normalized", "pooled", "embed"),)),
    )
    assert comparison.verdict == (
        "DIFFERENT (weights as given): numerics: encoder.layers.{0...11}.layer_norm1 (port: "
        "blocks.{0...11}._norm1), encoder.layers.{0...11}.layer_norm2 (port: blocks.{0...11}."
        "_norm2): differs, relative error 1.2e-06; looks like: eps 1e-06 instead of 1e-05; also: "
        "numerics: encoder.layers.11.mlp.fc2:input: exact GELU; "
        "interface: pooled: embed() is not normalized"
    )
    assert len(comparison.findings) == 26
    assert len(comparison.lines()) == 3


def test_verdict_is_bounded() -> None:
    steps = tuple(Finding("differs", name) for name in "abcdefghijkl")
    verdict = make_comparison(GateResult("numerics", 1, "", steps)).verdict
    assert verdict.endswith(
        "also: numerics: b: differs; numerics: c: differs; numerics: d: "
        "differs; numerics: e: differs; and 7 more findings"
    )


def numerics(*findings: Finding) -> GateResult:
    return GateResult("numerics", 1, "", findings)


def test_one_cause_in_several_checkpoints_is_one_line() -> None:
    def section(name: str, *findings: Finding) -> Section:
        return Section(name, "N1", (numerics(*findings), GateResult("config", 1, "")))

    first = Finding("differs", "layers.0.norm", hint="scaled by 12")
    second = Finding("differs", "layers.1.norm", hint="scaled by 18")
    without_hint = Finding("differs", "layers.1.norm", error=0.5)
    elsewhere = Finding("differs", "head")
    three = Comparison((section("a", first), section("b", second), section("c", elsewhere)))
    assert three.lines() == [
        "  numerics: layers.0.norm: differs; looks like: scaled by 12; in 2 of 3 checkpoints",
        "  numerics: head: differs; only in the c, N1",
    ]
    reverse = Comparison((section("a", without_hint), section("b", first)))
    assert reverse.lines() == [
        "  numerics: layers.0.norm: differs, relative error 5.0e-01; looks like: scaled by 12; "
        "in both checkpoints"
    ]
    assert reverse.findings[0] == (reverse.sections[1], reverse.sections[1].gates[0], first)
    section_of_first, gate, finding = reverse.findings[0]
    assert (section_of_first.name, gate.name, finding.hint) == ("b", "numerics", "scaled by 12")
    three = Comparison(tuple(section(name, elsewhere) for name in "abc"))
    assert three.lines() == ["  numerics: head: differs; in all checkpoints"]


def test_dtypes_are_one_cause_with_its_clearest_place() -> None:
    def rounding(dtype: str, place: str, error: float) -> GateResult:
        finding = Finding(f"error in {dtype} is {error:g}x", place, place, error, "narrower dtype")
        measured = Measurement(dtype, place, place, error, 1.0)
        return GateResult(f"rounding {dtype}", 1, "", (finding,), (measured,))

    comparison = make_comparison(rounding("bfloat16", "fc2", 3.1), rounding("float16", "fc1", 40))
    assert comparison.lines() == [
        "  rounding float16: fc1, fc2: error in float16 is 40x, relative error 4.0e+01; "
        "looks like: narrower dtype"
    ]


def test_differences_without_hints_are_folded_over_blocks_only() -> None:
    places = ("layers.0.fc1", "layers.1.fc1", "layers.0.fc2", "layers.3", "layers.4", "x.1:input")
    comparison = make_comparison(numerics(*(Finding("differs", place) for place in places)))
    assert comparison.lines() == [
        "  numerics: layers.{0...1}.fc1: differs",
        "  numerics: layers.0.fc2: differs",
        "  numerics: layers.{3...4}: differs",
        "  numerics: x.1:input: differs",
    ]


def test_places_of_a_cause_are_bounded() -> None:
    findings = [Finding("differs", name, hint="no bias") for name in "abcd"]
    assert make_comparison(numerics(*findings)).lines() == [
        "  numerics: a, b, c and 1 more place: differs; looks like: no bias"
    ]


def consequences(comparison: Comparison) -> list[str]:
    return [cause.finding.reference for cause in comparison.causes if cause.is_consequence]


def test_steps_with_wrong_weights_are_consequences() -> None:
    weights = (Finding("differs", "layers.0.fc1.bias"), Finding("differs", "emb.pos.weight"))
    comparison = make_comparison(
        GateResult("weights", 1, "", weights),
        numerics(
            Finding("differs", "emb"),
            Finding("differs", "layers.0.fc1"),
            Finding("differs", "layers.0.fc1:input"),
            Finding("differs", "layers.1.fc1"),
            Finding("differs", "layers.0", hint="no residual"),
        ),
    )
    assert consequences(comparison) == ["emb"]
    # Both blocks of fc1 have one line, and the weights explain only one of them.
    assert [cause.gate for cause in comparison.causes][:2] == ["weights", "weights"]


def test_step_without_hint_follows_from_the_same_step_in_other_blocks() -> None:
    comparison = make_comparison(
        numerics(
            Finding("differs", "layers.0.norm", hint="eps"),
            Finding("differs", "layers.1.norm"),
            Finding("differs", "layers.1.fc1"),
        )
    )
    assert consequences(comparison) == ["layers.1.norm"]


@pytest.mark.parametrize(("place", "expected"), [("", ["a"]), ("model", [])])
def test_steps_without_hints_follow_from_switches(place: str, expected: list[str]) -> None:
    """Not from modules, such as those in training mode, which may have no effect."""
    comparison = make_comparison(
        GateResult("environment", 1, "", (Finding("autocast", port=place),)),
        numerics(Finding("differs", "a"), Finding("differs", "b", hint="eps")),
    )
    assert consequences(comparison) == expected


def test_gradient_with_its_own_hint_is_a_cause() -> None:
    gradients = (
        Finding("differs", "layers.0.fc1", error=1.0),
        Finding("is missing", "layers.3.attention", hint="detached"),
        Finding("differs", "layers.2.norm", hint="scaled by 2"),
    )
    comparison = make_comparison(
        numerics(Finding("differs", "layers.0.norm", hint="eps")),
        GateResult("gradients", 1, "", gradients),
    )
    assert consequences(comparison) == ["layers.0.fc1", "layers.2.norm"]
    assert "also: gradients: layers.3.attention: detached; and 2 more" in comparison.verdict
    own = make_comparison(GateResult("gradients", 1, "", gradients))
    assert consequences(own) == []


def test_values_of_calls_follow_from_numerics() -> None:
    gate = GateResult(
        "calls", 1, "", (Finding("differs", "tokens", error=0.1), Finding("writes to its input"))
    )
    assert consequences(make_comparison(gate)) == []
    assert consequences(make_comparison(numerics(Finding("differs", "a")), gate)) == ["tokens"]
    prevented = numerics(Finding("the port raises ValueError", "a", kind="error"))
    assert consequences(make_comparison(prevented, gate)) == ["tokens", ""]


def test_weights_of_a_shared_module_are_a_consequence() -> None:
    comparison = make_comparison(
        GateResult("environment", 1, "", (Finding("shared", "head.norm", "pool.norm"),)),
        GateResult(
            "weights", 1, "", (Finding("differs", "head.norm.bias"), Finding("differs", "a.bias"))
        ),
    )
    assert consequences(comparison) == ["head.norm.bias"]


def test_images_of_one_kind_are_one_cause() -> None:
    names = ("a, pil", "b, pil", "c, torchvision")
    findings = [
        Finding(f"{name}: differs by up to 3 of 255 levels", "pixel_values") for name in names
    ]
    other = Finding("d, pil: TypeError: no", "pixel_values")
    comparison = make_comparison(GateResult("pixels", 1, "", (*findings, other)))
    assert [len(cause.members) for cause in comparison.causes] == [3, 1]


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
    lines = str(make_comparison(GateResult("rounding", 1, "", findings))).splitlines()
    assert lines[9] == "  rounding: number 9"
    assert lines[10] == "  ... and 2 more"


def test_first_names() -> None:
    assert first_names({"b", "a"}) == "a, b"
    assert first_names(set("edcba")) == "a, b, c and 2 more"

from __future__ import annotations

from siglip_port.parity.report import to_json, to_markdown
from siglip_port.parity.results import Comparison, Finding, GateResult, Section
from tests.parity.report.comparisons import make_comparison


def test_markdown_of_difference() -> None:
    text = to_markdown(to_json(make_comparison()))
    assert text.startswith("# Parity: DIFFERENT\n")
    row = (
        "| numerics | `a.norm` | `b.norm` | 1e-07 | differs in float64; "
        "looks like: eps 1e-05 \\| <odd> |"
    )
    assert row in text


def test_markdown_has_one_row_per_cause() -> None:
    findings = [Finding("differs", f"layers.{i}.fc1") for i in range(12)]
    gates = (
        GateResult("numerics", 3, "", tuple(findings)),
        GateResult("rounding float32", 1, "", (Finding("coarse", "fc1"),)),
    )
    text = to_markdown(to_json(Comparison((Section("encoder", "N1", gates),))))
    table = text.partition("## Findings")[2].partition("## Gates")[0]
    assert table.count("\n| numerics |") == 1
    assert "| numerics | `layers.{0...11}.fc1` |  | nan | differs |" in table
    assert "rounding" not in table


def test_markdown_of_equality() -> None:
    assert "## Findings" not in to_markdown(to_json(make_comparison(0)))

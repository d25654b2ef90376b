from __future__ import annotations

import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from siglip_port.atomic import write_text
from siglip_port.parity import Comparison
from siglip_port.parity.report import document as report
from siglip_port.parity.results import Finding, GateResult, Measurement, Section
from siglip_port.text import format_table


def comparison(error: float = 1e-7) -> Comparison:
    measured = Measurement("float64, free-running", "a.norm", "b.norm", error, 1e-10)
    finding = Finding("differs in float64", "a.norm", "b.norm", error, "eps 1e-05 | <odd>")
    semantics = GateResult(
        "semantics", 7, "1e-10: why", (finding,) if error > 1e-10 else (), (measured,)
    )
    return Comparison(
        (Section("tower", "N1", (GateResult("weights", 3, "equality"), semantics)),),
        "random weights",
    )


def test_json_holds_all_and_only_numbers_that_json_has() -> None:
    found = json.loads(
        report.dumps(report.to_json(comparison(math.inf), environment={"threads": 2})),
        parse_constant=pytest.fail,
    )
    assert found["schema"] == report.SCHEMA
    assert found["equal"] is False
    assert found["environment"] == {"threads": 2}
    assert found["findings"][0]["error"] == "inf"
    semantics = found["sections"][0]["gates"][1]
    assert semantics["passed"] is False
    assert semantics["measurements"][0]["share"] == "inf"


def test_the_table_has_one_row_a_gate() -> None:
    rows = report.table(comparison())
    assert [row[0] for row in rows] == ["gate", "weights", "semantics"]
    assert rows[1][1:] == ["3", "", "tower, N1", "passed"]
    assert rows[2][1:] == ["7", "1e+03", "a.norm (tower, N1)", "FAILED"]
    twice = Comparison(comparison(0).sections * 2)
    assert report.table(twice)[2] == ["semantics", "14", "0", "a.norm (tower, N1)", "passed"]
    assert format_table([["a", "bb"], ["ccc", "d"]]) == ["a   | bb", "ccc | d"]


def test_colour_only_on_a_terminal() -> None:
    assert report.coloured("EQUAL", True, False) == "EQUAL"
    assert "\033[32" in report.coloured("EQUAL", True, True)
    assert "\033[31" in report.coloured("DIFFERENT", False, True)


def test_markdown() -> None:
    text = report.markdown(report.to_json(comparison()))
    assert text.startswith("# Parity: DIFFERENT\n")
    assert (
        "| semantics | `a.norm` | `b.norm` | 1e-07 | differs in float64; looks like: eps 1e-05 \\| "
        "<odd> |" in text
    )
    assert "## What differs" not in report.markdown(report.to_json(comparison(0)))


def test_junit() -> None:
    suite = ElementTree.fromstring(report.junit(report.to_json(comparison())))
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    failure = suite.find("testcase[@name='semantics']/failure")
    assert failure is not None
    assert "a.norm (port: b.norm): differs" in str(failure.get("message"))
    suite = ElementTree.fromstring(report.junit(report.to_json(comparison(0))))
    assert suite.get("failures") == "0"


def test_against_a_baseline() -> None:
    before, now = report.to_json(comparison(1e-12)), report.to_json(comparison(9e-11))
    assert report.against_baseline(now, before) == [
        "against the baseline: 1 figures in both, 0 new, 0 gone",
        "  tower, N1, float64, free-running, a.norm: 0.01 of its bound before, 0.9 now",
    ]
    assert len(report.against_baseline(before, now)) == 1
    assert (
        "  the verdict was: EQUAL"
        in report.against_baseline(report.to_json(comparison()), before)[1]
    )
    with pytest.raises(ValueError, match="the baseline has schema 1, expected 2; write it anew"):
        report.against_baseline(now, {"schema": 1})


def test_figures() -> None:
    (figures,) = report.figures(
        {"a": torch.tensor([[3.0, 4.0]])}, {"a": torch.tensor([[6.0, 8.0]])}
    )
    assert (figures["cosine_min"], figures["max_abs"]) == (pytest.approx(1), 4)
    assert (figures["relative_error"], figures["norm_ratio"]) == (0.5, 0.5)
    assert report.figures({"a": torch.ones(1, 2)}, {"a": torch.ones(1, 3)}) == []


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    write_text(target, "one")
    with pytest.raises(UnicodeEncodeError):
        write_text(target, "\ud800")
    assert target.read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]

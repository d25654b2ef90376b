from __future__ import annotations

import math

from siglip_port.parity import Comparison
from siglip_port.parity.report import colored, gate_table
from siglip_port.text import format_table
from tests.parity.report.comparisons import make_comparison


def test_gate_table_has_one_row_per_gate() -> None:
    rows = gate_table(make_comparison())
    assert rows[0] == ["gate", "checks", "error/bound", "at", "result"]
    assert [row[0] for row in rows] == ["gate", "weights", "numerics"]
    assert rows[1][1:] == ["3", "", "encoder, N1", "passed"]
    assert rows[2][1:] == ["7", "1e+03", "a.norm (encoder, N1)", "FAILED"]


def test_gate_table_of_several_checkpoints() -> None:
    twice = Comparison(make_comparison(0).sections * 2)
    assert gate_table(twice)[1][3] == "2 checkpoints"
    assert gate_table(twice)[2] == ["numerics", "14", "0", "a.norm (encoder, N1)", "passed"]


def test_gate_table_shows_nan() -> None:
    comparison = Comparison(make_comparison(1e-9).sections + make_comparison(math.nan).sections)
    assert gate_table(comparison)[2][2] == "nan"


def test_format_table() -> None:
    assert format_table([["a", "bb"], ["ccc", "d"]]) == ["a   | bb", "ccc | d"]


def test_color_only_on_terminal() -> None:
    assert colored("EQUAL", True, False) == "EQUAL"
    assert "\033[32" in colored("EQUAL", True, True)
    assert "\033[31" in colored("DIFFERENT", False, True)

from __future__ import annotations

import pytest

from siglip_port.parity.report import against_baseline, to_json
from tests.parity.report.comparisons import make_comparison


def test_increased_errors() -> None:
    before = to_json(make_comparison(1e-12))
    now = to_json(make_comparison(9e-11))
    assert against_baseline(now, before) == [
        "measurements against the baseline: 1 in both, 0 new, 0 removed",
        "  encoder, N1, float64, free-running, a.norm: error/bound 0.9, was 0.01",
    ]
    assert len(against_baseline(before, now)) == 1


def test_other_verdict() -> None:
    before = to_json(make_comparison(1e-12))
    lines = against_baseline(to_json(make_comparison()), before)
    assert "  verdict of the baseline: EQUAL" in lines[1]


def test_other_schema() -> None:
    report = to_json(make_comparison())
    message = "the baseline has schema 2, expected 3; write it again with --json"
    with pytest.raises(ValueError, match=message):
        against_baseline(report, {"schema": 2})

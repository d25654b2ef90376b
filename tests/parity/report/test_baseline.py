from __future__ import annotations

import pytest

from siglip_port.parity.report import against_baseline, to_json
from tests.parity.report.comparisons import make_comparison


def test_shares_that_have_grown() -> None:
    before = to_json(make_comparison(1e-12))
    now = to_json(make_comparison(9e-11))
    assert against_baseline(now, before) == [
        "against the baseline: 1 figures in both, 0 new, 0 gone",
        "  encoder, N1, float64, free-running, a.norm: 0.01 of its bound before, 0.9 now",
    ]
    assert len(against_baseline(before, now)) == 1


def test_another_verdict() -> None:
    before = to_json(make_comparison(1e-12))
    lines = against_baseline(to_json(make_comparison()), before)
    assert "  the verdict was: EQUAL" in lines[1]


def test_another_schema() -> None:
    report = to_json(make_comparison())
    with pytest.raises(ValueError, match="the baseline has schema 1, expected 2; write it anew"):
        against_baseline(report, {"schema": 1})

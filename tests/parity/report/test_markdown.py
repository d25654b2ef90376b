from __future__ import annotations

from siglip_port.parity.report import to_json, to_markdown
from tests.parity.report.comparisons import make_comparison


def test_markdown_of_difference() -> None:
    text = to_markdown(to_json(make_comparison()))
    assert text.startswith("# Parity: DIFFERENT\n")
    row = (
        "| numerics | `a.norm` | `b.norm` | 1e-07 | differs in float64; "
        "looks like: eps 1e-05 \\| <odd> |"
    )
    assert row in text


def test_markdown_of_equality() -> None:
    assert "## Findings" not in to_markdown(to_json(make_comparison(0)))

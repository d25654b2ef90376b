"""Compare a report with an earlier one."""

from __future__ import annotations

from siglip_port.parity.report.json_report import SCHEMA, Json, section_gates

MAX_LINES = 3


def against_baseline(report: Json, baseline: Json) -> list[str]:
    """Compare the measurements of a report with those of an earlier one.

    Args:
        report: JSON report.
        baseline: Earlier JSON report.

    Returns:
        Lines to print: counts, another verdict, and the largest increases, even within the bounds.

    Raises:
        ValueError: The earlier report has another schema.
    """
    if baseline.get("schema") != SCHEMA:
        raise ValueError(
            f"the baseline has schema {baseline.get('schema')!r}, expected {SCHEMA}; write it "
            "again with --json"
        )
    now = bound_ratios(report)
    before = bound_ratios(baseline)
    common = now.keys() & before.keys()
    lines = [
        f"measurements against the baseline: {len(common)} in both, {len(now) - len(common)} new, "
        f"{len(before) - len(common)} removed"
    ]
    if report["equal"] != baseline["equal"]:
        lines.append(f"  verdict of the baseline: {baseline['verdict']}")
    increased = [place for place in common if now[place] > before[place]]
    increased.sort(key=lambda place: (now[place] - before[place], place), reverse=True)
    for place in increased[:MAX_LINES]:
        lines.append(f"  {', '.join(place)}: error/bound {now[place]:.2g}, was {before[place]:.2g}")
    return lines


def bound_ratios(report: Json) -> dict[tuple[str, ...], float]:
    """Return error / bound of every measurement, by checkpoint, weights, run and point."""
    ratios: dict[tuple[str, ...], float] = {}
    for section, gate in section_gates(report):
        for item in gate["measurements"]:
            place = (section["name"], section["weights"], item["run"], item["reference"])
            ratios[place] = float(item["bound_ratio"])
    return ratios

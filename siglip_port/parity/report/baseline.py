"""Compares a report with an earlier one."""

from __future__ import annotations

from siglip_port.parity.report.json_report import SCHEMA, Json, section_gates

MAX_LINES = 3


def against_baseline(report: Json, baseline: Json) -> list[str]:
    """What became of an earlier report's measurements: lines to print.

    A pass that has grown is worth a look.

    Raises:
        ValueError: the earlier report has another schema.
    """
    if baseline.get("schema") != SCHEMA:
        raise ValueError(
            f"the baseline has schema {baseline.get('schema')!r}, expected {SCHEMA}; write it anew"
        )
    now = shares_by_place(report)
    before = shares_by_place(baseline)
    common = now.keys() & before.keys()
    lines = [
        f"against the baseline: {len(common)} figures in both, {len(now) - len(common)} new, "
        f"{len(before) - len(common)} gone"
    ]
    if report["equal"] != baseline["equal"]:
        lines.append(f"  the verdict was: {baseline['verdict']}")
    grown = [place for place in common if now[place] > before[place]]
    grown.sort(key=lambda place: (now[place] - before[place], place), reverse=True)
    for place in grown[:MAX_LINES]:
        lines.append(
            f"  {', '.join(place)}: {before[place]:.2g} of its bound before, {now[place]:.2g} now"
        )
    return lines


def shares_by_place(report: Json) -> dict[tuple[str, ...], float]:
    """The share of its bound that every measurement takes up, by its address."""
    shares: dict[tuple[str, ...], float] = {}
    for section, gate in section_gates(report):
        for item in gate["measurements"]:
            place = (section["name"], section["weights"], item["run"], item["reference"])
            shares[place] = float(item["share"])
    return shares

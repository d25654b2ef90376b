"""Markdown report, for pull requests and issues."""

from __future__ import annotations

from siglip_port.parity.report.json_report import Json, section_gates
from siglip_port.parity.results import MAX_LINES


def to_markdown(report: Json) -> str:
    """Render a report as Markdown.

    Args:
        report: JSON report.
    """
    title = "equal" if report["equal"] else "DIFFERENT"
    lines = [f"# Parity: {title}", "", report["verdict"], ""]
    if report["findings"]:
        lines += [*finding_lines(report["findings"]), ""]
    lines += gate_lines(report)
    for key in ("outputs", "environment"):
        if report.get(key):
            lines += list_lines(key.capitalize(), report[key])
    return "\n".join(lines) + "\n"


def finding_lines(findings: list[Json]) -> list[str]:
    """Return the table of the first findings."""
    lines = [
        "## Findings",
        "",
        "| gate | reference | port | relative error | finding |",
        "|---|---|---|---|---|",
    ]
    for finding in findings[:MAX_LINES]:
        message = finding["message"]
        if finding["hint"]:
            message += f"; looks like: {finding['hint']}"
        message = message.replace("|", "\\|")
        lines.append(
            f"| {finding['gate']} | `{finding['reference']}` | `{finding['port']}` | "
            f"{format_value(finding['error'])} | {message} |"
        )
    if len(findings) > MAX_LINES:
        lines.append(f"\n... and {len(findings) - MAX_LINES} more.")
    return lines


def gate_lines(report: Json) -> list[str]:
    """Return the table of all gates."""
    lines = [
        "## Gates",
        "",
        "| checkpoint | gate | checks | largest error/bound | bound | result |",
        "|---|---|---|---|---|---|",
    ]
    for section, gate in section_gates(report):
        ratios = [float(measurement["bound_ratio"]) for measurement in gate["measurements"]]
        largest = format_value(max(ratios)) if ratios else ""
        result = "passed" if gate["passed"] else "**failed**"
        lines.append(
            f"| {section['name']}, {section['weights']} | {gate['name']} | {gate['checked']} | "
            f"{largest} | {gate['bound']} | {result} |"
        )
    return lines


def list_lines(title: str, items: Json | list[Json]) -> list[str]:
    """Return a section with one line per item."""
    lines = ["", f"## {title}", ""]
    for item in items if isinstance(items, list) else [items]:
        fields = ", ".join(f"{name} {format_value(value)}" for name, value in item.items())
        lines.append(f"- {fields}")
    return lines


def format_value(value: object) -> str:
    """Format a value; floats with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)

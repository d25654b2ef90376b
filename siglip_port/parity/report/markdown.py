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
    if report["causes"]:
        lines += [*finding_lines(report["causes"]), ""]
    lines += gate_lines(report)
    for key in ("outputs", "environment"):
        if report.get(key):
            lines += list_lines(key.capitalize(), report[key])
    return "\n".join(lines) + "\n"


def finding_lines(causes: list[Json]) -> list[str]:
    """Return the table of the first causes."""
    lines = [
        "## Findings",
        "",
        "| gate | reference | port | relative error | finding |",
        "|---|---|---|---|---|",
    ]
    for cause in causes[:MAX_LINES]:
        message = cause["message"]
        if cause["hint"]:
            message += f"; looks like: {cause['hint']}"
        message = message.replace("|", "\\|")
        lines.append(
            f"| {cause['gate']} | {code(cause['reference'])} | {code(cause['port'])} | "
            f"{format_value(cause['error'])} | {message} |"
        )
    if len(causes) > MAX_LINES:
        lines.append(f"\n... and {len(causes) - MAX_LINES} more.")
    return lines


def code(text: str) -> str:
    """Format as code; empty text has no format."""
    return f"`{text}`" if text else ""


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

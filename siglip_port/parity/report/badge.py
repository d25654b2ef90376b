"""A badge: the verdict in a few words, in the format of shields.io endpoints."""

from __future__ import annotations

import json

from siglip_port.parity.report.json_report import Json, section_gates


def to_badge(report: Json) -> str:
    """Render a report as JSON for a badge: https://shields.io/badges/endpoint-badge.

    Args:
        report: JSON report.
    """
    badge = {
        "schemaVersion": 1,
        "label": "parity",
        "message": one_line(report),
        "color": "brightgreen" if report["equal"] else "red",
    }
    return json.dumps(badge) + "\n"


def one_line(report: Json) -> str:
    """Summarize a report: result, gates passed, and the release of the reference."""
    gates = [gate["passed"] for _, gate in section_gates(report)]
    text = "equal" if report["equal"] else "different"
    text += f", {sum(gates)} of {len(gates)} gates"
    version = (report.get("environment") or {}).get("transformers")
    if version:
        text += f", transformers {version}"
    return text

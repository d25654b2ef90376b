"""One report of many comparisons, such as those of a test run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from siglip_port.atomic import write_text
from siglip_port.parity.report.badge import to_badge
from siglip_port.parity.report.json_report import SCHEMA, Json, dumps
from siglip_port.parity.report.junit import to_junit
from siglip_port.parity.report.markdown import to_markdown


def combine(reports: Sequence[tuple[str, Json]]) -> Json:
    """Combine JSON reports; the names of sections begin with those of the comparisons.

    Args:
        reports: Name and JSON report of each comparison.
    """
    sections = []
    causes = []
    findings = []
    for name, report in reports:
        for cause in report["causes"]:
            causes.append({**cause, "message": f"{name}: {cause['message']}"})
        for section in report["sections"]:
            sections.append({**section, "name": f"{name}: {section['name']}"})
        for finding in report["findings"]:
            findings.append({**finding, "section": f"{name}: {finding['section']}"})
    different = [(name, report) for name, report in reports if not report["equal"]]
    verdict = f"EQUAL: {len(reports)} comparisons"
    if different:
        name, report = different[0]
        verdict = f"DIFFERENT: {len(different)} of {len(reports)}; {name}: {report['verdict']}"
    return {
        "schema": SCHEMA,
        "equal": not different,
        "verdict": verdict,
        "weights": f"{len(reports)} comparisons",
        "environment": reports[0][1].get("environment", {}),
        "causes": causes,
        "findings": findings,
        "sections": sections,
    }


def write_reports(folder: Path, report: Json) -> None:
    """Write a report as JSON, Markdown and JUnit XML, and its badge.

    Raises:
        OSError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.json", dumps(report))
    write_text(folder / "report.md", to_markdown(report))
    write_text(folder / "junit.xml", to_junit(report))
    write_text(folder / "badge.json", to_badge(report))

"""JUnit XML report, for CI."""

from __future__ import annotations

from xml.etree import ElementTree

from siglip_port.parity.report.json_report import Json, section_gates


def to_junit(report: Json) -> str:
    """Render a report as JUnit XML: one test case per checkpoint and gate.

    Args:
        report: JSON report.
    """
    gates = list(section_gates(report))
    failures = sum(not gate["passed"] for _, gate in gates)
    suite = ElementTree.Element(
        "testsuite",
        name="siglip_port.parity",
        tests=str(len(gates)),
        failures=str(failures),
        errors="0",
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in report["environment"].items():
        ElementTree.SubElement(properties, "property", name=name, value=str(value))
    for section, gate in gates:
        classname = f"parity.{section['name']}, {section['weights']}"
        case = ElementTree.SubElement(suite, "testcase", classname=classname, name=gate["name"])
        if not gate["passed"]:
            add_failure(case, findings_of(report, section, gate))
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def findings_of(report: Json, section: Json, gate: Json) -> list[str]:
    """Return the findings of one gate in one section, as text."""
    address = (section["name"], gate["name"])
    findings = report["findings"]
    return [item["text"] for item in findings if (item["section"], item["gate"]) == address]


def add_failure(case: ElementTree.Element, findings: list[str]) -> None:
    """Mark a test case as failed."""
    message = findings[0] if findings else "gate checked nothing"
    failure = ElementTree.SubElement(case, "failure", message=message)
    failure.text = "\n".join(findings)

from __future__ import annotations

from xml.etree import ElementTree

from siglip_port.parity.report import to_json, to_junit
from siglip_port.parity.results import Comparison, Finding, GateResult, Section
from tests.parity.report.comparisons import make_comparison


def test_junit_of_difference() -> None:
    suite = ElementTree.fromstring(to_junit(to_json(make_comparison())))
    assert suite.get("tests") == "2"
    assert suite.get("failures") == "1"
    failure = suite.find("testcase[@name='numerics']/failure")
    assert failure is not None
    assert "a.norm (port: b.norm): differs" in str(failure.get("message"))


def test_junit_lists_findings_of_every_failed_gate() -> None:
    """Also those that the verdict leaves out, as consequences of another gate."""
    gates = (
        GateResult("numerics", 3, "", (Finding("differs", "fc1"),)),
        GateResult("rounding float32", 1, "", (Finding("coarse", "fc2"),)),
    )
    report = to_json(Comparison((Section("encoder", "N1", gates),)))
    suite = ElementTree.fromstring(to_junit(report))
    failure = suite.find("testcase[@name='rounding float32']/failure")
    assert failure is not None
    assert failure.get("message") == "fc2: coarse"


def test_junit_of_equality() -> None:
    suite = ElementTree.fromstring(to_junit(to_json(make_comparison(0))))
    assert suite.get("failures") == "0"

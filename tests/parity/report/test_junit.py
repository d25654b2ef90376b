from __future__ import annotations

from xml.etree import ElementTree

from siglip_port.parity.report import to_json, to_junit
from tests.parity.report.comparisons import make_comparison


def test_junit_of_difference() -> None:
    suite = ElementTree.fromstring(to_junit(to_json(make_comparison())))
    assert suite.get("tests") == "2"
    assert suite.get("failures") == "1"
    failure = suite.find("testcase[@name='numerics']/failure")
    assert failure is not None
    assert "a.norm (port: b.norm): differs" in str(failure.get("message"))


def test_junit_of_equality() -> None:
    suite = ElementTree.fromstring(to_junit(to_json(make_comparison(0))))
    assert suite.get("failures") == "0"

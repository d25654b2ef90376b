from __future__ import annotations

from siglip_port.parity.gates import check_config


def test_extra_fields_of_port_are_ignored() -> None:
    assert check_config({"eps": 1e-6, "more": 1}, {"eps": 1e-6}).passed


def test_different_and_missing_fields() -> None:
    gate = check_config({"eps": 1e-5}, {"eps": 1e-6, "heads": 3})
    assert [finding.reference for finding in gate.findings] == ["eps", "heads"]
    assert gate.findings[0].message == "1e-05 in the port, 1e-06 in the reference"


def test_empty_config_fails() -> None:
    assert not check_config({}, {}).passed

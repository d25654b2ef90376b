"""Tests of the recorded results in docs/: they cover the current catalog."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.selftest.catalog import EQUIVALENT, HARNESS, MUTANTS
from scripts.selftest.report import SCHEMA

DOCS = Path(__file__).parents[3] / "docs"


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((DOCS / name).read_text(encoding="utf-8"))
    return content


def test_recorded_selftest_is_of_catalog() -> None:
    """It has every mutant of the catalog, and passed."""
    recorded = read("selftest.json")
    assert recorded["schema"] == SCHEMA
    assert recorded["passed"] is True
    fields = ("name", "description", "source", "gate")
    catalog = [tuple(getattr(mutant, field) for field in fields) for mutant in MUTANTS]
    assert [tuple(entry[field] for field in fields) for entry in recorded["mutants"]] == catalog
    for entry in recorded["mutants"]:
        assert entry["located"], entry["name"]
        assert entry["gate"] in entry["detected_by"], entry["name"]
    variants = {variant["name"] for variant in recorded["equivalent_variants"]}
    assert variants == {mutant.name for mutant in EQUIVALENT}
    assert not any(variant["false_alarm"] for variant in recorded["equivalent_variants"])
    assert recorded["harness_mutants"].keys() == {mutant.name for mutant in HARNESS}
    assert all(recorded["harness_mutants"].values())


def test_recorded_acceptance_rules_are_of_catalog() -> None:
    recorded = read("acceptance_rules.json")
    port = {mutant.name for mutant in MUTANTS if mutant.subject == "port"}
    assert 0.8 * len(port) <= recorded["mutants"] <= len(port)
    assert recorded["equivalent_variants"] <= len(EQUIVALENT)
    gates = recorded["rules"][-1]
    for weights, names in recorded["missed_by_gates"].items():
        assert set(names) <= port
        assert gates["detected"][weights] == recorded["mutants"] - len(names)
    for rule in recorded["rules"]:
        assert rule["detected"].keys() == rule["false_alarms"].keys() == recorded["weights"].keys()


def test_table_of_acceptance_rules() -> None:
    pytest.importorskip("matplotlib")
    from scripts.benchmarks import acceptance_rules

    recorded = read("acceptance_rules.json")
    lines = acceptance_rules.to_markdown(recorded).splitlines()
    assert lines[0] == (
        "| mutants detected, of 237 | fresh initialization | stress weights N1 "
        "| stress weights L7 |"
    )
    assert lines[-1] == ("| **siglip_port gates** | **214** | **229** | **230 (2 false alarms)** |")

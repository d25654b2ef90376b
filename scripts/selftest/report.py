"""Results of the self-test, as text and as JSON."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field

import torch

from scripts.selftest.examination import MutantResult
from siglip_port.parity.siglip import reference
from siglip_port.parity.siglip.cases import ALL_GATES

SCHEMA = 2
"""Version of the JSON report."""


@dataclass
class Report:
    """Results of the self-test.

    Attributes:
        results: One result for each mutant of the port.
        variant_runs: (settings of the run, result) for each equivalent variant.
        harness: Harness mutant -> what detected it; empty if it was missed.
        full: Whether every mutant went through all gates and got hints.
    """

    results: list[MutantResult] = field(default_factory=list)
    variant_runs: list[tuple[str, MutantResult]] = field(default_factory=list)
    harness: dict[str, str] = field(default_factory=dict)
    full: bool = False

    @property
    def failures(self) -> list[str]:
        """Missed or mislocated mutants, false alarms and missed harness mutants, one line each."""
        lines = [describe_failure(result) for result in self.results if not result.passed]
        for run, result in self.variant_runs:
            if not result.passed:
                gates = ", ".join([*result.detections, *filter(None, [result.error])])
                lines.append(f"false alarm: {result.mutant.name} ({run}): {gates}")
        for name, evidence in self.harness.items():
            if not evidence:
                lines.append(f"harness mutant missed: {name}")
        return lines

    def census(self) -> list[list[str]]:
        """Return a table with one row per gate: the mutants that it must detect, and does."""
        rows = [["gate", "mutants", "detected", "located"]]
        for gate in ("pixels", *ALL_GATES, "run"):
            assigned = [result for result in self.results if result.mutant.gate == gate]
            if assigned:
                detected = sum(gate in result.detections for result in assigned)
                located = sum(result.located for result in assigned)
                counts = [len(assigned), detected, located]
                rows.append([gate, *map(str, counts)])
        return rows

    def summary(self) -> str:
        """Return the counts in one line."""
        total = len(self.results)
        detected = sum(result.detected for result in self.results)
        located = sum(result.located for result in self.results)
        false_alarms = sum(not result.passed for _, result in self.variant_runs)
        harness = sum(map(bool, self.harness.values()))
        hints = f" ({sum(map(has_hint, self.results))} with a hint)" if self.full else ""
        return (
            f"{detected} of {total} mutants detected, {located} of {total} located{hints}, "
            f"{false_alarms} false alarms in {len(self.variant_runs)} runs of equivalent variants, "
            f"{harness} of {len(self.harness)} harness mutants detected"
        )


def describe_failure(result: MutantResult) -> str:
    """Describe a mutant that is missed by its gate, or mislocated, in one line."""
    detected_by = ", ".join(result.detections) or "no gate"
    line = f"{result.mutant.name}: expected detection by {result.mutant.gate}, got {detected_by}"
    if result.false_locations:
        line += f"; false locations: {', '.join(result.false_locations[:3])}"
    return line


def has_hint(result: MutantResult) -> bool:
    """Whether a finding for a mutant has a hint."""
    return any(finding.hint for finding in result.detections.values())


def machine() -> str:
    """Return platform and versions in one line."""
    return (
        f"{platform.system()} {platform.machine()}, torch {torch.__version__}, "
        f"transformers {reference.VERSION}, Python {platform.python_version()}"
    )


def to_json(report: Report) -> dict[str, object]:
    """Return the report as JSON: one entry per mutant, with the finding of each gate."""
    mutants = []
    for result in report.results:
        findings = {gate: str(finding) for gate, finding in result.detections.items()}
        mutants.append(
            {
                "name": result.mutant.name,
                "description": result.mutant.description,
                "source": result.mutant.source,
                "gate": result.mutant.gate,
                "detected_by": findings,
                "located": result.located,
            }
        )
    variants = []
    for run, result in report.variant_runs:
        variants.append({"name": result.mutant.name, "run": run, "false_alarm": not result.passed})
    return {
        "schema": SCHEMA,
        "machine": machine(),
        "passed": not report.failures,
        "summary": report.summary(),
        "mutants": mutants,
        "equivalent_variants": variants,
        "harness_mutants": report.harness,
    }

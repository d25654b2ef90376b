"""What the self-test found, for people and for programs."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field

import torch

from scripts.selftest.examination import Result
from siglip_port.parity.siglip import reference
from siglip_port.parity.siglip.cases import ALL_GATES


@dataclass
class Report:
    """What the self-test found.

    Attributes:
        results: of all mutants.
        alarms: of all equivalent variants, each with how it was run.
        harness: the harness's own bugs, and what showed each; empty where nothing did.
        full: whether every mutant went through all gates, and got hints.
    """

    results: list[Result] = field(default_factory=list)
    alarms: list[tuple[str, Result]] = field(default_factory=list)
    harness: dict[str, str] = field(default_factory=dict)
    full: bool = False

    @property
    def failures(self) -> list[str]:
        """All that is not as it must be, one line each."""
        lines = [describe_failure(result) for result in self.results if not result.passed]
        for how, result in self.alarms:
            if not result.passed:
                gates = ", ".join(result.detections)
                lines.append(f"false alarm: {result.mutant.name} ({how}): {gates} {result.error}")
        for name, shown in self.harness.items():
            if not shown:
                lines.append(f"bug in the harness not detected: {name}")
        return lines

    def census(self) -> list[list[str]]:
        """Count, a row a gate: what it must detect, and does; of all, what it did, and alone."""
        rows = [["gate", "must notice", "does", "of all", "alone"]]
        for gate in ("pixels", *ALL_GATES, "run"):
            own = [result for result in self.results if result.mutant.gate == gate]
            detected = [result for result in self.results if gate in result.detections]
            alone = [result for result in detected if len(result.detections) == 1]
            if own or detected:
                does = sum(gate in result.detections for result in own)
                counts = [len(own), does, len(detected), len(alone)]
                rows.append([gate, *map(str, counts)])
        return rows

    def summary(self) -> str:
        """Return the counts in one line."""
        total = len(self.results)
        detected = sum(result.detected for result in self.results)
        located = sum(result.located for result in self.results)
        alarms = sum(not result.passed for _, result in self.alarms)
        shown = sum(map(bool, self.harness.values()))
        hints = ""
        if self.full:
            hints = f" (and says what {sum(map(has_hint, self.results))} look like)"
        return (
            f"detects {detected} of {total} bugs, names the place of {located} of {total}"
            f"{hints}, {alarms} false alarms in {len(self.alarms)} runs of equivalent variants; "
            f"{shown} of {len(self.harness)} bugs in the harness itself are found out"
        )


def describe_failure(result: Result) -> str:
    """Say in one line what the gates made of a mutant, and what they must."""
    line = f"{result.mutant.name}: must be detected by {result.mutant.gate}, was detected by "
    line += ", ".join(result.detections) or "nothing"
    if result.false_locations:
        line += f"; named wrongly: {', '.join(result.false_locations[:3])}"
    return line


def has_hint(result: Result) -> bool:
    """Whether a gate says what a mutant looks like."""
    return any(finding.hint for finding in result.detections.values())


def to_json(report: Report) -> dict[str, object]:
    """Return the report for programs: one entry a mutant, with all that detected it."""
    mutants = []
    for result in report.results:
        detections = {gate: str(finding) for gate, finding in result.detections.items()}
        mutants.append(
            {
                "name": result.mutant.name,
                "what": result.mutant.what,
                "source": result.mutant.source,
                "must": result.mutant.gate,
                "noticed": detections,
                "named": result.located,
            }
        )
    alarms = []
    for how, result in report.alarms:
        alarms.append({"name": result.mutant.name, "run": how, "passed": result.passed})
    return {
        "schema": 1,
        "machine": f"{platform.system()} {platform.machine()}, torch {torch.__version__}, "
        f"transformers {reference.VERSION}, Python {platform.python_version()}",
        "passed": not report.failures,
        "summary": report.summary(),
        "mistakes": mutants,
        "false_alarms": alarms,
        "harness": report.harness,
    }

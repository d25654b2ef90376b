"""Meaning and bound of each gate, and how many mutants it detected in the recorded self-test.

`python -m siglip_port.parity.siglip.census docs/selftest.json` writes `selftest_summary.json` from
the JSON report of the self-test.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from siglip_port.atomic import write_text
from siglip_port.parity.gates import MEANING

SUMMARY = Path(__file__).with_name("selftest_summary.json")


def summarize(selftest: Mapping[str, Any]) -> dict[str, Any]:
    """Count the mutants that each gate must detect, those that it detects, and those located.

    Args:
        selftest: JSON report of `siglip-port verify --selftest`.
    """
    mutants = selftest["mutants"]
    gates: dict[str, dict[str, int]] = {}
    for gate in MEANING:
        assigned = [mutant for mutant in mutants if mutant["gate"] == gate]
        detected = [mutant for mutant in assigned if gate in mutant["detected_by"]]
        located = sum(mutant["located"] for mutant in assigned)
        gates[gate] = {
            "mutants": len(assigned),
            "detected": len(detected),
            "located": located,
        }
    return {"machine": selftest["machine"], "mutants": len(mutants), "gates": gates}


def census(summary: Mapping[str, Any]) -> str:
    """Describe each gate: its meaning, its bound and its detections.

    Args:
        summary: Return value of `summarize`.
    """
    lines = []
    for gate, meaning in MEANING.items():
        counts = summary["gates"][gate]
        lines += [
            f"{gate}: {meaning.text}",
            f"  bound: {meaning.bound}",
            f"  detected {counts['detected']} and located {counts['located']} of its "
            f"{counts['mutants']} mutants",
        ]
    lines.append(f"(counts: `siglip-port verify --selftest` on {summary['machine']})")
    return "\n".join(lines)


def recorded_census() -> str:
    """Return the census of the recorded self-test."""
    return census(json.loads(SUMMARY.read_text(encoding="utf-8")))


def write_summary(report: Path) -> None:
    """Write `selftest_summary.json` from a JSON report of the self-test."""
    summary = summarize(json.loads(report.read_text(encoding="utf-8")))
    write_text(SUMMARY, json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    write_summary(Path(sys.argv[1]))

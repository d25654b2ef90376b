"""What each gate means, and what it alone detected in the recorded run of the self-test."""

from __future__ import annotations

import json
from pathlib import Path

from siglip_port.parity.gates import MEANING


def census_text(recorded: Path) -> str:
    """Describe all gates.

    Args:
        recorded: the report of the self-test; where there is no such file, counts are left out.
    """
    report = None
    if recorded.is_file():
        report = json.loads(recorded.read_text(encoding="utf-8"))
    lines = []
    for gate, meaning in MEANING.items():
        lines.append(f"{gate}: {meaning.text}")
        lines.append(f"  bound: {meaning.bound}")
        if report is not None:
            lines.append(f"  {count_detections(report['mistakes'], gate)}")
    if report is not None:
        machine = report["machine"]
        lines.append(f"(counts: `compare_origin.py --selftest --json`, recorded on {machine})")
    return "\n".join(lines)


def count_detections(mutants: list[dict[str, dict[str, str]]], gate: str) -> str:
    """Say how many of the recorded mutants a gate detects, and which of them no other does."""
    detected = [mutant for mutant in mutants if gate in mutant["noticed"]]
    alone = [str(mutant["name"]) for mutant in detected if len(mutant["noticed"]) == 1]
    names = ", ".join(alone) or "none"
    return f"notices {len(detected)} of {len(mutants)} mistakes, alone: {names}"

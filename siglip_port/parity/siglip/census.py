"""What each gate means, and what it detected in the last recorded self-test.

The summary beside this file is made of the self-test's JSON report:
`python -m siglip_port.parity.siglip.census docs/selftest.json`.
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
    """Count what each gate detected, and name what it alone detected.

    Args:
        selftest: the JSON report of `siglip-port verify --selftest`.
    """
    mutants = selftest["mistakes"]
    detections: dict[str, Any] = {}
    for gate in MEANING:
        detected = [mutant for mutant in mutants if gate in mutant["noticed"]]
        alone = [mutant["name"] for mutant in detected if len(mutant["noticed"]) == 1]
        detections[gate] = {"detected": len(detected), "alone": alone}
    return {"machine": selftest["machine"], "mutants": len(mutants), "gates": detections}


def census(summary: Mapping[str, Any]) -> str:
    """What each gate means, its bound, and what it detected: text for people.

    Args:
        summary: what `summarize` returned.
    """
    lines = []
    for gate, meaning in MEANING.items():
        lines += [f"{gate}: {meaning.text}", f"  bound: {meaning.bound}"]
        detections = summary["gates"][gate]
        alone = ", ".join(detections["alone"]) or "none"
        lines.append(
            f"  notices {detections['detected']} of {summary['mutants']} mistakes, alone: {alone}"
        )
    lines.append(
        f"(counts: `compare_origin.py --selftest --json`, recorded on {summary['machine']})"
    )
    return "\n".join(lines)


def recorded_census() -> str:
    """The census of the summary that comes with the package."""
    return census(json.loads(SUMMARY.read_text(encoding="utf-8")))


def write_summary(report: Path) -> None:
    """Summarize a JSON report of the self-test in the package."""
    summary = summarize(json.loads(report.read_text(encoding="utf-8")))
    write_text(SUMMARY, json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    write_summary(Path(sys.argv[1]))

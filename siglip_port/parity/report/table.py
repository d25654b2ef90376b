"""Table of the gates for the console, and the color of the verdict."""

from __future__ import annotations

import math

from siglip_port.parity.results import Comparison, GateResult


def gate_table(comparison: Comparison) -> list[list[str]]:
    """Return a header and one row per gate: name, checks, largest error/bound, location, result."""
    gates: dict[str, list[tuple[str, GateResult]]] = {}
    for section, gate in comparison.gates:
        checkpoint = f"{section.name}, {section.weights}"
        gates.setdefault(gate.name, []).append((checkpoint, gate))
    rows = [["gate", "checks", "error/bound", "at", "result"]]
    rows += [gate_row(name, results) for name, results in gates.items()]
    return rows


def gate_row(name: str, results: list[tuple[str, GateResult]]) -> list[str]:
    """Return the row of one gate, with its results on several checkpoints."""
    checked = sum(gate.checked for _, gate in results)
    measured = [(checkpoint, item) for checkpoint, gate in results for item in gate.measurements]
    ratio = ""
    place = results[0][0] if len(results) == 1 else f"{len(results)} checkpoints"
    if measured:
        checkpoint, largest = max(measured, key=lambda pair: nan_as_inf(pair[1].bound_ratio))
        ratio = f"{largest.bound_ratio:.2g}"
        place = f"{largest.reference} ({checkpoint})"
    passed = all(gate.passed for _, gate in results)
    return [name, f"{checked:,}", ratio, place, "passed" if passed else "FAILED"]


def nan_as_inf(value: float) -> float:
    """Replace NaN by infinity, so that numbers can be ordered."""
    return math.inf if math.isnan(value) else value


def colored(text: str, equal: bool, terminal: bool) -> str:
    """Color a verdict green or red, on a terminal only."""
    if not terminal:
        return text
    color = 32 if equal else 31
    return f"\033[{color};1m{text}\033[0m"

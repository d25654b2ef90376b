"""What the gates return, and the verdict over all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_FINDINGS_SHOWN = 10

# Whose address is best: numerics names a step, weights a tensor, the others a symptom.
BEST_ADDRESS = (
    "numerics",
    "weights",
    "rounding",
    "interface",
    "pixels",
    "config",
    "environment",
    "sensitivity",
)


@dataclass(frozen=True)
class Measurement:
    """How far the port was from the truth at one place, in one run, and how far it may be.

    Attributes:
        run: `float64, free-running`, `float64, teacher-forced`, or the dtype.
        reference: the point, or output, in the reference's names.
        port: the same in the port's.
        error: ||port - truth|| / ||truth||; the truth is the reference in float64 on the same
            numbers.
        bound: what `error` may be at most.
        noise: in a low dtype, the reference's own error; else 0.
        worst: of the worst vector, in units of its bound; at most 1. 0 where it is not bounded.
    """

    run: str
    reference: str
    port: str
    error: float
    bound: float
    noise: float = 0.0
    worst: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether it is inside its bounds. What is not finite is inside none."""
        return math.isfinite(self.error) and self.error <= self.bound and self.worst <= 1

    @property
    def ratio(self) -> float:
        """The error in units of the reference's own."""
        return ratio(self.error, self.noise)

    @property
    def share(self) -> float:
        """The error in units of its bound."""
        return ratio(self.error, self.bound)


def ratio(value: float, unit: float) -> float:
    """A number in some unit; where the unit is 0, nothing but 0 is finite."""
    if unit:
        return value / unit
    return 0.0 if value == 0 else math.inf


@dataclass(frozen=True)
class Finding:
    """Something that is not as it must be, with its address.

    Attributes:
        message: what was found, and what was expected.
        reference: the module, tensor or output, in the reference's names; empty where there is
            none.
        port: the same in the port's names.
        error: its relative error there; for numerics, given right inputs.
        hint: what the error looks like; empty where it looks like nothing known.
    """

    message: str
    reference: str = ""
    port: str = ""
    error: float = math.nan
    hint: str = ""

    def __str__(self) -> str:
        """All of it in one line."""
        place = self.reference
        if self.port and self.port != self.reference:
            place = f"{place} (port: {self.port})" if place else f"port: {self.port}"
        text = f"{place}: {self.message}" if place else self.message
        if not math.isnan(self.error) and self.error != math.inf:
            text += f", relative error {self.error:.1e}"
        if self.hint:
            text += f"; looks like: {self.hint}"
        return text


@dataclass(frozen=True)
class GateResult:
    """The result of one gate.

    Attributes:
        name: of the gate.
        checked: number of things that were checked. A gate that checked nothing has not passed.
        bound: what was allowed, and where that comes from.
        findings: what was not as it must be.
        measurements: the metrics, where the gate measures.
        unseen: points of the reference that the port computes without passing the module that is
            tapped there.
        float32_upcasts: points whose float64 values the port rounds to float32; the rounding gate
            judges these.
    """

    name: str
    checked: int
    bound: str
    findings: tuple[Finding, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    unseen: tuple[str, ...] = ()
    float32_upcasts: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether all was as it must be, and there was something to check."""
        return not self.findings and self.checked > 0


@dataclass(frozen=True)
class Section:
    """The gates that were run on one checkpoint.

    Attributes:
        name: of the checkpoint.
        weights: what weights they are.
        gates: in the order in which they were run.
    """

    name: str
    weights: str
    gates: tuple[GateResult, ...]


@dataclass(frozen=True)
class Comparison:
    """All results of one comparison. `print` it for the verdict and what led to it.

    Attributes:
        sections: one for each checkpoint.
        label: what kind of weights the verdict is about.
    """

    sections: tuple[Section, ...]
    label: str = "weights as given"

    @property
    def gates(self) -> list[tuple[Section, GateResult]]:
        """Every gate, with the section that it belongs to."""
        return [(section, gate) for section in self.sections for gate in section.gates]

    @property
    def equal(self) -> bool:
        """Whether the port is the reference's equal: every gate ran, and passed."""
        gates = self.gates
        return bool(gates) and all(gate.passed for _, gate in gates)

    @property
    def findings(self) -> list[tuple[Section, GateResult, Finding]]:
        """All that is not as it must be, the best address first."""
        findings = [
            (section, gate, finding) for section, gate in self.gates for finding in gate.findings
        ]
        for section, gate in self.gates:
            if not gate.checked:
                findings.append((section, gate, Finding(f"gate {gate.name} checked nothing")))
        return sorted(findings, key=lambda item: BEST_ADDRESS.index(item[1].name.split()[0]))

    @property
    def verdict(self) -> str:
        """How the comparison ended, in one line."""
        if self.equal:
            return self._equal_verdict()
        findings = self.findings
        if not findings:
            return f"DIFFERENT ({self.label}): no gate was run"
        _, gate, finding = findings[0]
        text = f"DIFFERENT ({self.label}): {gate.name}: {finding}"
        others = len(findings) - 1
        if others == 1:
            text += "; and 1 more finding"
        elif others:
            text += f"; and {others} more findings"
        return text

    def _equal_verdict(self) -> str:
        counts: dict[str, int] = {}
        unseen: set[str] = set()
        upcasts: set[str] = set()
        for _, gate in self.gates:
            counts[gate.name] = counts.get(gate.name, 0) + gate.checked
            unseen.update(gate.unseen)
            upcasts.update(gate.float32_upcasts)
        gates = ", ".join(f"{name} ({count})" for name, count in counts.items())
        text = f"EQUAL ({self.label}): passed {gates}"
        if unseen:
            text += "; computed without the module tapped there, so seen only by what follows: "
            text += first_names(unseen)
        if upcasts:
            text += "; float32 inside whatever the dtype, so judged by its rounding: "
            text += first_names(upcasts)
        return text

    def __str__(self) -> str:
        findings = self.findings
        lines = [f"  {gate.name}: {finding}" for _, gate, finding in findings[:MAX_FINDINGS_SHOWN]]
        if len(findings) > MAX_FINDINGS_SHOWN:
            lines.append(f"  ... and {len(findings) - MAX_FINDINGS_SHOWN} more")
        return "\n".join([*lines, self.verdict])


def first_names(names: set[str], limit: int = 3) -> str:
    """The first names of a set in the order of the alphabet, and how many more there are."""
    text = ", ".join(sorted(names)[:limit])
    if len(names) > limit:
        text += f" and {len(names) - limit} more"
    return text

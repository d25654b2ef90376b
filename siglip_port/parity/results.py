"""Results of the gates, and the verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_FINDINGS_SHOWN = 10

# Order of findings, most precise location first: numerics names a step of the computation, weights
# a tensor, the others a symptom.
GATE_PRECEDENCE = (
    "numerics",
    "weights",
    "rounding",
    "interface",
    "pixels",
    "config",
    "environment",
    "sensitivity",
    "second-ref",
)


@dataclass(frozen=True)
class Measurement:
    """Error of the port at one tap or output, and its bound.

    Attributes:
        run: `float64, free-running`, `float64, teacher-forced`, or the dtype.
        reference: Tap or output, by the reference's name.
        port: The same by the port's name.
        error: ||port - exact|| / ||exact||; exact is the reference in float64 on the same weights
            and inputs.
        bound: Largest `error` that passes.
        noise: The reference's own rounding error in this dtype; 0 in float64.
        worst: Error of the worst vector, relative to its bound (passes up to 1); 0 if unbounded.
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
        """Whether the error is finite and within its bounds."""
        return math.isfinite(self.error) and self.error <= self.bound and self.worst <= 1

    @property
    def ratio(self) -> float:
        """Error divided by the reference's own."""
        return ratio(self.error, self.noise)

    @property
    def bound_ratio(self) -> float:
        """Error divided by its bound."""
        return ratio(self.error, self.bound)


def ratio(value: float, unit: float) -> float:
    """Divide two numbers; x / 0 is infinite, and 0 / 0 is 0."""
    if unit:
        return value / unit
    return 0.0 if value == 0 else math.inf


@dataclass(frozen=True)
class Finding:
    """Failed check, with its location.

    Attributes:
        message: Observed and expected result.
        reference: Module, tensor or output by the reference's name; empty if it has none.
        port: The same by the port's name.
        error: Relative error; NaN if there is none. For numerics, that of the teacher-forced run.
        hint: Known bug that explains the error; empty if none does.
    """

    message: str
    reference: str = ""
    port: str = ""
    error: float = math.nan
    hint: str = ""

    def __str__(self) -> str:
        """Format location, message, error and hint in one line."""
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
    """Result of one gate.

    Attributes:
        name: Name of the gate, with the dtype for `rounding`.
        checked: Number of checks; a gate with 0 checks fails.
        bound: Bound, and how it was chosen.
        findings: Failed checks.
        measurements: Errors at taps and outputs, for the gates that measure.
        uncompared_taps: Taps of the reference that could not be compared, because the port does not
            call the module, or calls it with other shapes.
        float32_upcasts: Taps that the port computes in float32 even in float64; the gate `rounding`
            judges them.
    """

    name: str
    checked: int
    bound: str
    findings: tuple[Finding, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    uncompared_taps: tuple[str, ...] = ()
    float32_upcasts: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether all checks passed, and there was at least one."""
        return not self.findings and self.checked > 0


@dataclass(frozen=True)
class Section:
    """Gates of one checkpoint.

    Attributes:
        name: Name of the checkpoint.
        weights: Kind of weights.
        gates: Results in the order of the gates.
    """

    name: str
    weights: str
    gates: tuple[GateResult, ...]


@dataclass(frozen=True)
class Comparison:
    """All results of a comparison; `print` it for findings and verdict.

    Attributes:
        sections: One per checkpoint.
        label: Kind of weights, for the verdict.
    """

    sections: tuple[Section, ...]
    label: str = "weights as given"

    @property
    def gates(self) -> list[tuple[Section, GateResult]]:
        """All gates, each with its section."""
        return [(section, gate) for section in self.sections for gate in section.gates]

    @property
    def equal(self) -> bool:
        """Whether at least one gate ran, and all gates passed."""
        gates = self.gates
        return bool(gates) and all(gate.passed for _, gate in gates)

    @property
    def findings(self) -> list[tuple[Section, GateResult, Finding]]:
        """All findings, the most precise location first."""
        findings = [
            (section, gate, finding) for section, gate in self.gates for finding in gate.findings
        ]
        for section, gate in self.gates:
            if not gate.checked:
                findings.append((section, gate, Finding(f"gate {gate.name} checked nothing")))
        return sorted(findings, key=lambda item: GATE_PRECEDENCE.index(item[1].name.split()[0]))

    @property
    def verdict(self) -> str:
        """Result of the comparison in one line."""
        if self.equal:
            return self._equal_verdict()
        findings = self.findings
        if not findings:
            return f"DIFFERENT ({self.label}): no gate ran"
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
        uncompared: set[str] = set()
        upcasts: set[str] = set()
        for _, gate in self.gates:
            counts[gate.name] = counts.get(gate.name, 0) + gate.checked
            uncompared.update(gate.uncompared_taps)
            upcasts.update(gate.float32_upcasts)
        gates = ", ".join(f"{name} ({count})" for name, count in counts.items())
        text = f"EQUAL ({self.label}): passed {gates}"
        if uncompared:
            text += "; modules not called by the port, compared at later taps only: "
            text += first_names(uncompared)
        if upcasts:
            text += "; float32 at every dtype, judged by the rounding gate: "
            text += first_names(upcasts)
        return text

    def __str__(self) -> str:
        """Format the findings, one per line, and the verdict."""
        findings = self.findings
        lines = [f"  {gate.name}: {finding}" for _, gate, finding in findings[:MAX_FINDINGS_SHOWN]]
        if len(findings) > MAX_FINDINGS_SHOWN:
            lines.append(f"  ... and {len(findings) - MAX_FINDINGS_SHOWN} more")
        return "\n".join([*lines, self.verdict])


def first_names(names: set[str], limit: int = 3) -> str:
    """Join the first names of a set in alphabetical order, and count the rest."""
    text = ", ".join(sorted(names)[:limit])
    if len(names) > limit:
        text += f" and {len(names) - limit} more"
    return text

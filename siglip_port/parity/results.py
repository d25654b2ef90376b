"""Results of the gates, and the verdict."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from siglip_port.parity.causes import Cause, find_causes, gate_kind

MAX_LINES = 10
"""Number of causes that `str` lists, if no more of them are root causes or have hints."""

MAX_CAUSES_IN_VERDICT = 5

FindingKind = Literal["difference", "missing output", "error"]


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
        kind: `missing output` if the port does not return an output, `error` if it raises one.
    """

    message: str
    reference: str = ""
    port: str = ""
    error: float = math.nan
    hint: str = ""
    kind: FindingKind = "difference"

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
        differing_taps: Taps at which the port has other values without effect on the outputs, such
            as tokens in another order.
        notes: Sentences for the verdict, about what the gate did not judge.
    """

    name: str
    checked: int
    bound: str
    findings: tuple[Finding, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    uncompared_taps: tuple[str, ...] = ()
    float32_upcasts: tuple[str, ...] = ()
    differing_taps: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

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


class GateFinding(NamedTuple):
    """Finding with the gate and the checkpoint in which it was made.

    Attributes:
        section: Checkpoint.
        gate: Result of the gate.
        finding: Finding.
    """

    section: Section
    gate: GateResult
    finding: Finding


@dataclass(frozen=True)
class Comparison:
    """All results of a comparison; `print` it for causes and verdict.

    Attributes:
        sections: One per checkpoint.
        label: Kind of weights, for the verdict.
        limits: What could not be judged, with the reason.
    """

    sections: tuple[Section, ...]
    label: str = "weights as given"
    limits: tuple[str, ...] = ()

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
    def findings(self) -> list[GateFinding]:
        """All findings by cause, in the order of `causes`; the deferred ones come last."""
        members = [member for cause in self.causes for member in cause.members]
        return members + self.deferred

    @functools.cached_property
    def causes(self) -> list[Cause]:
        """Findings folded into causes, root causes first and consequences last."""
        findings = self._in_order_of_gates()
        if self._numerics_failed:
            findings = [item for item in findings if not is_rounding(item)]
        return find_causes(findings, self._num_checked)

    @property
    def deferred(self) -> list[GateFinding]:
        """Findings of `rounding` if `numerics` failed: another function has another rounding."""
        if not self._numerics_failed:
            return []
        return [item for item in self._in_order_of_gates() if is_rounding(item)]

    @property
    def verdict(self) -> str:
        """Result of the comparison in one line, with the first causes."""
        clauses = [f"; not judged: {reason}" for reason in self.limits]
        return "".join([self._result(), *clauses])

    def _result(self) -> str:
        if self.equal:
            return self._equal_verdict()
        causes = self.causes
        if not causes:
            return f"DIFFERENT ({self.label}): no gate ran"
        text = f"DIFFERENT ({self.label}): {causes[0].text}"
        others = [cause.short for cause in causes[1:] if not cause.is_consequence]
        others = others[: MAX_CAUSES_IN_VERDICT - 1]
        if others:
            text += f"; also: {'; '.join(others)}"
        more = len(causes) - 1 - len(others)
        if more:
            text += f"; and {more} more finding{'s' if more > 1 else ''}"
        return text

    @property
    def _numerics_failed(self) -> bool:
        return any(gate_kind(gate) == "numerics" and not gate.passed for _, gate in self.gates)

    def _in_order_of_gates(self) -> list[GateFinding]:
        findings = []
        for section, gate in self.gates:
            findings += [GateFinding(section, gate, finding) for finding in gate.findings]
            if not gate.checked:
                nothing = Finding(f"gate {gate.name} checked nothing")
                findings.append(GateFinding(section, gate, nothing))
        return findings

    def _num_checked(self, item: GateFinding) -> int:
        if item.finding.kind == "error":
            return len(self.sections)
        name = gate_kind(item.gate)
        return sum(name in map(gate_kind, section.gates) for section in self.sections)

    def _equal_verdict(self) -> str:
        counts: dict[str, int] = {}
        uncompared: set[str] = set()
        upcasts: set[str] = set()
        differing: set[str] = set()
        notes: dict[str, None] = {}
        for _, gate in self.gates:
            counts[gate.name] = counts.get(gate.name, 0) + gate.checked
            uncompared.update(gate.uncompared_taps)
            upcasts.update(gate.float32_upcasts)
            differing.update(gate.differing_taps)
            notes.update(dict.fromkeys(gate.notes))
        gates = ", ".join(f"{name} ({count})" for name, count in counts.items())
        text = f"EQUAL ({self.label}): passed {gates}"
        if uncompared:
            text += "; modules not called by the port, compared at later taps only: "
            text += first_names(uncompared)
        if upcasts:
            text += "; float32 at every dtype, judged by the rounding gate: "
            text += first_names(upcasts)
        if differing:
            text += "; other values inside, without effect on the outputs: "
            text += first_names(differing)
        return "; ".join([text, *notes])

    def __str__(self) -> str:
        """Format the causes, one per line, and the verdict."""
        return "\n".join([*self.lines(), self.verdict])

    def lines(self) -> list[str]:
        """Return one line per cause. Root causes and hints are never left out."""
        causes = self.causes
        shown = [cause for cause in causes if cause.is_root or cause.finding.hint]
        for cause in causes:
            if len(shown) < MAX_LINES and cause not in shown:
                shown.append(cause)
        lines = [f"  {cause.text}" for cause in causes if cause in shown]
        if len(causes) > len(shown):
            lines.append(f"  ... and {len(causes) - len(shown)} more")
        deferred = self.deferred
        if deferred:
            names = dict.fromkeys(item.gate.name for item in deferred)
            lines.append(f"  {', '.join(names)}: not judged until numerics passes")
        return lines


def is_rounding(item: GateFinding) -> bool:
    """Return whether a finding is a rounding error."""
    return gate_kind(item.gate) == "rounding" and item.finding.kind == "difference"


def first_names(names: set[str], limit: int = 3) -> str:
    """Join the first names of a set in alphabetical order, and count the rest."""
    text = ", ".join(sorted(names)[:limit])
    if len(names) > limit:
        text += f" and {len(names) - limit} more"
    return text

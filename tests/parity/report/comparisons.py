"""Comparisons for the tests of the reports."""

from __future__ import annotations

from siglip_port.parity import Comparison
from siglip_port.parity.results import Finding, GateResult, Measurement, Section


def make_comparison(error: float = 1e-7) -> Comparison:
    """Make a comparison of two gates on one checkpoint; `error` has the bound 1e-10."""
    measurement = Measurement("float64, free-running", "a.norm", "b.norm", error, 1e-10)
    finding = Finding("differs in float64", "a.norm", "b.norm", error, "eps 1e-05 | <odd>")
    findings = (finding,) if error > 1e-10 else ()
    gates = (
        GateResult("weights", 3, "equality"),
        GateResult("numerics", 7, "1e-10: why", findings, (measurement,)),
    )
    return Comparison((Section("encoder", "N1", gates),), "random weights")

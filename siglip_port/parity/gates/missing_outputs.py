"""The finding for outputs that the port does not return."""

from __future__ import annotations

from siglip_port.parity.observe import ComparedRun, ReferenceRun
from siglip_port.parity.results import Finding


def find_missing_outputs(run: ReferenceRun, port_run: ComparedRun) -> list[Finding]:
    """Find outputs of the reference that the port does not return."""
    findings = []
    for name in run.exact.outputs:
        if name not in port_run.outputs:
            message = "the port does not return this output"
            findings.append(Finding(message, name, name, kind="missing output"))
    return findings

"""What every gate that runs the port says of outputs that it does not return."""

from __future__ import annotations

from siglip_port.parity.observe import ComparedRun, ReferenceRun
from siglip_port.parity.results import Finding


def find_missing_outputs(run: ReferenceRun, compared: ComparedRun) -> list[Finding]:
    """Find the outputs of the reference that the other side does not return."""
    findings = []
    for name in run.exact.outputs:
        if name not in compared.outputs:
            findings.append(Finding("the port does not return it", name, name))
    return findings

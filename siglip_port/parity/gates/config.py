"""The gate `config`: both sides have the same architecture."""

from __future__ import annotations

from collections.abc import Mapping

from siglip_port.parity.gates.meaning import MEANING
from siglip_port.parity.results import Finding, GateResult


def check_config(port: Mapping[str, object], reference: Mapping[str, object]) -> GateResult:
    """Compare every field of the reference's config.

    Args:
        port: Fields of the port's config.
        reference: Fields of the reference's config, under the port's names.
    """
    findings = []
    for name, expected in reference.items():
        value = port.get(name)
        if value != expected:
            message = f"{value!r} in the port, {expected!r} in the reference"
            findings.append(Finding(message, name, name))
    return GateResult("config", len(reference), MEANING["config"].bound, tuple(findings))

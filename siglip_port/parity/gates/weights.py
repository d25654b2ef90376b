"""The gate `weights`: every tensor of the one side is, bit for bit, a tensor of the other.

The outputs cannot vouch for all of them: a bias of the keys, for one, changes no attention.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from siglip_port.parity import hints
from siglip_port.parity.gates.meaning import MEANING
from siglip_port.parity.metrics import bits, relative_error, tensors_equal
from siglip_port.parity.results import Finding, GateResult


def check_weights(port: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> GateResult:
    """Compare all tensors. Both sides are given under the reference's names."""
    missing = names_missing_on_one_side(port, reference)
    findings = []
    for name in sorted(port.keys() | reference.keys()):
        if name in missing:
            side = "port" if name in port else "reference"
            findings.append(Finding(f"only the {side} has it", name, name))
        elif name in port and name in reference:
            findings += compare_tensors(name, port[name], reference)
    for names in names_sharing_memory(port):
        message = f"these share one memory: {', '.join(names[:4])}"
        findings.append(Finding(message, names[0], names[0]))
    return GateResult("weights", len(reference), MEANING["weights"].bound, tuple(findings))


def names_missing_on_one_side(
    port: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> set[str]:
    """The names that only one of the two sides has."""
    return port.keys() ^ reference.keys()


def compare_tensors(name: str, tensor: Tensor, reference: Mapping[str, Tensor]) -> list[Finding]:
    """Compare one tensor of the port with the reference's of the same name."""
    expected = reference[name]
    if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
        message = (
            f"{tensor.dtype} {list(tensor.shape)} in the port, "
            f"{expected.dtype} {list(expected.shape)} in the reference"
        )
        return [Finding(message, name, name)]
    if tensors_equal(tensor, expected):
        return []
    differing_bytes = (bits(tensor) != bits(expected)).view(tensor.numel(), -1)
    count = int(differing_bytes.any(dim=1).sum())
    message = f"{count} of {tensor.numel()} elements differ"
    hint = hints.explain_weight(tensor, name, reference)
    return [Finding(message, name, name, relative_error(tensor, expected), hint)]


def names_sharing_memory(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Groups of names whose tensors begin at one place in memory."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            names.setdefault(tensor.data_ptr(), []).append(name)
    return [group for group in names.values() if len(group) > 1]

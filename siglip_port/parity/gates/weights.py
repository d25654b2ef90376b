"""The gate `weights`: both sides have the same tensors, bit for bit.

Outputs do not depend on all of them: the bias of the keys, for example, changes no attention.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from siglip_port.parity import hints
from siglip_port.parity.gates.meaning import MEANING
from siglip_port.parity.metrics import bits, relative_error, tensors_equal
from siglip_port.parity.results import Finding, GateResult
from siglip_port.parity.sides import dtype_name


def check_weights(port: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> GateResult:
    """Compare all tensors.

    Args:
        port: The port's tensors, under the reference's names.
        reference: The reference's `state_dict`.
    """
    port = {name: tensor.detach() for name, tensor in port.items()}
    missing = names_missing_on_one_side(port, reference)
    findings = []
    for name in sorted(port.keys() | reference.keys()):
        if name in missing:
            side = "port" if name in port else "reference"
            findings.append(Finding(f"only in the {side}", name, name))
        elif name in port and name in reference:
            findings += compare_tensors(name, port[name], reference)
    findings += find_shared_memory(port, reference)
    return GateResult("weights", len(reference), MEANING["weights"].bound, tuple(findings))


def names_missing_on_one_side(
    port: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> set[str]:
    """Return the names that only one side has."""
    return port.keys() ^ reference.keys()


def compare_tensors(name: str, tensor: Tensor, reference: Mapping[str, Tensor]) -> list[Finding]:
    """Compare a tensor of the port with the reference's tensor of that name."""
    expected = reference[name]
    if tensor.shape == expected.shape and tensor.dtype != expected.dtype:
        dtypes = dtype_name(tensor.dtype), dtype_name(expected.dtype)
        hint = "dtype {} instead of {}".format(*dtypes)
        return [Finding("has another dtype", name, name, hint=hint)]
    if tensor.shape != expected.shape:
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


def find_shared_memory(
    port: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> list[Finding]:
    """Find tensors that share memory in the port, unless they do in the reference, too."""
    tied = [set(names) for names in names_sharing_memory(reference)]
    findings = []
    for names in names_sharing_memory(port):
        if not any(names_in_reference >= set(names) for names_in_reference in tied):
            message = f"tensors share memory: {', '.join(names[:4])}; not in the reference"
            findings.append(Finding(message, names[-1], names[-1]))
    return findings


def names_sharing_memory(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Group the names of tensors that start at the same address."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            names.setdefault(tensor.data_ptr(), []).append(name)
    return [group for group in names.values() if len(group) > 1]

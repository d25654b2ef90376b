"""Compares any port with any reference: `compare` for programs, `assert_parity` for tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from siglip_port.parity import gates
from siglip_port.parity.gates import Call, Finding, Gate, Inputs, Side, Weights, call
from siglip_port.parity.taps import expand

FINDINGS_SHOWN = 10

# Whose address is best: semantics names a step, weights a tensor, the others a symptom.
_BEST_ADDRESS = (
    "semantics",
    "weights",
    "rounding",
    "interface",
    "pixels",
    "config",
    "environment",
    "liveness",
)


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
    gates: tuple[Gate, ...]


@dataclass(frozen=True)
class Comparison:
    """All that one comparison found. `print` it for the verdict and what led to it.

    Attributes:
        sections: one for each checkpoint.
        label: what kind of weights the verdict is about.
    """

    sections: tuple[Section, ...]
    label: str = "weights as given"

    @property
    def equal(self) -> bool:
        """Whether the port is the reference's equal: every gate ran, and passed."""
        found = [gate.passed for section in self.sections for gate in section.gates]
        return bool(found) and all(found)

    @property
    def findings(self) -> list[tuple[Section, Gate, Finding]]:
        """All that is not as it must be, the best address first."""
        found = [(s, gate, f) for s in self.sections for gate in s.gates for f in gate.findings]
        found += [
            (s, gate, Finding(f"gate {gate.name} checked nothing"))
            for s in self.sections
            for gate in s.gates
            if not gate.checked
        ]
        return sorted(found, key=lambda item: _BEST_ADDRESS.index(item[1].name.split()[0]))

    @property
    def verdict(self) -> str:
        """How the comparison ended, in one line."""
        if not self.equal:
            if not self.findings:
                return f"DIFFERENT ({self.label}): no gate was run"
            _, gate, finding = self.findings[0]
            others = len(self.findings) - 1
            more = (
                f"; and {others} more {'finding' if others == 1 else 'findings'}" if others else ""
            )
            return f"DIFFERENT ({self.label}): {gate.name}: {describe(finding)}{more}"
        counts: dict[str, int] = {}
        unseen: set[str] = set()
        islands: set[str] = set()
        for gate in (gate for section in self.sections for gate in section.gates):
            counts[gate.name] = counts.get(gate.name, 0) + gate.checked
            unseen.update(gate.unseen)
            islands.update(gate.islands)
        text = f"EQUAL ({self.label}): passed {', '.join(f'{name} ({count})' for name, count in counts.items())}"
        if unseen:
            text += f"; computed without the module tapped there, so seen only by what follows: {_some(unseen)}"
        if islands:
            text += (
                f"; float32 inside whatever the dtype, so judged by its rounding: {_some(islands)}"
            )
        return text

    def __str__(self) -> str:
        shown = [
            f"  {gate.name}: {describe(finding)}"
            for _, gate, finding in self.findings[:FINDINGS_SHOWN]
        ]
        more = len(self.findings) - len(shown)
        return "\n".join([*shown, *([f"  ... and {more} more"] if more > 0 else []), self.verdict])


def describe(finding: Finding) -> str:
    """One finding in one line."""
    place = finding.reference
    if finding.port and finding.port != finding.reference:
        place = f"{place} (port: {finding.port})" if place else f"port: {finding.port}"
    error = (
        ""
        if finding.error != finding.error or finding.error == float("inf")
        else f", relative error {finding.error:.1e}"
    )
    hint = f"; looks like: {finding.hint}" if finding.hint else ""
    return f"{place}{': ' if place else ''}{finding.what}{error}{hint}"


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (
        f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    )


def compare(
    reference: nn.Module,
    port: nn.Module,
    inputs: Inputs,
    taps: Mapping[str, str] | None = None,
    *,
    call_reference: Call = call,
    call_port: Call = call,
    weights: Weights | None = None,
    dtype: torch.dtype | None = None,
) -> Comparison:
    """Compares two implementations of any model, gate by gate (see `siglip_port.parity.gates`).

    Both are given back as they were. Fill the reference with `randomise` first and copy its weights
    to the port: a fresh initialisation hides mistakes.

    Args:
        reference: in `eval()` mode. It must compute in float64 throughout where it is cast to it;
            that is checked.
        port: likewise.
        inputs: what both are called with: a tensor, a tuple of positional arguments, or a dict of
            named ones; at least two along the first axis, and different ones.
        taps: points inside, reference -> port: module paths, `path:input` for what a module is
            given, `{}` for the number of a block (see `siglip_port.parity.taps`). None compares
            outputs only, and no module is named.
        call_reference: calls it and returns its outputs by name; needed where the two name them
            differently.
        call_port: likewise.
        weights: the port's tensors under the names of the reference's `state_dict`; None leaves
            that gate out.
        dtype: in which rounding is judged; None for that of the reference's parameters.

    Raises:
        ValueError: they cannot be compared: inputs or taps are no such things, or the reference is
            no truth.
    """
    if gates.batch_size(inputs) < 2:
        raise ValueError(
            "inputs must hold at least two, along the first axis: one alone cannot show what mixes "
            "them"
        )
    dtype = dtype or next(
        (p.dtype for p in reference.parameters() if p.is_floating_point()), torch.float32
    )
    one, other = Side(reference, call_reference), Side(port, call_port)
    pairs = expand(taps or {}, reference, port)
    found = [gates.environment({"port": port, "reference": reference})]
    if weights is not None:
        found.append(gates.weights(weights(port), reference.state_dict()))
    truth = gates.observe(one, inputs, [tap.reference for tap in pairs], dtype)
    if (
        missing := one.run(inputs).keys() ^ other.run(inputs).keys()
    ) and not missing <= truth.exact.outputs.keys():
        raise ValueError(
            f"the two sides name their outputs differently ({', '.join(sorted(missing))}); pass "
            "call_reference and "
            "call_port, which return them by the same names"
        )
    found.append(gates.liveness(other, one, gates.cast_inputs(inputs, dtype)))
    found.append(gates.semantics(other, one, truth, pairs))
    if dtype != torch.float64:
        found.append(gates.rounding(other, truth, pairs))
    return Comparison((Section(type(reference).__name__, "as given", tuple(found)),))


def assert_parity(
    reference: nn.Module,
    port: nn.Module,
    inputs: Inputs,
    taps: Mapping[str, str] | None = None,
    *,
    call_reference: Call = call,
    call_port: Call = call,
    weights: Weights | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """`compare` for a test: fails with the findings and the verdict.

    Raises:
        AssertionError: the two differ.
        ValueError: as for `compare`.
    """
    found = compare(
        reference,
        port,
        inputs,
        taps,
        call_reference=call_reference,
        call_port=call_port,
        weights=weights,
        dtype=dtype,
    )
    if not found.equal:
        raise AssertionError(f"\n{found}")

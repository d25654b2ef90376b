"""Compares any port with any reference: `compare` for programs, `assert_parity` for tests."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from siglip_port.parity import gates
from siglip_port.parity.observe import ReferenceRun, run_reference
from siglip_port.parity.results import Comparison, Section
from siglip_port.parity.sides import (
    Call,
    Inputs,
    Side,
    Weights,
    batch_size,
    call_module,
    cast_inputs,
)
from siglip_port.parity.taps import expand


def compare(
    reference: nn.Module,
    port: nn.Module,
    inputs: Inputs,
    taps: Mapping[str, str] | None = None,
    *,
    call_reference: Call = call_module,
    call_port: Call = call_module,
    weights: Weights | None = None,
    dtype: torch.dtype | None = None,
) -> Comparison:
    """Compare two implementations of any model, gate by gate (see `siglip_port.parity.gates`).

    Both are given back as they were. Fill the reference with `randomize` first and copy its weights
    to the port: a fresh initialization hides bugs.

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
    if batch_size(inputs) < 2:
        raise ValueError(
            "inputs must hold at least two, along the first axis: one alone cannot show what mixes "
            "them"
        )
    if dtype is None:
        dtype = parameter_dtype(reference)
    reference_side = Side(reference, call_reference)
    port_side = Side(port, call_port)
    pairs = expand(taps or {}, reference, port)

    results = [gates.check_environment({"port": port, "reference": reference})]
    if weights is not None:
        results.append(gates.check_weights(weights(port), reference.state_dict()))
    run = run_reference(reference_side, inputs, [tap.reference for tap in pairs], dtype)
    check_output_names(run, port_side, inputs)
    results.append(gates.check_sensitivity(port_side, reference_side, cast_inputs(inputs, dtype)))
    results.append(gates.check_numerics(port_side, run, pairs))
    if dtype != torch.float64:
        results.append(gates.check_rounding(port_side, run, pairs))
    return Comparison((Section(type(reference).__name__, "as given", tuple(results)),))


def parameter_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a module's first floating point parameter; float32 if it has none."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.float32


def check_output_names(run: ReferenceRun, port: Side, inputs: Inputs) -> None:
    """Refuse two sides that name their outputs differently. The port may lack some."""
    names = run.reference.run(inputs).keys() ^ port.run(inputs).keys()
    if names - run.exact.outputs.keys():
        raise ValueError(
            f"the two sides name their outputs differently ({', '.join(sorted(names))}); pass "
            "call_reference and call_port, which return them by the same names"
        )


def assert_parity(
    reference: nn.Module,
    port: nn.Module,
    inputs: Inputs,
    taps: Mapping[str, str] | None = None,
    *,
    call_reference: Call = call_module,
    call_port: Call = call_module,
    weights: Weights | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """`compare` for a test: fails with the findings and the verdict.

    Raises:
        AssertionError: the two differ.
        ValueError: as for `compare`.
    """
    comparison = compare(
        reference,
        port,
        inputs,
        taps,
        call_reference=call_reference,
        call_port=call_port,
        weights=weights,
        dtype=dtype,
    )
    if not comparison.equal:
        raise AssertionError(f"\n{comparison}")

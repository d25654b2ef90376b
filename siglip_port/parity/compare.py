"""Compare any port with its reference: `compare` for programs, `assert_parity` for tests."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from siglip_port import parity_log
from siglip_port.parity import gates
from siglip_port.parity.observe import ReferenceRun, run_reference
from siglip_port.parity.report import to_json
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
    """Compare two implementations of a model, gate by gate (see `siglip_port.parity.gates`).

    Call `randomize` on the reference and copy its weights to the port first: a fresh initialization
    hides bugs. Both modules are restored afterwards.

    Args:
        reference: Module in `eval()` mode; cast to float64, it must compute in float64 throughout.
        port: Module in `eval()` mode.
        inputs: Inputs of both modules: a tensor, a tuple of positional arguments, or a dict of
            keyword arguments; at least two different examples along the first axis.
        taps: Points to compare, reference -> port: module paths, `path:input` for the input of a
            module, `{}` for a block number (see `siglip_port.parity.taps`). None compares outputs
            only.
        call_reference: Function (module, inputs) -> outputs by name; required if the two modules
            name their outputs differently.
        call_port: Function like `call_reference`, for the port.
        weights: Function that returns the port's tensors under the names of the reference's
            `state_dict`; None skips the gate `weights`.
        dtype: Dtype of the gate `rounding`; None for that of the reference's parameters.

    Returns:
        Gates and findings; `print` it for the verdict.

    Raises:
        ValueError: The inputs, the taps or the reference cannot be used.
    """
    if batch_size(inputs) < 2:
        raise ValueError(
            "inputs must hold at least two examples along the first axis; a single one cannot show "
            "whether examples of a batch affect each other"
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
    """Return the dtype of a module's first floating point parameter; float32 without one."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.float32


def check_output_names(run: ReferenceRun, port: Side, inputs: Inputs) -> None:
    """Raise ValueError if the two sides name their outputs differently.

    Outputs that only the reference returns are findings, not errors.
    """
    names = run.exact.outputs.keys() ^ port.run(inputs).keys()
    if names - run.exact.outputs.keys():
        raise ValueError(
            f"reference and port name their outputs differently ({', '.join(sorted(names))}); "
            "pass call_reference and call_port that return the same names"
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
    """Fail a test if port and reference differ; takes the arguments of `compare`.

    Raises:
        AssertionError: Port and reference differ; the message is the findings and the verdict.
        ValueError: The inputs, the taps or the reference cannot be used.
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
    parity_log.add(lambda: to_json(comparison))
    if not comparison.equal:
        raise AssertionError(f"\n{comparison}")

"""Compare any port with its reference: `compare` for programs, `assert_parity` for tests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from siglip_port import parity_log
from siglip_port.parity import gates
from siglip_port.parity.arguments import check_arguments, check_call, checked_call
from siglip_port.parity.calls import run_calls
from siglip_port.parity.gates.environment import exact_switches, isolated
from siglip_port.parity.gradients import run_gradients
from siglip_port.parity.guard import guard_with_taps
from siglip_port.parity.nested import Inputs, floating_point_dtype
from siglip_port.parity.observe import ReferenceRun, run_reference
from siglip_port.parity.report import to_json
from siglip_port.parity.results import Comparison, GateResult, Section
from siglip_port.parity.sides import (
    Call,
    Side,
    Weights,
    call_module,
    cast,
    cast_inputs,
    dtype_name,
)
from siglip_port.parity.support import with_support
from siglip_port.parity.taps import Tap, expand


def compare(
    reference: nn.Module,
    port: Callable[..., Any],
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
        port: Module in `eval()` mode, or any other callable, such as an engine. What does not
            compute in float64 is judged by its rounding, and the verdict says so.
        inputs: Inputs of both sides: a tensor, a tuple of positional arguments, or a dict of
            keyword arguments, which may be nested; at least two different examples along the first
            axis.
        taps: Points to compare, reference -> port: module paths, `path:input` for the input of a
            module, `{}` for a block number (see `siglip_port.parity.taps`). None compares outputs
            only; `suggest_taps` proposes some.
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
        TypeError: An argument, or a result of a call function, has a wrong type.
    """
    check_arguments(reference, port, inputs, taps, dtype)
    if dtype is None:
        dtype = parameter_dtype(reference)
    reference_side = Side(reference, checked_call(call_reference, "reference"))
    port_side = Side(port, call_port)
    check_call(call_port, port, inputs)
    port_side, reason = with_support(port_side, inputs, dtype)
    if reason and dtype == torch.float64:
        dtype = lower_dtype(inputs, reason)
    pairs = expand_taps(taps, reference, port_side.module)

    if weights is not None:
        weights = functools.partial(returns_weights, weights, port)
    with torch.enable_grad(), exact_switches():
        results = run_gates(reference_side, port_side, inputs, pairs, weights, dtype)
    section = Section(type(reference).__name__, "as given", tuple(results))
    return Comparison((section,), limits=tuple(limits(port_side, reason)))


def limits(port: Side, reason: str) -> Iterator[str]:
    """Yield what cannot be judged of a port, with the reason why.

    Args:
        port: Port.
        reason: Reason why it does not compute in float64; empty if it does.
    """
    if reason:
        yield f"float64, gradients and calls: {reason}"
    elif not isinstance(port.module, nn.Module):
        yield "gradients and calls: the port is no torch.nn.Module"


def returns_weights(weights: Weights, port: object, _: object) -> Mapping[str, Tensor]:
    """Return the weights of a port as given, whatever runs it."""
    return weights(port)


def modules_by_side(reference: nn.Module, port: object) -> dict[str, nn.Module]:
    """Return the modules among the two sides."""
    sides = {"reference": reference}
    if isinstance(port, nn.Module):
        sides = {"port": port, "reference": reference}
    return sides


def expand_taps(taps: Mapping[str, str] | None, reference: nn.Module, port: object) -> list[Tap]:
    """Expand the taps; a port that is no module has none."""
    if not taps or not isinstance(port, nn.Module):
        return []
    return expand(taps, reference, port)


def lower_dtype(inputs: Inputs, reason: str) -> torch.dtype:
    """Return the dtype in which a port without float64 is compared with a float64 reference."""
    dtype = floating_point_dtype(inputs)
    if dtype is None or dtype == torch.float64:
        raise ValueError(
            f"dtype must not be float64 for a port without it ({reason}); pass the dtype in which "
            "it computes, such as dtype=torch.float32"
        )
    return dtype


def run_gates(
    reference: Side,
    port: Side,
    inputs: Inputs,
    taps: list[Tap],
    weights: Weights | None,
    dtype: torch.dtype,
) -> list[GateResult]:
    """Run all gates: see `compare`. An error of the port is a finding of the gate that ran it."""
    guard = guard_with_taps(port.module, taps)
    side = isolated(port)
    own_inputs = cast_inputs(inputs, dtype)
    results = [
        guard.run(
            "environment",
            lambda: gates.check_environment(modules_by_side(reference.module, port.module)),
            lambda: gates.check_shared_modules(port, reference, taps),
            lambda: gates.check_switches(port, own_inputs),
        )
    ]
    if weights is not None:
        expected = reference.module.state_dict()
        tensors = functools.partial(weights, port.module)
        results.append(guard.run("weights", lambda: gates.check_weights(tensors(), expected)))
    run = run_reference(reference, inputs, [tap.reference for tap in taps], dtype)
    with cast(port.module, dtype):
        outputs = guard.attempt(lambda: side.run(own_inputs))
    if outputs is not None:
        check_output_names(run, outputs)
    check = functools.partial(gates.check_sensitivity, side, reference, own_inputs)
    results.append(guard.run("sensitivity", check))
    if side.supports_float64:
        results.append(guard.run("numerics", lambda: gates.check_numerics(side, run, taps)))
    if side.supports_float64 and isinstance(side.module, nn.Module):
        results += run_gates_of_modules(reference, side, inputs, taps, weights, dtype)
    if dtype != torch.float64:
        name = f"rounding {dtype_name(dtype)}"
        results.append(guard.run(name, lambda: gates.check_rounding(side, run, taps)))
    return results


def run_gates_of_modules(
    reference: Side,
    port: Side,
    inputs: Inputs,
    taps: list[Tap],
    weights: Weights | None,
    dtype: torch.dtype,
) -> list[GateResult]:
    """Run the gates for ports that have parameters and compute in float64."""
    guard = guard_with_taps(port.module, taps)
    points = [tap.reference for tap in taps]
    gradients = run_gradients(reference, inputs, points, dtype)
    calls = run_calls(reference, inputs, dtype)
    return [
        guard.run("gradients", lambda: gates.check_gradients(port, gradients, taps, weights)),
        guard.run("calls", lambda: gates.check_calls(port, calls, taps)),
    ]


def parameter_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype of a module's first floating point parameter; float32 without one."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.float32


def check_output_names(run: ReferenceRun, outputs: Mapping[str, Tensor]) -> None:
    """Raise ValueError if the two sides name their outputs differently.

    Outputs that only the reference returns are findings, not errors.
    """
    names = run.exact.outputs.keys() ^ outputs.keys()
    if names - run.exact.outputs.keys():
        raise ValueError(
            f"reference and port name their outputs differently ({', '.join(sorted(names))}); "
            "pass call_reference and call_port that return the same names"
        )


def assert_parity(
    reference: nn.Module,
    port: Callable[..., Any],
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
        AssertionError: Port and reference differ; the message is the verdict, then the causes.
        ValueError: The inputs, the taps or the reference cannot be used.
        TypeError: An argument, or a result of a call function, has a wrong type.
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
        # The first line is what the summary of pytest shows.
        raise AssertionError("\n".join([comparison.verdict, *comparison.lines()]))

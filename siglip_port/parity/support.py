"""What of a port can be judged: not every callable computes in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from siglip_port.parity import bounds
from siglip_port.parity.nested import Inputs, floating_point_dtype
from siglip_port.parity.roughness import roughness
from siglip_port.parity.sides import PORT_ERRORS, Call, Side, cast, cast_inputs


def with_support(port: Side, inputs: Inputs, dtype: torch.dtype) -> tuple[Side, str]:
    """Find out whether a port computes in float64.

    Args:
        port: Port in `eval()` mode.
        inputs: Inputs as given.
        dtype: Dtype to which the weights are rounded.

    Returns:
        The port, with `supports_float64`, and the reason why it does not support it, empty if it
        does. A callable, or a module that cannot be cast, then gets inputs in the dtype in which
        they were given, and has neither parameters nor modules.
    """
    reason = reason_of_engine(port.module)
    if reason or not isinstance(port.module, nn.Module):
        reason = reason or reason_of_callable(port, inputs)
        return (as_callable(port, inputs), reason) if reason else (port, "")
    reason = reason_of_module(port, inputs, dtype)
    return replace(port, supports_float64=not reason), reason


def as_callable(port: Side, inputs: Inputs) -> Side:
    """Return a side that is never cast and gets inputs of the dtype of `inputs`."""
    module = port.module
    call = with_dtype_of(inputs, port.call)
    return Side(lambda values: call(module, values), call=run_callable, supports_float64=False)


def run_callable(
    function: Callable[[Inputs], Mapping[str, Tensor]], inputs: Inputs
) -> Mapping[str, Tensor]:
    """Call a function that returns outputs by name."""
    return function(inputs)


def with_dtype_of(inputs: Inputs, call: Call) -> Call:
    """Return a call that casts its inputs to the dtype of `inputs`."""
    dtype = floating_point_dtype(inputs)
    if dtype is None:
        return call
    return lambda module, values: call(module, cast_inputs(values, dtype))


def reason_of_engine(module: object) -> str:
    """Return why a module loses what it computes with if it is cast; empty if it does not."""
    if not isinstance(module, nn.Module):
        return ""
    for part in module.modules():
        if replaces_weights(part):
            name = type(part).__name__
            return f"{name} of the port does not keep what it computes with when it is cast"
    return ""


def reason_of_module(port: Side, inputs: Inputs, dtype: torch.dtype) -> str:
    """Return why a module does not compute in float64; empty if it fails in any dtype."""
    try:
        with cast(port.module, dtype, torch.float64):
            port.run(cast_inputs(inputs, torch.float64))
    except PORT_ERRORS as error:
        if runs_in(dtype, port, inputs):
            return refusal(error)
    return ""


def replaces_weights(part: nn.Module) -> bool:
    """Return whether casting a module does more than casting its tensors, as in an engine."""
    is_own = type(part)._apply is not nn.Module._apply
    return is_own and not type(part).__module__.startswith("torch.")


def runs_in(dtype: torch.dtype, port: Side, inputs: Inputs) -> bool:
    """Return whether a port runs in a dtype; if not, the gates report its error."""
    try:
        with cast(port.module, dtype):
            port.run(cast_inputs(inputs, dtype))
    except PORT_ERRORS:
        return False
    return True


def refusal(error: BaseException) -> str:
    """Describe an error that a port raises in float64 only."""
    lines = str(error).splitlines() or [type(error).__name__]
    if "not implemented for" in lines[0]:
        return f"an operator of the port does not support it ({lines[0]})"
    return f"the port has steps of a fixed dtype ({type(error).__name__}: {lines[0]})"


def reason_of_callable(port: Side, inputs: Inputs) -> str:
    """Return why a callable that is no module does not compute in float64."""
    if floating_point_dtype(inputs) is None:
        return "the port is no torch.nn.Module"
    exact_inputs = cast_inputs(inputs, torch.float64)
    try:
        outputs = port.run(exact_inputs)
        rough = roughness(port, exact_inputs)
    except PORT_ERRORS:
        return "the port is no torch.nn.Module, and refuses float64"
    floats = [output for output in outputs.values() if output.is_floating_point()]
    if any(output.dtype != torch.float64 for output in floats):
        return "the port is no torch.nn.Module, and returns other dtypes"
    if not floats or any(not bounds.within_float64_bound(size) for size in rough.values()):
        return "the port is no torch.nn.Module, and has float32 steps"
    return ""

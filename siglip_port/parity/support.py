"""What of a port can be judged: not every callable computes in float64."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from siglip_port.parity import bounds
from siglip_port.parity.nested import Inputs, floating_point_dtype
from siglip_port.parity.roughness import roughness
from siglip_port.parity.sides import Call, Side, cast, cast_inputs


def with_support(port: Side, inputs: Inputs, dtype: torch.dtype) -> tuple[Side, str]:
    """Find out whether a port computes in float64.

    Args:
        port: Port in `eval()` mode.
        inputs: Inputs as given.
        dtype: Dtype to which the weights are rounded.

    Returns:
        The port, with `supports_float64` and, without it, a call that casts inputs to the dtype in
        which they were given if it is no module; and the reason why it does not support float64,
        empty if it does.
    """
    reason = reason_against_float64(port, inputs, dtype)
    if not reason:
        return port, ""
    side = replace(port, supports_float64=False)
    if not isinstance(port.module, nn.Module):
        side = replace(side, call=with_dtype_of(inputs, port.call))
    return side, reason


def with_dtype_of(inputs: Inputs, call: Call) -> Call:
    """Return a call that casts its inputs to the dtype of `inputs`."""
    dtype = floating_point_dtype(inputs)
    if dtype is None:
        return call
    return lambda module, values: call(module, cast_inputs(values, dtype))


def reason_against_float64(port: Side, inputs: Inputs, dtype: torch.dtype) -> str:
    """Return why a port does not compute in float64; empty if it does, or fails in any dtype."""
    if isinstance(port.module, nn.Module):
        return reason_of_module(port, inputs, dtype)
    if floating_point_dtype(inputs) is None:
        return "the port is no torch.nn.Module"
    return reason_of_callable(port, inputs)


def reason_of_module(port: Side, inputs: Inputs, dtype: torch.dtype) -> str:
    """Return why a module does not compute in float64."""
    for part in port.module.modules():
        if replaces_weights(part):
            name = type(part).__name__
            return f"{name} of the port does not keep what it computes with when it is cast"
    try:
        with cast(port.module, dtype, torch.float64):
            port.run(cast_inputs(inputs, torch.float64))
    except Exception as error:
        if runs_as_given(port, inputs):
            return refusal(error)
    return ""


def replaces_weights(part: nn.Module) -> bool:
    """Return whether casting a module does more than casting its tensors, as in an engine."""
    is_own = type(part)._apply is not nn.Module._apply
    return is_own and not type(part).__module__.startswith("torch.")


def runs_as_given(port: Side, inputs: Inputs) -> bool:
    """Return whether a port runs in its own dtype; if not, the gates report it."""
    try:
        port.run(inputs)
    except Exception:
        return False
    return True


def refusal(error: Exception) -> str:
    """Describe an error that a port raises in float64 only."""
    lines = str(error).splitlines() or [type(error).__name__]
    if "not implemented for" in lines[0]:
        return f"an operator of the port does not support it ({lines[0]})"
    return f"the port has steps of a fixed dtype ({type(error).__name__}: {lines[0]})"


def reason_of_callable(port: Side, inputs: Inputs) -> str:
    """Return why a callable that is no module does not compute in float64."""
    exact_inputs = cast_inputs(inputs, torch.float64)
    try:
        outputs = port.run(exact_inputs)
        rough = roughness(port, exact_inputs, outputs)
    except Exception:
        return "the port is no torch.nn.Module, and refuses float64"
    floats = [output for output in outputs.values() if output.is_floating_point()]
    if any(output.dtype != torch.float64 for output in floats):
        return "the port is no torch.nn.Module, and returns other dtypes"
    if not floats or any(not bounds.within_float64_bound(size) for size in rough.values()):
        return "the port is no torch.nn.Module, and has float32 steps"
    return ""

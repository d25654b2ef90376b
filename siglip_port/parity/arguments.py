"""Checks of the arguments of `compare`, one sentence each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from siglip_port.parity.nested import Inputs, check_inputs
from siglip_port.parity.sides import PORT_ERRORS, Call, CallError, batch_size, clone_inputs


def check_arguments(
    reference: object, port: object, inputs: object, taps: object, dtype: object
) -> None:
    """Raise ValueError, or TypeError for a wrong type, if two sides cannot be compared."""
    if not isinstance(reference, nn.Module):
        raise TypeError(
            f"reference must be a torch.nn.Module, got {type(reference).__name__}; only the port "
            "may be another callable"
        )
    if not callable(port):
        raise TypeError(
            f"port must be a torch.nn.Module or another callable, got {type(port).__name__}"
        )
    check_batch_size(check_inputs(inputs))
    check_taps(taps, port)
    if dtype is not None and not is_floating_point(dtype):
        raise ValueError(f"dtype must be a floating point torch.dtype or None, got {dtype!r}")
    check_not_shared(reference, port)


def check_batch_size(inputs: Inputs) -> None:
    """Raise ValueError if the inputs hold fewer than two examples."""
    if batch_size(inputs) < 2:
        raise ValueError(
            "inputs must hold at least two examples along the first axis; a single one cannot show "
            "whether examples of a batch affect each other"
        )


def check_taps(taps: object, port: object) -> None:
    """Raise if the taps are no points by name, or the port has no modules to tap."""
    if taps is None:
        return
    if not isinstance(taps, Mapping):
        raise TypeError(
            f"taps must be a dict of points, reference -> port, or None, got {type(taps).__name__}"
        )
    for point in (*taps.keys(), *taps.values()):
        if not isinstance(point, str):
            raise TypeError(
                f"taps must be a dict of strings, got {point!r}; a point is the path of a module"
            )
    if taps and not isinstance(port, nn.Module):
        raise ValueError(
            f"taps need a port that is a torch.nn.Module, got {type(port).__name__}; leave them out"
        )


def is_floating_point(dtype: object) -> bool:
    """Return whether a value is a floating point dtype."""
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def check_not_shared(reference: nn.Module, port: object) -> None:
    """Raise ValueError if both sides are one module, or share one with parameters.

    Two modules may share tensors; a module compared with itself proves nothing.
    """
    if port is reference:
        raise ValueError(
            "reference and port must be two modules, got the same one twice, which proves nothing"
        )
    if not isinstance(port, nn.Module):
        return
    names = {id(module): name for name, module in reference.named_modules()}
    for name, module in port.named_modules():
        if id(module) in names and any(True for _ in module.parameters()):
            raise ValueError(
                f"reference and port must not share modules, got {names[id(module)] or 'the model'}"
                f" of the reference as {name or 'the model'} of the port, which proves nothing; "
                "use copy.deepcopy"
            )


def checked_call(call: Call, side: str) -> Call:
    """Return a call that raises TypeError unless it returns tensors by name."""

    def run(module: object, inputs: object) -> Mapping[str, Tensor]:
        outputs = call(module, inputs)
        check_outputs_by_name(outputs, side)
        return outputs

    return run


def check_call(call: Call, port: object, inputs: Inputs) -> None:
    """Raise TypeError if a call function does not return the port's outputs by name.

    Errors of the port itself are left to the gates.
    """
    try:
        with torch.inference_mode():
            outputs = call(port, clone_inputs(inputs))
    except PORT_ERRORS:
        return
    check_outputs_by_name(outputs, "port")


def check_outputs_by_name(outputs: object, side: str) -> None:
    """Raise TypeError if the outputs of a call function are not tensors by name."""
    name = f"call_{side}"
    if not isinstance(outputs, Mapping):
        raise CallError(
            f"{name} must return tensors by name, got {type(outputs).__name__}; return a dict"
        )
    if not outputs:
        raise CallError(f"{name} must return tensors by name, got an empty dict")
    for key, value in outputs.items():
        if not isinstance(value, Tensor):
            raise CallError(
                f"{name} must return tensors by name, got {type(value).__name__} for {key!r}"
            )

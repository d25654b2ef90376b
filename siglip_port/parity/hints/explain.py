"""Hints for taps and outputs that differ."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from siglip_port.parity.hints.at_tap import TapContext, guesses_at, guesses_from_other_taps
from siglip_port.parity.hints.guess import first_match
from siglip_port.parity.hints.layers import fitted_eps
from siglip_port.parity.hints.patterns import explain_pattern
from siglip_port.parity.observe import ReferenceRun
from siglip_port.parity.sides import Inputs, Side, cast
from siglip_port.parity.taps import record


def explain_tap(run: ReferenceRun, point: str, value: Tensor) -> str:
    """Return the hint for a tap that differs; empty if no known bug explains it.

    Args:
        run: Run of the reference, which is repeated to get the inputs of its modules.
        point: Tap, by the reference's name.
        value: The port's value at the tap, teacher-forced.
    """
    points = list(run.exact.taps)
    return run.host.compute(explain_value, run.dtype, run.exact_inputs, points, point, value)


def explain_value(
    reference: Side,
    dtype: torch.dtype,
    inputs: Inputs,
    points: list[str],
    point: str,
    value: Tensor,
) -> str:
    """Run the reference in float64 once more, and explain the port's value at a tap.

    The exact values are computed again, since those of all taps are too large to be sent.
    """
    model = reference.module
    module_inputs: list[Tensor] = []

    def save_inputs(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for tensor in (*args, *kwargs.values()):
            if isinstance(tensor, Tensor):
                module_inputs.append(tensor.clone())

    module = model.get_submodule(point.partition(":")[0])
    handle = module.register_forward_pre_hook(save_inputs, with_kwargs=True)
    try:
        with cast(model, dtype, torch.float64):
            exact = record(model, points, lambda: reference.run(inputs))
            module_input = module_inputs[0] if module_inputs else None
            return explain(model, point, module_input, exact.taps, value)
    finally:
        handle.remove()


def explain(
    reference: nn.Module,
    point: str,
    module_input: Tensor | None,
    taps: Mapping[str, Tensor],
    value: Tensor,
) -> str:
    """Return the hint for the port's value at a tap; empty if no known bug explains it.

    Args:
        reference: Reference in float64.
        point: Tap, by the reference's name.
        module_input: Input of the reference's module at the tap, if any.
        taps: Exact values at all taps.
        value: The port's value at the tap, teacher-forced.
    """
    exact = taps[point]
    if value.shape != exact.shape:
        return f"shape {list(value.shape)}, expected {list(exact.shape)}"
    tap = TapContext(dict(reference.named_modules()), point, module_input, taps)
    with torch.inference_mode():
        if isinstance(tap.module, nn.LayerNorm) and module_input is not None and not tap.part:
            hint = fitted_eps(tap.module, module_input, value)
            if hint:
                return hint
        guesses = itertools.chain(guesses_at(tap), guesses_from_other_taps(tap))
        return first_match(guesses, value) or explain_pattern(value, exact)


def explain_output(value: Tensor, exact: Tensor) -> str:
    """Return the hint for an output that differs; empty if no known bug explains it."""
    if value.shape != exact.shape:
        return f"shape {list(value.shape)}, expected {list(exact.shape)}"
    return explain_pattern(value, exact)

"""The hint for a tap or an output that differs."""

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
from siglip_port.parity.sides import cast


def explain_tap(run: ReferenceRun, point: str, value: Tensor) -> str:
    """The hint for a tap that differs.

    Args:
        run: of the reference, which is run again to see what its module there is given.
        point: the tap, in the reference's names.
        value: what the port had there, given right inputs.
    """
    model = run.reference.module
    inputs: list[Tensor] = []

    def keep_inputs(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for tensor in (*args, *kwargs.values()):
            if isinstance(tensor, Tensor):
                inputs.append(tensor.clone())

    module = model.get_submodule(point.partition(":")[0])
    handle = module.register_forward_pre_hook(keep_inputs, with_kwargs=True)
    try:
        with cast(model, run.dtype, torch.float64):
            run.reference.run(run.exact_inputs)
            module_input = inputs[0] if inputs else None
            return explain(model, point, module_input, run.exact.taps, value)
    finally:
        handle.remove()


def explain(
    reference: nn.Module,
    point: str,
    module_input: Tensor | None,
    taps: Mapping[str, Tensor],
    value: Tensor,
) -> str:
    """Say what the port's value at a tap looks like, given right inputs.

    Empty where it looks like nothing known.

    Args:
        reference: the module in float64, for its parameters.
        point: the tap, in its names.
        module_input: what the reference's module there was given, if anything.
        taps: the truth at all taps.
        value: what the port had.
    """
    truth = taps[point]
    if value.shape != truth.shape:
        return f"its shape is {list(value.shape)}, expected {list(truth.shape)}"
    tap = TapContext(dict(reference.named_modules()), point, module_input, taps)
    with torch.inference_mode():
        if isinstance(tap.module, nn.LayerNorm) and module_input is not None and not tap.part:
            hint = fitted_eps(tap.module, module_input, value)
            if hint:
                return hint
        guesses = itertools.chain(guesses_at(tap), guesses_from_other_taps(tap))
        return first_match(guesses, value) or explain_pattern(value, truth)


def explain_output(value: Tensor, truth: Tensor) -> str:
    """The same for an output, of which nothing more is known."""
    if value.shape != truth.shape:
        return f"its shape is {list(value.shape)}"
    return explain_pattern(value, truth)

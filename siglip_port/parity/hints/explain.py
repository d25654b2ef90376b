"""Hints for taps and outputs that differ."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
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

MAX_FAILED_SEARCHES = 3
"""Number of searches without a result after which a kind of taps gets no hint."""


@dataclass(frozen=True)
class Explanation:
    """Explanation of the port's values at a tap.

    Attributes:
        hint: Known bug that reproduces them; empty if none does.
        missing_taps: Points inside the module that would locate the bug; empty with a hint.
    """

    hint: str = ""
    missing_taps: tuple[str, ...] = ()


def explain_tap(run: ReferenceRun, point: str, value: Tensor) -> str:
    """Return the hint for a tap that differs; empty if no known bug explains it.

    Args:
        run: Run of the reference, which is repeated to get the inputs of its modules.
        point: Tap, by the reference's name.
        value: The port's value at the tap, teacher-forced.
    """
    return explain_taps(run, {point: value})[point].hint


def explain_taps(run: ReferenceRun, values: Mapping[str, Tensor]) -> dict[str, Explanation]:
    """Explain the taps that differ.

    Args:
        run: Run of the reference, which is repeated once to get the inputs of its modules.
        values: The port's values at these taps, teacher-forced, by the reference's name.
    """
    if not values:
        return {}
    points = list(run.exact.taps)
    return run.host.compute(explain_values, run.dtype, run.exact_inputs, points, dict(values))


def explain_values(
    reference: Side,
    dtype: torch.dtype,
    inputs: Inputs,
    points: list[str],
    values: Mapping[str, Tensor],
) -> dict[str, Explanation]:
    """Run the reference in float64 once more, and explain the port's values at some taps.

    The exact values are computed again: those of all taps are too large to be sent.
    """
    explanations = {}
    failed_searches: Counter[str] = Counter()
    with cast(reference.module, dtype, torch.float64):
        taps = record(reference.module, points, lambda: reference.run(inputs)).taps
        module_inputs = record_inputs(reference, inputs, values)
        for point, value in values.items():
            kind = re.sub(r"(^|\.)\d+(?=[.:]|$)", r"\1{}", point)
            hint = ""
            if failed_searches[kind] < MAX_FAILED_SEARCHES:
                module_input = module_inputs.get(path_of(point))
                hint = explain(reference.module, point, module_input, taps, value)
            if hint:
                explanations[point] = Explanation(hint)
            else:
                failed_searches[kind] += 1
                missing = missing_taps(reference.module, point, taps)
                explanations[point] = Explanation(missing_taps=missing)
    return explanations


def path_of(point: str) -> str:
    """Return the path of the module of a point."""
    return point.partition(":")[0]


def record_inputs(reference: Side, inputs: Inputs, points: Iterable[str]) -> dict[str, Tensor]:
    """Run the reference; return the first input of each point's module, by path."""
    module_inputs: dict[str, Tensor] = {}

    def save_input(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for tensor in (*args, *kwargs.values()):
            if isinstance(tensor, Tensor):
                module_inputs.setdefault(path, tensor.clone())

    handles = []
    for path in dict.fromkeys(path_of(point) for point in points):
        hook = hook_for(path, save_input)
        module = reference.module.get_submodule(path)
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        reference.run(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return module_inputs


def hook_for(path: str, save: Callable[..., None]) -> Callable[..., None]:
    """Return a forward pre-hook that calls `save` with the path of its module."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        save(path, args, kwargs)

    return hook


def missing_taps(reference: nn.Module, point: str, taps: Mapping[str, Tensor]) -> tuple[str, ...]:
    """List points inside the module at a tap, if none of them is tapped.

    Its last child is represented by its input, as its output is that of the module.
    """
    if ":" in point or any(tap.startswith(f"{point}.") for tap in taps):
        return ()
    children = [name for name, child in reference.get_submodule(point).named_children()]
    if len(children) < 2:
        return ()
    paths = [f"{point}.{name}" for name in children]
    return (*paths[:-1], f"{paths[-1]}:input")


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
            hint = fitted_eps(tap.module, module_input, value, exact)
            if hint:
                return hint
        guesses = itertools.chain(guesses_at(tap), guesses_from_other_taps(tap))
        return first_match(guesses, value, exact) or explain_pattern(value, exact)


def explain_output(value: Tensor, exact: Tensor) -> str:
    """Return the hint for an output that differs; empty if no known bug explains it."""
    if value.shape != exact.shape:
        return f"shape {list(value.shape)}, expected {list(exact.shape)}"
    return explain_pattern(value, exact)

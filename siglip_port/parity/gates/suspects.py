"""Decide whether a port's outputs differ in float64, and at which points the difference arises.

Outputs decide, taps locate: a port may compute the same outputs from other values inside, such as
tokens in another order or queries that hold the scale of the attention.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from siglip_port.parity import bounds
from siglip_port.parity.gates.float32_upcasts import (
    find_float32_rounding,
    float32_noise,
    within_float32_noise,
)
from siglip_port.parity.gates.float64_runs import Float64Runs, run_in_float64
from siglip_port.parity.hints import is_rearranged
from siglip_port.parity.metrics import RelativeError
from siglip_port.parity.observe import NEVER_CALLED

MAX_REPAIRS = 8
"""Largest number of kinds of points that are repaired one at a time."""

RESTORED = 10.0
"""Error of a tap relative to that of the outputs from which its values may have been restored."""

WORSE = 2.0
"""Growth of an output's error from which a repaired point was no bug."""


@dataclass(frozen=True)
class Judgment:
    """Result of the comparison in float64.

    Attributes:
        suspects: Points at which a difference of the outputs arises, in order of computation.
        float32_rounding: Points that differ by float32 rounding inside the port.
        differing_taps: Taps with other values that the outputs do not depend on.
        noise: Rounding error of the reference in float32; empty if it was not needed.
    """

    suspects: list[str]
    float32_rounding: list[str]
    differing_taps: list[str]
    noise: Mapping[str, RelativeError]


def judge(runs: Float64Runs) -> Judgment:
    """Decide whether the outputs differ by more than rounding, and where that arises."""
    outputs = [name for name in runs.differences if runs.is_output(name)]
    if not outputs:
        return Judgment([], [], runs.differences, {})
    noise = float32_noise(runs.reference)
    free_errors = runs.free.errors
    small = [
        name for name in runs.wrong_steps if within_float32_noise(runs.forced.errors, noise, name)
    ]
    rounding = find_rounding(runs, small, forced=True)
    small_outputs = [name for name in outputs if within_float32_noise(free_errors, noise, name)]
    if len(rounding) == len(small) and len(small_outputs) == len(outputs):
        is_final = runs.wrong_steps == outputs  # no tap differs: both runs are the same
        if is_final or find_rounding(runs, outputs, forced=False) == outputs:
            differing = [
                name
                for name in runs.differences
                if not within_float32_noise(free_errors, noise, name)
            ]
            return Judgment([], rounding or outputs, differing, noise)
    suspects, harmless = without_harmless(runs, rounding)
    if not (suspects and harmless):
        suspects = with_first_difference(runs, suspects, noise if rounding else {})
    suspects = with_uncompared_taps(runs, suspects)
    return Judgment(suspects, rounding, harmless, noise if rounding else {})


def find_rounding(runs: Float64Runs, names: list[str], *, forced: bool) -> list[str]:
    """Return the points at which a difference is float32 rounding."""
    return find_float32_rounding(runs.port, runs.reference, runs.taps, names, forced=forced)


def with_first_difference(
    runs: Float64Runs, suspects: list[str], noise: Mapping[str, RelativeError]
) -> list[str]:
    """Insert the first difference of the free-running run, if no suspect precedes it.

    Args:
        runs: Runs of both sides.
        suspects: Suspects in order of computation.
        noise: Differences of this size are float32 rounding; empty if there is none.
    """
    points = runs.reference.points
    for name in runs.differences:
        if within_float32_noise(runs.free.errors, noise, name):
            continue
        if not is_inside_equal_module(runs, name):
            if not suspects or points.index(suspects[0]) > points.index(name):
                return [name, *suspects]
            break
    return suspects


# --- values that differ without effect ------------------------------------------------------------


def without_harmless(runs: Float64Runs, rounding: list[str]) -> tuple[list[str], list[str]]:
    """Separate wrong steps from taps that cannot cause the difference of the outputs.

    Args:
        runs: Runs of both sides.
        rounding: Steps that differ by float32 rounding only.

    Returns:
        Wrong steps, and taps whose values a later step of the port restores.
    """
    suspects = []
    for name in runs.wrong_steps:
        if name not in rounding and not is_inside_equal_module(runs, name):
            suspects.append(name)
    kinds = group_by_kind(suspects)
    restored: list[str] = []
    if len(kinds) > 1:
        restored = rearranged_taps(runs, suspects)
    if not restored and 1 < len(kinds) <= MAX_REPAIRS:
        for names in kinds.values():
            if repair_is_worse(runs, names):
                restored += names
    if len(restored) == len(suspects):
        return suspects, []
    return [name for name in suspects if name not in restored], restored


def group_by_kind(names: list[str]) -> dict[str, list[str]]:
    """Group points that differ only in the number of their block."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(kind_of(name), []).append(name)
    return kinds


def kind_of(name: str) -> str:
    """Replace the number of the block in a point with `{}`."""
    return re.sub(r"(^|\.)\d+(?=[.:]|$)", r"\1{}", name, count=1)


def is_inside_equal_module(runs: Float64Runs, name: str) -> bool:
    """Return whether a tap is inside a module whose output agrees in the free-running run."""
    path, _, part = name.partition(":")
    if runs.is_output(name):
        return False
    if part not in ("", "input"):  # inside of an nn.MultiheadAttention
        path += "."
    while "." in path:
        path = path.rpartition(".")[0]
        error = runs.free.errors.get(path)
        if error is not None and bounds.within_float64_bound(error.overall):
            return True
    return False


def rearranged_taps(runs: Float64Runs, suspects: list[str]) -> list[str]:
    """List taps with the reference's values scaled or in another order, of which outputs keep little.

    If that were the bug, the outputs would differ by as much as the taps.
    """
    taps = runs.reference.exact.taps
    candidates = []
    for name in suspects:
        if name in taps and runs.free.errors[name].overall > RESTORED * largest_output_error(runs):
            candidates.append(name)
    if not candidates:
        return []
    capture = frozenset(candidates)
    forced = run_in_float64(runs.port, runs.reference, runs.taps, forced=True, capture=capture)
    return [name for name in candidates if is_rearranged(forced.values[name], taps[name])]


def largest_output_error(runs: Float64Runs) -> float:
    """Return the largest error of an output in the free-running run."""
    errors = [0.0]
    for name in runs.reference.exact.outputs:
        if name in runs.free.errors:
            errors.append(runs.free.errors[name].overall)
    return max(errors)


def repair_is_worse(runs: Float64Runs, names: list[str]) -> bool:
    """Return whether the outputs get worse if some taps get the reference's values.

    They get better at a bug. At values that a later step of the port restores, such as tokens in
    another order, that step spoils the reference's values.
    """
    taps = [tap for tap in runs.taps if tap.reference in names]
    if not taps:
        return False
    repaired = run_in_float64(runs.port, runs.reference, taps, forced=True)
    for name in runs.reference.exact.outputs:
        if name in repaired.errors and name in runs.free.errors:
            error = runs.free.errors[name].overall
            if repaired.errors[name].overall > WORSE * error:
                return True
    return False


# --- taps that could not be compared --------------------------------------------------------------


def with_uncompared_taps(runs: Float64Runs, suspects: list[str]) -> list[str]:
    """Add uncompared taps where they explain a suspect better than its own name.

    These are blocks that the port skips, and the first module with other shapes before the first
    suspect. A fused module alone is no suspect: the step that follows it covers its computation.
    """
    points = runs.reference.points
    positions = {name: points.index(name) for name in suspects}
    for name in suspects:
        for module in skipped_modules(runs, uncompared_before(runs, name)):
            positions[module] = first_position(points, module)
    for name in suspects[:1]:
        for tap in uncompared_before(runs, name):
            if runs.free.uncompared[tap] != NEVER_CALLED:
                positions[tap] = points.index(tap)
                break
    return sorted(positions, key=lambda name: positions[name])


def uncompared_before(runs: Float64Runs, name: str) -> list[str]:
    """List the uncompared taps directly before a point: its step covers their computation."""
    points = runs.reference.points
    names: list[str] = []
    for point in reversed(points[: points.index(name)]):
        if point not in runs.free.uncompared:
            break
        names.insert(0, point)
    return names


def skipped_modules(runs: Float64Runs, uncompared: list[str]) -> list[str]:
    """List the outermost modules with taps inside that the port never calls, unlike other blocks'.

    Args:
        runs: Runs of both sides.
        uncompared: Consecutive taps that could not be compared.
    """
    compared_kinds = {kind_of(name) for name in runs.free.errors}
    modules: list[str] = []
    for name in uncompared:
        is_container = any(other.startswith(f"{name}.") for other in uncompared)
        is_called = runs.free.uncompared[name] != NEVER_CALLED
        if is_container and not is_called and kind_of(name) in compared_kinds:
            modules.append(name)
    return [name for name in modules if not any(name.startswith(f"{other}.") for other in modules)]


def first_position(points: list[str], module: str) -> int:
    """Return the position of the first tap inside a module."""
    for position, point in enumerate(points):
        if point.startswith((f"{module}.", f"{module}:")):
            return position
    return points.index(module)

"""The gate `numerics`: in float64, where rounding is next to nothing, both compute the same.

At every tap, free-running and given right inputs (teacher-forced). Free-running, what goes wrong
early is carried on; given right inputs, only a step that is itself wrong shows an error.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from siglip_port.parity import bounds, hints
from siglip_port.parity.gates.float32_upcasts import all_are_float32_upcasts
from siglip_port.parity.gates.missing_outputs import find_missing_outputs
from siglip_port.parity.observe import ComparedRun, ReferenceRun, compare_run
from siglip_port.parity.results import Finding, GateResult, Measurement
from siglip_port.parity.sides import Side, cast
from siglip_port.parity.taps import Tap, port_to_reference, reference_to_port

MAX_HINTS = 6
"""How many taps that differ are explained. The others only name what follows from the same bug."""


@dataclass(frozen=True)
class Float64Runs:
    """A port beside the reference in float64.

    Attributes:
        port: that was run.
        reference: its run.
        taps: where the two are compared.
        free: on the port's own values.
        forced: with the reference's values after every tap.
        float32_upcasts: points that are wrong by float32 rounding only; then, no other is wrong.
    """

    port: Side
    reference: ReferenceRun
    taps: list[Tap]
    free: ComparedRun
    forced: ComparedRun
    float32_upcasts: list[str]

    @functools.cached_property
    def wrong_steps(self) -> list[str]:
        """The points that differ although right inputs are given."""
        if self.float32_upcasts:
            return []
        return points_outside_bound(self.reference, self.forced)

    @functools.cached_property
    def port_names(self) -> dict[str, str]:
        """The points of the reference -> those of the port."""
        return reference_to_port(self.taps)

    def port_name(self, name: str) -> str:
        """A point or output of the reference, in the port's names."""
        return self.port_names.get(name, name)


def check_numerics(
    port: Side, run: ReferenceRun, taps: list[Tap], *, max_hints: int = MAX_HINTS
) -> GateResult:
    """Compare a port with the reference in float64, at every tap and output.

    Args:
        port: in `eval()` mode.
        run: of the reference.
        taps: where to compare.
        max_hints: how many of the taps that differ get a hint.
    """
    runs = run_both_ways(port, run, taps)
    findings = find_missing_outputs(run, runs.free)
    suspects = find_suspects(runs)
    findings += explain_suspects(runs, suspects, max_hints)
    measurements = [*measure(runs, "free-running", runs.free)]
    measurements += measure(runs, "teacher-forced", runs.forced)
    return GateResult(
        "numerics",
        len(measurements),
        f"{bounds.FLOAT64_BOUND:g}: {bounds.FLOAT64_ORIGIN}",
        tuple(findings),
        tuple(measurements),
        unseen=() if findings else tuple(runs.free.unseen),
        float32_upcasts=tuple(runs.float32_upcasts),
    )


def run_both_ways(port: Side, run: ReferenceRun, taps: list[Tap]) -> Float64Runs:
    """Run the port free and forced, and decide whether all that differs is float32 rounding."""
    free = run_in_float64(port, run, taps)
    forced = run_in_float64(port, run, taps, forced=True)
    upcasts = points_outside_bound(run, forced)
    if not all_are_float32_upcasts(port, run, taps, forced, upcasts):
        upcasts = []
    return Float64Runs(port, run, taps, free, forced, upcasts)


def run_in_float64(
    port: Side,
    run: ReferenceRun,
    taps: list[Tap],
    *,
    forced: bool = False,
    keep: frozenset[str] = frozenset(),
) -> ComparedRun:
    """Run the port in float64, with weights and inputs rounded as the reference's were."""
    with cast(port.module, run.dtype, torch.float64):
        points = port_to_reference(taps)
        return compare_run(port, run.exact_inputs, run.exact, points, forced=forced, keep=keep)


def points_outside_bound(run: ReferenceRun, compared: ComparedRun) -> list[str]:
    """The points that differ, in the order of the computation."""
    names = []
    for name in run.points:
        error = compared.errors.get(name)
        if error is not None and not bounds.within_float64_bound(error.overall):
            names.append(name)
    return names


def find_suspects(runs: Float64Runs) -> list[str]:
    """The points to name: steps that are wrong themselves, and those that cannot be seen.

    Where neither explains the first difference of the free run, its place is named too.
    """
    if runs.float32_upcasts:
        return []
    points = runs.reference.points
    suspects = set(runs.wrong_steps)
    differing = points_outside_bound(runs.reference, runs.free)
    if not differing:
        return [name for name in points if name in suspects]
    suspects.update(unseen_modules(runs))
    ordered = [name for name in points if name in suspects]
    first = differing[0]
    if not ordered or points.index(ordered[0]) > points.index(first):
        ordered.insert(0, first)
    return ordered


def unseen_modules(runs: Float64Runs) -> list[str]:
    """Points that cannot be compared. A module is named once, not for its input too."""
    modules = {tap.port for tap in runs.taps if not tap.port.endswith(":input")}
    names = []
    for name in runs.free.unseen:
        point = runs.port_name(name)
        if point in modules or point.removesuffix(":input") not in modules:
            names.append(name)
    return names


def explain_suspects(runs: Float64Runs, suspects: list[str], max_hints: int) -> list[Finding]:
    """Say what is wrong at every suspect, and of the first ones what it looks like."""
    taps = [name for name in suspects if name in runs.reference.exact.taps]
    values = port_values(runs, taps[:max_hints])
    findings = []
    for name in suspects:
        if name in runs.free.unseen:
            findings.append(unseen_finding(runs, name, values.get(name)))
        else:
            findings.append(difference_finding(runs, name, values.get(name)))
    return findings


def port_values(runs: Float64Runs, names: list[str]) -> dict[str, Tensor]:
    """What the port has at some taps, given right inputs."""
    if not names:
        return {}
    keep = frozenset(names)
    return run_in_float64(runs.port, runs.reference, runs.taps, forced=True, keep=keep).values


def unseen_finding(runs: Float64Runs, name: str, value: Tensor | None) -> Finding:
    """What is said of a point that cannot be compared; `value` passed there, if anything."""
    message = runs.free.unseen[name]
    if value is not None:
        expected = list(runs.reference.exact.taps[name].shape)
        message += f", {list(value.shape)} for {expected}"
    return Finding(message, name, runs.port_name(name), math.inf)


def difference_finding(runs: Float64Runs, name: str, value: Tensor | None) -> Finding:
    """What is said of a point that differs, and of its `value` what it looks like."""
    exact = runs.reference.exact
    hint = ""
    if value is not None:
        hint = hints.explain_tap(runs.reference, name, value)
    elif name in exact.outputs:
        hint = hints.explain_output(runs.free.outputs[name], exact.outputs[name])
    run = runs.forced if name in runs.wrong_steps else runs.free
    error = run.errors[name].overall
    message = f"differs in float64, bound {bounds.FLOAT64_BOUND:g}"
    return Finding(message, name, runs.port_name(name), error, hint)


def measure(runs: Float64Runs, kind: str, compared: ComparedRun) -> Iterator[Measurement]:
    """The error at every point, beside its bound."""
    for name in runs.reference.points:
        if name not in compared.errors:
            continue
        bound = bounds.FLOAT64_BOUND
        if runs.float32_upcasts:
            bound = bounds.ROUNDING_FACTOR * runs.reference.noise[name].overall
        error = compared.errors[name].overall
        yield Measurement(f"float64, {kind}", name, runs.port_name(name), error, bound)

"""The gate `numerics`: both sides compute the same function.

Both run in float64, where rounding is negligible, and are compared at every tap. Free-running, an
error propagates to all later taps; teacher-forced (every step gets the reference's inputs), only
the step that causes it differs.
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
"""Number of differing taps that get a hint; later ones usually follow from the same bug."""


@dataclass(frozen=True)
class Float64Runs:
    """Runs of port and reference in float64.

    Attributes:
        port: Port that was run.
        reference: Run of the reference.
        taps: Compared taps.
        free: Free-running run of the port.
        forced: Teacher-forced run of the port.
        float32_upcasts: Points that differ by float32 rounding; empty if any other point differs.
    """

    port: Side
    reference: ReferenceRun
    taps: list[Tap]
    free: ComparedRun
    forced: ComparedRun
    float32_upcasts: list[str]

    @functools.cached_property
    def wrong_steps(self) -> list[str]:
        """Points that differ in the teacher-forced run."""
        if self.float32_upcasts:
            return []
        return points_outside_bound(self.reference, self.forced)

    @functools.cached_property
    def port_names(self) -> dict[str, str]:
        """Points of the reference -> points of the port."""
        return reference_to_port(self.taps)

    def port_name(self, name: str) -> str:
        """Return the port's name of a point or output of the reference."""
        return self.port_names.get(name, name)


def check_numerics(
    port: Side, run: ReferenceRun, taps: list[Tap], *, max_hints: int = MAX_HINTS
) -> GateResult:
    """Compare a port with the reference in float64, at every tap and output.

    Args:
        port: Port in `eval()` mode.
        run: Run of the reference.
        taps: Taps to compare.
        max_hints: Number of differing taps that get a hint.
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
        uncompared_taps=() if findings else tuple(runs.free.uncompared),
        float32_upcasts=tuple(runs.float32_upcasts),
    )


def run_both_ways(port: Side, run: ReferenceRun, taps: list[Tap]) -> Float64Runs:
    """Run the port free and forced, and decide whether all differences are float32 rounding."""
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
    capture: frozenset[str] = frozenset(),
) -> ComparedRun:
    """Run the port in float64, on weights and inputs rounded like the reference's."""
    with cast(port.module, run.dtype, torch.float64):
        points = port_to_reference(taps)
        return compare_run(
            port, run.exact_inputs, run.exact, points, forced=forced, capture=capture
        )


def points_outside_bound(run: ReferenceRun, port_run: ComparedRun) -> list[str]:
    """List the points that differ, in order of computation."""
    names = []
    for name in run.points:
        error = port_run.errors.get(name)
        if error is not None and not bounds.within_float64_bound(error.overall):
            names.append(name)
    return names


def find_suspects(runs: Float64Runs) -> list[str]:
    """List the points to report: steps that differ on their own, and uncompared taps.

    If neither precedes the first difference of the free-running run, that point is added.
    """
    if runs.float32_upcasts:
        return []
    points = runs.reference.points
    suspects = set(runs.wrong_steps)
    differences = points_outside_bound(runs.reference, runs.free)
    if not differences:
        return [name for name in points if name in suspects]
    suspects.update(uncompared_modules(runs))
    names = [name for name in points if name in suspects]
    first = differences[0]
    if not names or points.index(names[0]) > points.index(first):
        names.insert(0, first)
    return names


def uncompared_modules(runs: Float64Runs) -> list[str]:
    """List the taps that could not be compared; each module once, not also for its input."""
    modules = {tap.port for tap in runs.taps if not tap.port.endswith(":input")}
    names = []
    for name in runs.free.uncompared:
        point = runs.port_name(name)
        if point in modules or point.removesuffix(":input") not in modules:
            names.append(name)
    return names


def explain_suspects(runs: Float64Runs, suspects: list[str], max_hints: int) -> list[Finding]:
    """Return a finding per suspect, with hints for the first ones."""
    taps = [name for name in suspects if name in runs.reference.exact.taps]
    values = port_values(runs, taps[:max_hints])
    findings = []
    for name in suspects:
        if name in runs.free.uncompared:
            findings.append(uncompared_finding(runs, name, values.get(name)))
        else:
            findings.append(difference_finding(runs, name, values.get(name)))
    return findings


def port_values(runs: Float64Runs, names: list[str]) -> dict[str, Tensor]:
    """Return the port's values at some taps, teacher-forced."""
    if not names:
        return {}
    capture = frozenset(names)
    run = run_in_float64(runs.port, runs.reference, runs.taps, forced=True, capture=capture)
    return run.values


def uncompared_finding(runs: Float64Runs, name: str, value: Tensor | None) -> Finding:
    """Return the finding for a tap that could not be compared.

    Args:
        runs: Runs of both sides.
        name: Tap, by the reference's name.
        value: The port's value there, if the module was called.
    """
    message = runs.free.uncompared[name]
    if value is not None:
        expected = list(runs.reference.exact.taps[name].shape)
        message += f": {list(value.shape)}, expected {expected}"
    return Finding(message, name, runs.port_name(name), math.inf)


def difference_finding(runs: Float64Runs, name: str, value: Tensor | None) -> Finding:
    """Return the finding for a point that differs.

    Args:
        runs: Runs of both sides.
        name: Tap or output, by the reference's name.
        value: The port's value at a tap, for the hint.
    """
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


def measure(runs: Float64Runs, kind: str, port_run: ComparedRun) -> Iterator[Measurement]:
    """Yield the error at every point, with its bound."""
    for name in runs.reference.points:
        if name not in port_run.errors:
            continue
        bound = bounds.FLOAT64_BOUND
        if runs.float32_upcasts:
            bound = bounds.ROUNDING_FACTOR * runs.reference.noise[name].overall
        error = port_run.errors[name].overall
        yield Measurement(f"float64, {kind}", name, runs.port_name(name), error, bound)

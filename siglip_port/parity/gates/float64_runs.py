"""Runs of a port in float64, free-running and teacher-forced, for the gate `numerics`."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from siglip_port.parity import bounds
from siglip_port.parity.observe import ComparedRun, ReferenceRun, compare_run
from siglip_port.parity.sides import Side, cast
from siglip_port.parity.taps import Tap, port_to_reference, reference_to_port


@dataclass(frozen=True)
class Float64Runs:
    """Runs of port and reference in float64.

    Attributes:
        port: Port that was run.
        reference: Run of the reference.
        taps: Compared taps.
        free: Free-running run of the port.
        forced: Teacher-forced run of the port.
    """

    port: Side
    reference: ReferenceRun
    taps: list[Tap]
    free: ComparedRun
    forced: ComparedRun

    @functools.cached_property
    def differences(self) -> list[str]:
        """Points that differ in the free-running run, in order of computation."""
        return points_outside_bound(self.reference, self.free)

    @functools.cached_property
    def wrong_steps(self) -> list[str]:
        """Points that differ in both runs, in order of computation.

        A point that differs only if it is teacher-forced is no step of the port's computation: with
        the scale folded into the queries, the reference's queries give another context.
        """
        names = []
        for name in points_outside_bound(self.reference, self.forced):
            free = self.free.errors[name].overall
            is_artifact = free < self.forced.errors[name].overall / 10
            if name in self.differences and not is_artifact:
                names.append(name)
        return names

    @functools.cached_property
    def port_names(self) -> dict[str, str]:
        """Points of the reference -> points of the port."""
        return reference_to_port(self.taps)

    def port_name(self, name: str) -> str:
        """Return the port's name of a point or output of the reference."""
        return self.port_names.get(name, name)

    def is_output(self, name: str) -> bool:
        """Return whether a point is an output."""
        return name in self.reference.exact.outputs


def run_both_ways(port: Side, run: ReferenceRun, taps: list[Tap]) -> Float64Runs:
    """Run the port free-running and teacher-forced."""
    free = run_in_float64(port, run, taps)
    forced = run_in_float64(port, run, taps, forced=True)
    return Float64Runs(port, run, taps, free, forced)


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

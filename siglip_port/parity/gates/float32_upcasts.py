"""Separate float32 steps inside a port from bugs that are as small.

A softmax that is always float32, for example, is not a bug, and has an error of 1e-8 in float64.
The error of a bug is a smooth function of the inputs, and hardly changes if they change by 1e-4; a
rounding error changes completely.
"""

from __future__ import annotations

import torch
from torch import Tensor

from siglip_port.parity import bounds
from siglip_port.parity.observe import ComparedRun, ReferenceRun, compare_run
from siglip_port.parity.sides import Inputs, Side, cast, perturb
from siglip_port.parity.taps import Tap, port_to_reference

PERTURBATIONS = (0.0, 1e-4, 1e-4, 1e-4)


def all_are_float32_upcasts(
    port: Side, run: ReferenceRun, taps: list[Tap], forced: ComparedRun, names: list[str]
) -> bool:
    """Return whether all differences are float32 rounding inside the port.

    Args:
        port: Port in its own dtype.
        run: Run of the reference.
        taps: Compared taps.
        forced: The port's teacher-forced run in float64.
        names: Points that differ in it, by the reference's names.
    """
    if not names:
        return False
    for name in names:
        if not forced.errors[name].overall <= bounds.UPCAST_BOUND:
            return False
        if name not in run.exact.taps:
            return False  # an output that differs although every tap before it agrees

    generator = torch.Generator().manual_seed(0)
    errors = []
    for scale in PERTURBATIONS:
        inputs = perturb(run.exact_inputs, scale, generator)
        errors.append(errors_at(port, run, taps, inputs, names))
    for name in names:
        original, *perturbed = (error[name] for error in errors)
        if not is_rounding(original, perturbed):
            return False
    return True


def errors_at(
    port: Side, run: ReferenceRun, taps: list[Tap], inputs: Inputs, names: list[str]
) -> dict[str, Tensor]:
    """Return port - reference at some taps, on other inputs, in float64."""
    exact = run.record(inputs)
    with cast(port.module, run.dtype, torch.float64):
        points = port_to_reference(taps)
        capture = frozenset(names)
        port_run = compare_run(port, inputs, exact, points, forced=True, capture=capture)
    return {name: port_run.values[name] - exact.taps[name] for name in names}


def is_rounding(error: Tensor, perturbed: list[Tensor]) -> bool:
    """Return whether an error changes with the inputs like rounding, unlike the error of a bug."""
    cosines = []
    for other in perturbed:
        cosine = (error * other).sum() / (error.norm() * other.norm())
        cosines.append(abs(float(cosine)))
    return min(cosines) < bounds.UPCAST_COSINE

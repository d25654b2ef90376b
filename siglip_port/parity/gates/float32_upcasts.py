"""Steps that a port computes in float32 whatever the dtype, told from bugs that are as small.

A softmax that is always float32, say, is no bug, and leaves errors of 1e-8 in float64. A bug of
that size is a smooth function of the inputs: moved by 1e-4, they leave its error as it is. Rounding
errors come out anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from siglip_port.parity import bounds
from siglip_port.parity.observe import ComparedRun, ReferenceRun, compare_run
from siglip_port.parity.sides import Inputs, Side, cast, perturb
from siglip_port.parity.taps import Tap, port_to_reference, record

PERTURBATIONS = (0.0, 1e-4, 1e-4, 1e-4)


def all_are_float32_upcasts(
    port: Side, run: ReferenceRun, taps: list[Tap], forced: ComparedRun, names: list[str]
) -> bool:
    """Whether all that differs is float32 rounding inside the port.

    Args:
        port: in its own dtype.
        run: of the reference.
        taps: where the two are compared.
        forced: the port's run in float64, given right inputs.
        names: what differs in it, in the reference's names.
    """
    if not names:
        return False
    for name in names:
        if not forced.errors[name].overall <= bounds.UPCAST_BOUND:
            return False
        if name not in run.exact.taps:
            return False  # an output that is wrong although all before it is right

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
    """The difference of port and reference at some taps in float64, on other inputs."""
    reference = run.reference
    with cast(reference.module, run.dtype, torch.float64):
        exact = record(reference.module, list(run.exact.taps), lambda: reference.run(inputs))
    with cast(port.module, run.dtype, torch.float64):
        points = port_to_reference(taps)
        compared = compare_run(port, inputs, exact, points, forced=True, keep=frozenset(names))
    return {name: compared.values[name] - exact.taps[name] for name in names}


def is_rounding(error: Tensor, perturbed: list[Tensor]) -> bool:
    """Whether an error is unlike one of those on perturbed inputs, as those of a bug are not."""
    cosines = []
    for other in perturbed:
        cosine = (error * other).sum() / (error.norm() * other.norm())
        cosines.append(abs(float(cosine)))
    return min(cosines) < bounds.UPCAST_COSINE

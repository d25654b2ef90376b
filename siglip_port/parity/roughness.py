"""Detect float32 steps in a float64 computation, by second differences along a small step.

With a step h = 1e-7, those of a smooth function are about 1e-14. A float32 step, such as the
softmax of transformers' eager attention, rounds the three runs differently and makes them about
6e-8.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from siglip_port.parity.nested import Inputs, floating_point_dtype
from siglip_port.parity.sides import Side, perturb

STEP = 1e-7
SHIFT = 1e-4


def roughness(
    side: Side, inputs: Inputs, outputs: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """Return the second difference of every output, relative to the output.

    Args:
        side: Side in float64.
        inputs: Inputs in float64.
        outputs: Outputs of the side for these inputs, which saves a run; None to start from other
            inputs. A step from numbers that are exact in float32 vanishes in a side that is float32
            from its first operation on.

    Returns:
        Second differences by name, without outputs that are no floats.
    """
    shift = 0.0 if outputs is not None else SHIFT
    if outputs is None:
        outputs = outputs_at(0.0, side, inputs, shift)
    ahead = outputs_at(STEP, side, inputs, shift)
    behind = outputs_at(-STEP, side, inputs, shift)
    sizes = {}
    for name, output in outputs.items():
        if output.is_floating_point():
            second_difference = ahead[name] - 2 * output + behind[name]
            sizes[name] = float(second_difference.norm() / output.norm())
    return sizes


def outputs_at(step: float, side: Side, inputs: Inputs, shift: float) -> dict[str, Tensor]:
    """Run a side one step away in its inputs or, if they have no floats, in its weights."""
    start = torch.Generator().manual_seed(1)
    generator = torch.Generator().manual_seed(0)
    if floating_point_dtype(inputs) is not None:
        shifted = perturb(inputs, shift, start, torch.float64)
        return side.run(perturb(shifted, step, generator, torch.float64))
    with perturbed_parameters(side, shift, start), perturbed_parameters(side, step, generator):
        return side.run(inputs)


@contextlib.contextmanager
def perturbed_parameters(side: Side, step: float, generator: torch.Generator) -> Iterator[None]:
    """Multiply every parameter element by 1 + `step` * N(0, 1); restore them on exit."""
    parameters = list(side.parameters.values())
    originals = [parameter.data for parameter in parameters]
    try:
        for parameter, original in zip(parameters, originals, strict=True):
            noise = torch.randn(original.shape, generator=generator, dtype=torch.float64)
            parameter.data = original * (1 + step * noise.to(original))
        yield
    finally:
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.data = original

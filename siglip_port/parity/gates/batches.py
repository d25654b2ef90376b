"""Part of the gate `sensitivity`: outputs depend on their own example, and on no other of a batch.

The reference decides: similarities of all texts and all images, for example, depend on the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from siglip_port.parity import bounds
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.results import Finding
from siglip_port.parity.roughness import roughness
from siglip_port.parity.sides import (
    Inputs,
    ReferenceHost,
    Side,
    batch_size,
    cast,
    cast_inputs,
    example,
)


@dataclass(frozen=True)
class BatchRuns:
    """Outputs of a side for a batch, and for its examples.

    Attributes:
        batch: Outputs for the batch.
        joined: Outputs for the examples run one by one, concatenated along the first axis.
        length: Number of examples.
    """

    batch: dict[str, Tensor]
    joined: dict[str, Tensor]
    length: int

    def depends_on_batch(self, name: str) -> bool:
        """Return whether an output of an example differs if it is run alone."""
        error = difference(self.joined[name], self.batch[name])
        return not bounds.within_float64_bound(error)

    def is_constant(self, name: str) -> bool:
        """Return whether an output is the same for every example of the batch."""
        output = self.batch[name]
        if not self.has_batch_axis(name):
            return False
        return bounds.within_float64_bound(difference(output[:1].expand_as(output), output))

    def has_batch_axis(self, name: str) -> bool:
        """Return whether an output has a row for every example."""
        return self.batch[name].shape[:1] == (self.length,)


def difference(value: Tensor, exact: Tensor) -> float:
    """Return the relative error, the share of elements that differ if they are no floats."""
    if value.shape != exact.shape:
        return math.inf
    if exact.is_floating_point():
        return relative_error(value, exact)
    return float((value != exact).double().mean())


def check_batch(port: Side, reference: ReferenceHost, inputs: Inputs) -> list[Finding]:
    """Check that examples affect each other as in the reference, and that outputs vary.

    Args:
        port: Port in `eval()` mode.
        reference: Reference in `eval()` mode.
        inputs: At least two examples along the first axis.
    """
    runs = run_batch(port, inputs)
    constant = [name for name in runs.batch if runs.is_constant(name)]
    dependent = [name for name in runs.batch if runs.depends_on_batch(name)]
    if not constant and not dependent:
        return []
    expected = reference.compute(run_batch, inputs)
    is_rough = bool(dependent) and has_float32_steps(port, inputs)
    findings = []
    for name in constant:
        if not is_constant_as_expected(name, runs, expected):
            message = "same output for every example, so equality proves nothing"
            findings.append(Finding(message, name, name))
    for name in dependent:
        if name in expected.batch:
            findings += compare_dependence(name, runs, expected, is_rough=is_rough)
    return findings


def has_float32_steps(port: Side, inputs: Inputs) -> bool:
    """Return whether a port has steps that are less precise than float64."""
    if not port.supports_float64:
        return True
    with cast(port.module, torch.float64):
        sizes = roughness(port, cast_inputs(inputs, torch.float64))
    return any(not bounds.within_float64_bound(size) for size in sizes.values())


def run_batch(side: Side, inputs: Inputs) -> BatchRuns:
    """Run a batch, and its examples one by one, in float64 if the side supports it."""
    if not side.supports_float64:
        return join_runs(side, inputs)
    with cast(side.module, torch.float64):
        return join_runs(side, cast_inputs(inputs, torch.float64))


def join_runs(side: Side, inputs: Inputs) -> BatchRuns:
    """Run a batch, and its examples one by one, in the side's dtype."""
    length = batch_size(inputs)
    batch = side.run(inputs)
    examples = [side.run(example(inputs, i)) for i in range(length)]
    joined = {}
    for name in batch:
        joined[name] = torch.cat([outputs[name] for outputs in examples])
    return BatchRuns(batch, joined, length)


def is_constant_as_expected(name: str, port: BatchRuns, reference: BatchRuns) -> bool:
    """Return whether an output is constant in the reference, too, and another output varies."""
    if name not in reference.batch or not reference.is_constant(name):
        return False
    names = [other for other in port.batch if port.has_batch_axis(other)]
    return not all(port.is_constant(other) for other in names)


def compare_dependence(
    name: str, port: BatchRuns, reference: BatchRuns, *, is_rough: bool
) -> list[Finding]:
    """Compare how an output depends on the batch with how the reference's does.

    Args:
        name: Output.
        port: Runs of the port.
        reference: Runs of the reference.
        is_rough: Whether rounding of the port can be a part of the difference.
    """
    batch_error = difference(port.batch[name], reference.batch[name])
    single_error = difference(port.joined[name], reference.joined[name])
    error = dependence_error(name, port, reference)
    rounding = 0.0
    if is_rough and port.batch[name].is_floating_point():
        one_step = max(torch.finfo(torch.float32).eps, torch.finfo(port.batch[name].dtype).eps)
        rounding = 2 * bounds.ROUNDING_FACTOR * (min(batch_error, single_error) + one_step)
        rounding = min(rounding, 16 * one_step)
    if error <= max(bounds.FLOAT64_BOUND, rounding):
        return []
    message = "differs between a batch and its examples run one by one"
    if reference.depends_on_batch(name):
        message = "depends on the other examples of a batch in another way than the reference"
    return [Finding(message, name, name, error, "examples of a batch affect each other")]


def dependence_error(name: str, port: BatchRuns, reference: BatchRuns) -> float:
    """Return the error of what the batch adds to an output, relative to the output.

    An output without a row per example, such as similarities [B, B], has another shape if examples
    run one by one; then it is the error of those.
    """
    expected = reference.batch[name]
    if port.joined[name].shape != reference.joined[name].shape:
        return math.inf
    if reference.joined[name].shape != expected.shape or not expected.is_floating_point():
        return difference(port.joined[name], reference.joined[name])
    if port.batch[name].shape != expected.shape:
        return math.inf
    added = port.joined[name].double() - port.batch[name].double()
    expected_added = reference.joined[name].double() - expected.double()
    return float((added - expected_added).norm() / expected.double().norm())

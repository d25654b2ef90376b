"""The gate `sensitivity`: outputs depend on every input and parameter, as the reference's do.

Without it, two models that ignore their inputs would pass every other gate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from siglip_port.parity import bounds
from siglip_port.parity.metrics import is_finite, relative_error, tensors_equal
from siglip_port.parity.results import Finding, GateResult
from siglip_port.parity.sides import (
    Inputs,
    ReferenceHost,
    Side,
    batch_size,
    cast,
    cast_inputs,
    clone_inputs,
    example,
    map_tensors,
)


@dataclass(frozen=True)
class Influence:
    """Inputs and parameters that affect the outputs of a side.

    Attributes:
        masks: Positions that affect an output, [B, ...], bool, per input tensor [B, C, ...].
        unused_parameters: Names of the parameters that do not affect any output.
    """

    masks: list[Tensor]
    unused_parameters: list[str]


def check_sensitivity(port: Side, reference: ReferenceHost, inputs: Inputs) -> GateResult:
    """Check what affects the outputs: the same positions of the inputs, and every parameter.

    Outputs must also be finite, deterministic, not constant, and independent of the other examples
    in a batch.

    Args:
        port: Port in `eval()` mode.
        reference: Reference in `eval()` mode.
        inputs: At least two examples along the first axis.
    """
    outputs = port.run(inputs)
    findings = check_outputs(port, inputs, outputs)
    findings += check_batch(port, inputs)

    expected = reference.compute(influence_of_inputs, cast_inputs(inputs, torch.float32))
    with cast(port.module, torch.float32):
        influence = port_influence(port, cast_inputs(inputs, torch.float32), expected)
    findings += compare_influence(influence, expected)

    checked = 4 * len(outputs)  # finite, deterministic, not constant, independent
    checked += sum(mask.numel() for mask in influence.masks)
    checked += len(list(port.module.parameters()))
    bound = (
        "equality; batch against single examples: relative error "
        f"{bounds.FLOAT64_BOUND:g} in float64"
    )
    return GateResult("sensitivity", checked, bound, tuple(findings))


def influence_of_inputs(reference: Side, inputs: Inputs) -> Influence:
    """Find the positions of float32 inputs that affect the reference's outputs."""
    with cast(reference.module, torch.float32):
        return influence_by_gradient(reference, inputs, {})


def check_outputs(port: Side, inputs: Inputs, outputs: Mapping[str, Tensor]) -> list[Finding]:
    """Check that outputs are finite and deterministic, up to the order of summation.

    Args:
        port: Port in `eval()` mode.
        inputs: Inputs in its dtype.
        outputs: Its outputs for these inputs.
    """
    repeated = port.run(inputs)
    findings = []
    unequal = []
    for name, output in outputs.items():
        if not is_finite(output):
            findings.append(Finding("contains NaN or Inf", name, name))
        elif not tensors_equal(output, repeated[name]):
            unequal.append(name)
    if unequal:
        findings += check_repeated_in_float64(port, inputs, unequal)
    return findings


def check_repeated_in_float64(port: Side, inputs: Inputs, names: list[str]) -> list[Finding]:
    """Check that outputs that differ between two runs differ by rounding only.

    Sums in another order, as on several threads or on a GPU, agree in float64; dropout does not.
    """
    findings = []
    with cast(port.module, torch.float64):
        inputs = cast_inputs(inputs, torch.float64)
        outputs = port.run(inputs)
        repeated = port.run(inputs)
    for name in names:
        error = relative_error(repeated[name], outputs[name])
        if not bounds.within_float64_bound(error):
            message = f"differs between two runs (relative difference in float64 {error:.1e})"
            findings.append(Finding(message, name, name))
    return findings


def check_batch(port: Side, inputs: Inputs) -> list[Finding]:
    """Check in float64 that outputs depend on their own example, and on no other of the batch."""
    findings = []
    with cast(port.module, torch.float64):
        inputs = cast_inputs(inputs, torch.float64)
        outputs = port.run(inputs)
        examples = run_one_by_one(port, inputs)
    for name, output in outputs.items():
        if is_constant(output):
            message = "same output for every example, so equality proves nothing"
            findings.append(Finding(message, name, name))
        joined = torch.cat([outputs_of_one[name] for outputs_of_one in examples])
        same_shape = joined.shape == output.shape
        error = relative_error(joined, output) if same_shape else math.inf
        if not bounds.within_float64_bound(error):
            message = "differs between a batch and its examples run one by one"
            hint = "examples of a batch affect each other"
            findings.append(Finding(message, name, name, error, hint))
    return findings


def run_one_by_one(port: Side, inputs: Inputs) -> list[dict[str, Tensor]]:
    """Run every example as a batch of one."""
    return [port.run(example(inputs, i)) for i in range(batch_size(inputs))]


def is_constant(output: Tensor) -> bool:
    """Return whether an output is the same for every example of a batch."""
    return relative_error(output[:1].expand_as(output), output) < bounds.FLOAT64_BOUND


def compare_influence(port: Influence, reference: Influence) -> list[Finding]:
    """Check that the same positions affect both sides, and every parameter the port."""
    findings = []
    for i, (mask, expected) in enumerate(zip(port.masks, reference.masks, strict=True)):
        if not expected.any():
            message = f"input {i} does not affect the reference's outputs"
            findings.append(Finding(message, "inputs", "inputs"))
        count = int((mask != expected).sum())
        if count:
            message = f"positions of input {i} that affect only one side: {count}"
            findings.append(Finding(message, "inputs", "inputs"))
    for name in port.unused_parameters:
        hint = "parameter not used, or its effect cancels"
        findings.append(Finding("does not affect any output", port=name, hint=hint))
    return findings


def port_influence(port: Side, inputs: Inputs, expected: Influence) -> Influence:
    """Find what affects the port's outputs, by gradients, and confirm differences by perturbation.

    A port without gradients, or with in-place operations, is perturbed only.
    """
    parameters = dict(port.module.named_parameters())
    try:
        influence = influence_by_gradient(port, inputs, parameters)
    except RuntimeError:
        influence = Influence([~mask for mask in expected.masks], list(parameters))
    same_masks = all(map(torch.equal, influence.masks, expected.masks))
    if same_masks and not influence.unused_parameters:
        return influence
    return influence_by_perturbation(port, inputs, suspected=influence, expected=expected)


def influence_by_gradient(
    side: Side, inputs: Inputs, parameters: Mapping[str, nn.Parameter]
) -> Influence:
    """Find what affects the outputs by the gradient of a random sum of them."""
    leaves: list[Tensor] = []

    def to_leaf(tensor: Tensor) -> Tensor:
        leaves.append(tensor.detach().clone().requires_grad_())
        return leaves[-1]

    requires_grad = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        with torch.enable_grad():
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            outputs = side.call(side.module, map_tensors(inputs, to_leaf))
            total = random_sum(outputs, leaves[0].device)
            variables = [*leaves, *parameters.values()]
            gradients = torch.autograd.grad(total, variables, allow_unused=True)
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(requires_grad[name])

    masks = []
    for leaf, gradient in zip(leaves, gradients, strict=False):
        if gradient is None:
            masks.append(torch.zeros_like(leaf[:, 0], dtype=torch.bool))
        else:
            masks.append((gradient != 0).any(dim=1))
    unused = []
    for name, gradient in zip(parameters, gradients[len(leaves) :], strict=True):
        if gradient is None or not gradient.any():
            unused.append(name)
    return Influence(masks, unused)


def random_sum(outputs: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """Sum all elements of all outputs, weighted by noise, with each output scaled to norm 1."""
    total = torch.zeros((), device=device)
    for seed, output in enumerate(outputs.values()):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(output.shape, generator=generator, dtype=output.dtype)
        total = total + (output * noise.to(output.device)).sum() / output.detach().norm()
    return total


def influence_by_perturbation(
    port: Side, inputs: Inputs, *, suspected: Influence, expected: Influence
) -> Influence:
    """Check by perturbation what affects the outputs, where gradients differ from the reference.

    Args:
        port: Port to run.
        inputs: Inputs of the port.
        suspected: Result for its gradients.
        expected: Result for the reference.
    """
    probe = PerturbationProbe(port, inputs)
    masks = [mask.clone() for mask in suspected.masks]
    for leaf, leaf_masks, leaf_expected in zip(probe.leaves, masks, expected.masks, strict=True):
        for tensor, mask, expected_mask in zip(leaf, leaf_masks, leaf_expected, strict=True):
            confirm_mask(probe, tensor, mask, expected_mask)
    unused = []
    with torch.no_grad():
        for name in suspected.unused_parameters:
            if not probe.affects_outputs(port.module.get_parameter(name)):
                unused.append(name)
    return Influence(masks, unused)


def confirm_mask(probe: PerturbationProbe, tensor: Tensor, mask: Tensor, expected: Tensor) -> None:
    """Correct the mask of one example, in place, where it differs from the reference's.

    Every third position along each axis is perturbed together, first those that should affect the
    outputs.
    """
    slices = [slice(start, None, 3) for start in range(3)]
    for affects in (True, False):
        suspects = (mask != expected) & (expected == affects)
        for tile in itertools.product(slices, repeat=mask.ndim):
            positions = torch.zeros_like(mask)
            positions[tile] = suspects[tile]
            if positions.any():
                mask[positions] = probe.affects_outputs(tensor, positions[None])


class PerturbationProbe:
    """Probe that runs a side repeatedly, each time with one tensor perturbed.

    Args:
        side: Side to run.
        inputs: Inputs of the side.
    """

    def __init__(self, side: Side, inputs: Inputs) -> None:
        self.side = side
        self.leaves: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(0)
        self._inputs = map_tensors(inputs, self._clone)
        self._outputs = self._run()

    def _clone(self, tensor: Tensor) -> Tensor:
        self.leaves.append(tensor.clone())
        return self.leaves[-1]

    def _run(self) -> dict[str, Tensor]:
        return self.side.run(clone_inputs(self._inputs))

    def affects_outputs(self, tensor: Tensor, positions: Tensor | float = 1.0) -> bool:
        """Return whether perturbing a tensor changes any bit of the outputs.

        Args:
            tensor: Leaf of the inputs or a parameter; perturbed in place, then restored.
            positions: Mask of the elements to perturb, broadcast to the shape of `tensor`.
        """
        original = tensor.clone()
        noise = torch.randn(tensor.shape, generator=self._generator).to(tensor)
        tensor += noise * original.abs().mean() * positions
        outputs = self._run()
        tensor.copy_(original)
        for name, output in self._outputs.items():
            if not tensors_equal(outputs[name], output):
                return True
        return False

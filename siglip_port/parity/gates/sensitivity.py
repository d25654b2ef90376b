"""The gate `sensitivity`: outputs depend on every input and parameter, as the reference's do.

Without it, two models that ignore their inputs would pass every other gate.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from siglip_port.parity import bounds
from siglip_port.parity.gates.batches import check_batch, difference
from siglip_port.parity.gates.integer_inputs import check_integer_inputs
from siglip_port.parity.metrics import is_finite, tensors_equal
from siglip_port.parity.nested import floating_point_dtype, map_tensors
from siglip_port.parity.results import Finding, GateResult
from siglip_port.parity.sides import (
    Inputs,
    ReferenceHost,
    Side,
    cast,
    cast_inputs,
    clone_inputs,
)


class NoGradientsError(RuntimeError):
    """No output has gradients, such as class numbers."""


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
    findings += check_batch(port, reference, inputs)

    dtype = torch.float32
    if not port.supports_float64:
        dtype = floating_point_dtype(inputs) or torch.float32
    expected = reference.compute(influence_of_inputs, cast_inputs(inputs, torch.float32))
    with cast(port.module, dtype):
        influence = port_influence(port, cast_inputs(inputs, dtype), expected)
    if not all(map(torch.equal, influence.masks, expected.masks)):
        expected = reference.compute(confirm_influence, inputs, expected, influence)
    findings += compare_influence(influence, expected)
    if influence.unused_parameters:
        shapes = reference.compute(shapes_of_unused_parameters, inputs)
        findings += find_unused_parameters(port, influence.unused_parameters, shapes)
    integer_checks, integer_findings = check_integer_inputs(port, reference, inputs, dtype)
    findings += integer_findings

    checked = 4 * len(outputs)  # finite, deterministic, not constant, independent
    checked += sum(mask.numel() for mask in influence.masks)
    checked += len(port.parameters) + integer_checks
    bound = (
        "equality; batch against single examples: relative error "
        f"{bounds.FLOAT64_BOUND:g} in float64"
    )
    return GateResult("sensitivity", checked, bound, tuple(findings))


def influence_of_inputs(reference: Side, inputs: Inputs) -> Influence:
    """Find the positions of float32 inputs that affect the reference's outputs.

    Without outputs that have gradients, such as class numbers, no position can be judged.
    """
    if floating_point_dtype(inputs) is None:
        return Influence([], [])
    with cast(reference.module, torch.float32):
        try:
            return influence_by_gradient(reference, inputs, {})
        except NoGradientsError:
            return Influence([], [])


def shapes_of_unused_parameters(reference: Side, inputs: Inputs) -> list[torch.Size]:
    """List the shapes of the reference's parameters that do not affect any output."""
    inputs = cast_inputs(inputs, torch.float32)
    parameters = reference.parameters
    nothing = Influence([], [])
    with cast(reference.module, torch.float32):
        try:
            influence = influence_by_gradient(reference, inputs, parameters)
        except NoGradientsError:
            influence = Influence([], list(parameters))
        suspected = Influence([], influence.unused_parameters)
        unused = influence_by_perturbation(reference, inputs, suspected=suspected, expected=nothing)
    return [parameters[name].shape for name in unused.unused_parameters]


def confirm_influence(
    reference: Side, inputs: Inputs, influence: Influence, port: Influence
) -> Influence:
    """Check by perturbation what affects the reference's outputs, where the port differs.

    A mask that is rounded, for example, affects outputs without gradients.
    """
    with cast(reference.module, torch.float32):
        inputs = cast_inputs(inputs, torch.float32)
        return influence_by_perturbation(reference, inputs, suspected=influence, expected=port)


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
    if not port.supports_float64:
        return [Finding("differs between two runs", name, name) for name in names]
    findings = []
    with cast(port.module, torch.float64):
        inputs = cast_inputs(inputs, torch.float64)
        outputs = port.run(inputs)
        repeated = port.run(inputs)
    for name in names:
        error = difference(repeated[name], outputs[name])
        if not bounds.within_float64_bound(error):
            message = f"differs between two runs (relative difference in float64 {error:.1e})"
            findings.append(Finding(message, name, name))
    return findings


def compare_influence(port: Influence, reference: Influence) -> list[Finding]:
    """Check that the same positions of the inputs affect both sides."""
    findings = []
    if reference.masks and not any(mask.any() for mask in reference.masks):
        message = "no input affects the reference's outputs"
        findings.append(Finding(message, "inputs", "inputs"))
    for i, (mask, expected) in enumerate(zip(port.masks, reference.masks, strict=True)):
        count = int((mask != expected).sum())
        if count:
            message = f"positions of input {i} that affect only one side: {count}"
            findings.append(Finding(message, "inputs", "inputs"))
    return findings


def find_unused_parameters(
    port: Side, names: list[str], reference_shapes: list[torch.Size]
) -> list[Finding]:
    """Find unused parameters of the port, except those that the reference does not use, either.

    Names differ between the sides, so a parameter is recognized by its shape.
    """
    shapes = list(reference_shapes)
    findings = []
    for name in names:
        shape = port.parameters[name].shape
        if shape in shapes:
            shapes.remove(shape)
            continue
        hint = "parameter not used, or its effect cancels"
        findings.append(Finding("does not affect any output", port=name, hint=hint))
    return findings


def port_influence(port: Side, inputs: Inputs, expected: Influence) -> Influence:
    """Find what affects the port's outputs, by gradients, and confirm differences by perturbation.

    A port without gradients, or with in-place operations, is perturbed only.
    """
    unknown = Influence([~mask for mask in expected.masks], list(port.parameters))
    influence = unknown
    if isinstance(port.module, nn.Module):
        try:
            influence = influence_by_gradient(port, inputs, port.parameters)
        except RuntimeError:
            influence = unknown
    if not expected.masks:
        influence = Influence([], influence.unused_parameters)
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
            total = random_sum(outputs)
            variables = [*leaves, *parameters.values()]
            gradients = torch.autograd.grad(total, variables, allow_unused=True)
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(requires_grad[name])

    masks = []
    for leaf, gradient in zip(leaves, gradients, strict=False):
        masks.append(nonzero_positions(torch.zeros_like(leaf) if gradient is None else gradient))
    unused = []
    for name, gradient in zip(parameters, gradients[len(leaves) :], strict=True):
        if gradient is None or not gradient.any():
            unused.append(name)
    return Influence(masks, unused)


def nonzero_positions(gradient: Tensor) -> Tensor:
    """Return where any channel of a gradient is not zero: [B, C, ...] -> [B, ...]."""
    if gradient.ndim == 0:
        gradient = gradient[None]
    if gradient.ndim == 1:
        return gradient != 0
    return (gradient != 0).any(dim=1)


def random_sum(outputs: Mapping[str, Tensor]) -> Tensor:
    """Sum the elements of all outputs with gradients, weighted by noise, and scaled to norm 1."""
    terms = []
    for seed, output in enumerate(outputs.values()):
        if output.requires_grad:
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(output.shape, generator=generator, dtype=output.dtype)
            terms.append((output * noise.to(output.device)).sum() / output.detach().norm())
    if not terms:
        raise NoGradientsError("no output has gradients")
    return torch.stack([term.to(terms[0]) for term in terms]).sum()


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
    for leaf, leaf_masks, leaf_expected in zip(probe.leaves, masks, expected.masks, strict=False):
        rows = with_channels(leaf)
        for tensor, mask, expected_mask in zip(rows, leaf_masks, leaf_expected, strict=True):
            confirm_mask(probe, tensor, mask, expected_mask)
    unused = []
    with torch.no_grad():
        for name in suspected.unused_parameters:
            if not probe.affects_outputs(port.parameters[name]):
                unused.append(name)
    return Influence(masks, unused)


def with_channels(leaf: Tensor) -> Tensor:
    """View an input as [B, C, ...], so that masks of positions are [B, ...]."""
    if leaf.ndim == 0:
        leaf = leaf[None]
    if leaf.ndim == 1:
        return leaf[:, None]
    return leaf


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
        size = float(original[original.isfinite()].abs().mean()) or 1.0
        tensor += noise * size * positions
        outputs = self._run()
        tensor.copy_(original)
        for name, output in self._outputs.items():
            if not tensors_equal(outputs[name], output):
                return True
        return False

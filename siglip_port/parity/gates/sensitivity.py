"""The gate `sensitivity`: everything matters, nothing mixes, and two runs agree.

Two dead models agree perfectly.
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
    Side,
    batch_size,
    cast,
    cast_inputs,
    clone_inputs,
    example,
    map_tensors,
)

MIXING_ORIGIN = "as in numerics: one image alone against the same one in a batch"


@dataclass(frozen=True)
class Influence:
    """What moves an output of a side.

    Attributes:
        masks: of each input tensor, [B, C, ...] -> [B, ...], where it does.
        unused_parameters: the names of those that do not.
    """

    masks: list[Tensor]
    unused_parameters: list[str]


def check_sensitivity(port: Side, reference: Side, inputs: Inputs) -> GateResult:
    """Check that every image, patch and parameter matters, and that images do not mix.

    What matters in the port must matter in the reference, and the other way round.

    Args:
        port: in `eval()` mode.
        reference: likewise.
        inputs: at least two of them, along the first axis.
    """
    outputs = port.run(inputs)
    repeated = port.run(inputs)
    findings = check_outputs(outputs, repeated)
    findings += check_batch(port, inputs)

    with cast(reference.module, torch.float32):
        expected = influence_by_gradient(reference, cast_inputs(inputs, torch.float32), {})
    with cast(port.module, torch.float32):
        influence = port_influence(port, cast_inputs(inputs, torch.float32), expected)
    findings += compare_influence(influence, expected)

    checked = 4 * len(outputs)  # finite, repeatable, not constant, not mixed
    checked += sum(mask.numel() for mask in influence.masks)
    checked += len(list(port.module.parameters()))
    bound = (
        f"equality, and no gradient is zero; batches: {bounds.FLOAT64_BOUND:g} ({MIXING_ORIGIN})"
    )
    return GateResult("sensitivity", checked, bound, tuple(findings))


def check_outputs(outputs: Mapping[str, Tensor], repeated: Mapping[str, Tensor]) -> list[Finding]:
    """Check that outputs are finite, and those of a second run the same."""
    findings = []
    for name, output in outputs.items():
        if not is_finite(output):
            findings.append(Finding(f"{name} is not finite", name, name))
        elif not tensors_equal(output, repeated[name]):
            error = relative_error(repeated[name], output)
            message = f"{name} is another one each time (relative difference {error:.1e})"
            findings.append(Finding(message, name, name))
    return findings


def check_batch(port: Side, inputs: Inputs) -> list[Finding]:
    """Check in float64 that outputs depend on their own input, and on no other of the batch."""
    findings = []
    with cast(port.module, torch.float64):
        inputs = cast_inputs(inputs, torch.float64)
        outputs = port.run(inputs)
        examples = run_one_by_one(port, inputs)
    for name, output in outputs.items():
        if is_constant(output):
            message = "it is the same for every input, so that agreement proves nothing"
            findings.append(Finding(message, name, name))
        joined = torch.cat([outputs_of_one[name] for outputs_of_one in examples])
        same_shape = joined.shape == output.shape
        error = relative_error(joined, output) if same_shape else math.inf
        if not bounds.within_float64_bound(error):
            message = (
                f"{name} of a batch is not that of its images one by one "
                f"(relative difference {error:.1e})"
            )
            findings.append(Finding(message, name, name, error, "images of one batch mix"))
    return findings


def run_one_by_one(port: Side, inputs: Inputs) -> list[dict[str, Tensor]]:
    """The outputs of every example alone."""
    return [port.run(example(inputs, i)) for i in range(batch_size(inputs))]


def is_constant(output: Tensor) -> bool:
    """Whether an output is the same for all examples of a batch."""
    return relative_error(output[:1].expand_as(output), output) < bounds.FLOAT64_BOUND


def compare_influence(port: Influence, reference: Influence) -> list[Finding]:
    """Check that the same places of the inputs matter to both, and every parameter of the port."""
    findings = []
    for i, (mask, expected) in enumerate(zip(port.masks, reference.masks, strict=True)):
        if not expected.any():
            message = f"nothing in input {i} matters to the reference"
            findings.append(Finding(message, "inputs", "inputs"))
        count = int((mask != expected).sum())
        if count:
            message = f"{count} places of input {i} matter to one side and not to the other"
            findings.append(Finding(message, "inputs", "inputs"))
    for name in port.unused_parameters:
        hint = "never used, or used up before it matters"
        findings.append(Finding("this parameter changes no output", port=name, hint=hint))
    return findings


def port_influence(port: Side, inputs: Inputs, expected: Influence) -> Influence:
    """What matters to a port: by gradients, and what they say against it, confirmed without them.

    A port that works in place, or without gradients, is changed bit by bit instead.
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
    """Where inputs have a gradient, and which parameters have none, of a sum of all outputs."""
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
    """A sum of all numbers of all outputs, each times noise, each output scaled to norm 1."""
    total = torch.zeros((), device=device)
    for seed, output in enumerate(outputs.values()):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(output.shape, generator=generator, dtype=output.dtype)
        total = total + (output * noise.to(output.device)).sum() / output.detach().norm()
    return total


def influence_by_perturbation(
    port: Side, inputs: Inputs, *, suspected: Influence, expected: Influence
) -> Influence:
    """Change what is suspected, and see whether an output moves by a bit.

    Args:
        port: whose outputs are watched.
        inputs: of it.
        suspected: what its gradients say.
        expected: what matters to the reference.
    """
    probe = PerturbationProbe(port, inputs)
    masks = [mask.clone() for mask in suspected.masks]
    for leaf, leaf_masks, leaf_expected in zip(probe.leaves, masks, expected.masks, strict=True):
        for tensor, mask, truth in zip(leaf, leaf_masks, leaf_expected, strict=True):
            confirm_mask(probe, tensor, mask, truth)
    unused = []
    with torch.no_grad():
        for name in suspected.unused_parameters:
            if not probe.moves_outputs(port.module.get_parameter(name)):
                unused.append(name)
    return Influence(masks, unused)


def confirm_mask(probe: PerturbationProbe, tensor: Tensor, mask: Tensor, truth: Tensor) -> None:
    """Correct the mask of one example, in place, where it differs from the reference's.

    Places are changed together in tiles of every third one along each axis, those that should
    matter first.
    """
    slices = [slice(start, None, 3) for start in range(3)]
    for expected in (True, False):
        suspects = (mask != truth) & (truth == expected)
        for tile in itertools.product(slices, repeat=mask.ndim):
            places = torch.zeros_like(mask)
            places[tile] = suspects[tile]
            if places.any():
                mask[places] = probe.moves_outputs(tensor, places[None])


class PerturbationProbe:
    """Runs a side again and again, with one of its tensors changed."""

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

    def moves_outputs(self, tensor: Tensor, places: Tensor | float = 1.0) -> bool:
        """Whether an output moves when `tensor` does: a leaf of the inputs, or a parameter.

        Args:
            tensor: changed in place, and changed back.
            places: where, 1 or True; broadcast to its shape.
        """
        original = tensor.clone()
        noise = torch.randn(tensor.shape, generator=self._generator).to(tensor)
        tensor += noise * original.abs().mean() * places
        outputs = self._run()
        tensor.copy_(original)
        for name, output in self._outputs.items():
            if not tensors_equal(outputs[name], output):
                return True
        return False

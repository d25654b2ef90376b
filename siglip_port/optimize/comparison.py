"""Comparison of an optimized or exported model with the original model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from siglip_port.model import SigLipVisionModel

TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3, torch.int8: 0.2}
"""Largest accepted `relative_difference` from the model in the same dtype (int8: in float32)."""


class ModelOutputs(nn.Module):
    """All outputs of a model from one forward pass.

    [B, C, S, S] -> tokens [B, N, D] and, if the model pools, pooled [B, D].
    """

    def __init__(self, model: SigLipVisionModel) -> None:
        super().__init__()
        self.model = model
        self.names = ["tokens"]
        if model.config.has_pooled_output:
            self.names.append("pooled")

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Run the model: [B, C, S, S] -> (tokens [B, N, D], pooled [B, D]), or (tokens,)."""
        tokens = self.model(pixel_values)
        if not self.model.config.has_pooled_output:
            return (tokens,)
        return tokens, self.model.pool(tokens)


def noise_images(model: SigLipVisionModel, batch_size: int) -> Tensor:
    """Return reproducible noise [B, C, S, S] in [-1, 1], in the model's dtype and on its device."""
    size = model.config.image_size
    shape = (batch_size, model.config.num_channels, size, size)
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return noise.to(model.device, model.dtype)


def relative_difference(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest absolute difference over the largest absolute expected value.

    NaN counts as infinitely different.
    """
    largest = 0.0
    for output, reference in zip(outputs, expected, strict=True):
        error = (output.double() - reference.double()).abs().max()
        relative = (error / reference.double().abs().max()).item()
        if relative != relative:
            return float("inf")
        largest = max(largest, relative)
    return largest

"""Small models, and images for them."""

from __future__ import annotations

import torch
from torch import Tensor

from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port.parity import randomize
from tests.helpers.checkpoints import SMALL, pixels


def random_model(
    config: SigLipVisionConfig = SMALL, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> SigLipVisionModel:
    """Build a model with reproducible random parameters, none of them 0 or 1."""
    model = SigLipVisionModel(config).to(dtype).eval()
    randomize(model, seed=seed)
    return model


def random_float64_model(config: SigLipVisionConfig) -> SigLipVisionModel:
    """Build `random_model` in float64."""
    return random_model(config, dtype=torch.float64)


def counting_model(config: SigLipVisionConfig = SMALL) -> SigLipVisionModel:
    """Build a model with parameters from -8/64 to 8/64, the same bits in every torch release."""
    model = SigLipVisionModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            numbers = torch.arange(parameter.numel()) % 17 - 8
            parameter.copy_(numbers.reshape(parameter.shape) / 64)
    return model


def images_for(model: SigLipVisionModel, batch_size: int = 2) -> Tensor:
    """Draw random `pixel_values` of the size that a model takes, float32, [B, C, H, W]."""
    return pixels(model.config, batch_size).float()

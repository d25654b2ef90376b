"""Small models for tests."""

from __future__ import annotations

import torch

from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port.parity import randomize
from tests.helpers.checkpoints import SMALL


def random_model(config: SigLipVisionConfig = SMALL, seed: int = 0) -> SigLipVisionModel:
    """Build a model with reproducible random parameters, none of them 0 or 1."""
    model = SigLipVisionModel(config).eval()
    randomize(model, seed=seed)
    return model


def counting_model(config: SigLipVisionConfig = SMALL) -> SigLipVisionModel:
    """Build a model with parameters from -8/64 to 8/64, the same bits in every torch release."""
    model = SigLipVisionModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            numbers = torch.arange(parameter.numel()) % 17 - 8
            parameter.copy_(numbers.reshape(parameter.shape) / 64)
    return model

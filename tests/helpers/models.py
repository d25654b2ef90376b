"""Small models for tests."""

from __future__ import annotations

import torch

from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port.parity import randomize
from tests.helpers.checkpoints import SMALL


def random_model(config: SigLipVisionConfig = SMALL, seed: int = 0) -> SigLipVisionModel:
    """A model on which nothing is zero and nothing is one, the same for the same seed."""
    model = SigLipVisionModel(config).eval()
    randomize(model, seed=seed)
    return model


def counting_model(config: SigLipVisionConfig = SMALL) -> SigLipVisionModel:
    """A model whose parameters count from -8/64 to 8/64: the same bits with every torch."""
    model = SigLipVisionModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            numbers = torch.arange(parameter.numel()) % 17 - 8
            parameter.copy_(numbers.reshape(parameter.shape) / 64)
    return model

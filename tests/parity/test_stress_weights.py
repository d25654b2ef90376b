from __future__ import annotations

import torch
from torch import nn

from siglip_port import SigLipVisionModel
from siglip_port.parity.stress_weights import randomize
from tests.helpers.checkpoints import ODD


def test_no_parameter_is_zero_or_one() -> None:
    model = SigLipVisionModel(ODD)
    randomize(model)
    for name, parameter in model.named_parameters():
        assert not ((parameter == 0) | (parameter == 1)).any(), name
        assert parameter.std() > 0.02, name


def test_distributions() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(400, 300)
    norm = nn.LayerNorm(4000)
    conv = nn.Conv2d(3, 64, 16)
    attention = nn.MultiheadAttention(64, 4)
    table = nn.Embedding(64, 64)
    for module in (linear, norm, conv, attention, table):
        randomize(module)
    for tensor, spread in [
        (linear.weight, 400**-0.5),
        (linear.bias, 0.3),
        (norm.bias, 0.5),
        (norm.weight.abs().log(), 0.5),
        (conv.weight, 1.5 * (3 * 16 * 16) ** -0.5),
        (attention.in_proj_weight, 64**-0.5),
        (attention.in_proj_bias, 0.3),
        (attention.out_proj.weight, 64**-0.5),
        (table.weight, 0.7),
    ]:
        assert tensor is not None
        tolerance = 5 * tensor.numel() ** -0.5
        assert abs(tensor.std() / spread - 1) < tolerance
        assert abs(tensor.mean()) < tolerance * spread
    assert 0.07 < (norm.weight < 0).float().mean() < 0.13


def test_weights_depend_only_on_seed() -> None:
    models = [SigLipVisionModel(ODD) for _ in range(3)]
    random_state = torch.get_rng_state()
    for model, seed in zip(models, (7, 7, 8), strict=True):
        randomize(model, seed)
    assert torch.equal(torch.get_rng_state(), random_state)
    first, second, third = (nn.utils.parameters_to_vector(model.parameters()) for model in models)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)

from __future__ import annotations

import pytest
import torch
from torch import nn

from siglip_port import SigLipVisionModel
from siglip_port.parity.stress_weights import randomize
from tests.helpers.checkpoints import ODD
from tests.parity.toy_models import float_noise


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


class LayerScale(nn.Module):
    """Factor per feature, nearly 0 in a fresh model."""

    def __init__(self) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.full((500,), 1e-5))


def test_norms_and_factors_are_far_from_identity() -> None:
    norms = [nn.BatchNorm2d(500), nn.GroupNorm(5, 500), nn.RMSNorm(500), nn.LayerNorm((20, 25))]
    for module in (*norms, LayerScale()):
        randomize(module)
        gain = next(module.parameters())
        assert 0.3 < gain.abs().log().std() < 0.7, module
        assert 0.05 < (gain < 0).float().mean() < 0.15, module
        assert gain.abs().min() > 0.1, module


def test_statistics_of_batch_norm() -> None:
    for norm in (nn.BatchNorm1d(400), nn.BatchNorm2d(400), nn.BatchNorm3d(400)):
        randomize(norm)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        assert 0.4 < norm.running_mean.std() < 0.6
        assert norm.running_var.min() > 0
        assert 0.4 < norm.running_var.log().std() < 0.6
        assert norm.num_batches_tracked == 0


class BufferedBatchNorm(nn.Module):
    """BatchNorm whose parameters are buffers, with a table and positions that are none."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "running_var"):
            self.register_buffer(name, torch.ones(50))
        for name in ("bias", "running_mean"):
            self.register_buffer(name, torch.zeros(50))
        self.register_buffer("table", torch.ones(50))
        self.register_buffer("position_ids", torch.arange(50))


def test_other_buffers_are_left_as_they_are() -> None:
    norm = BufferedBatchNorm()
    randomize(norm)
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert norm.get_buffer(name).std() > 0.2, name
    assert torch.equal(norm.get_buffer("table"), torch.ones(50))
    assert torch.equal(norm.get_buffer("position_ids"), torch.arange(50))


def test_outputs_of_convolutions_have_one_scale() -> None:
    noise = float_noise(4, 12, 20, 20)
    for conv in (
        nn.Conv2d(12, 30, 3, bias=False),
        nn.Conv2d(12, 30, 3, groups=3, bias=False),
        nn.ConvTranspose2d(12, 30, 4, stride=2, bias=False),
        nn.ConvTranspose2d(12, 30, 3, groups=3, bias=False),
    ):
        randomize(conv)
        inside = conv(noise)[..., 4:-4, 4:-4]
        assert 1.2 < inside.std() < 1.8, conv
    for other in (nn.Conv1d(12, 30, 3), nn.Conv3d(12, 30, 3)):
        randomize(other)
        assert 0.9 < other.weight.std() * other.weight[0].numel() ** 0.5 / 1.5 < 1.1


class Tied(nn.Module):
    """Numbers, an embedding with padding, and a Linear that shares its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 40, padding_idx=0)
        self.output = nn.Linear(40, 300)
        self.output.weight = self.table.weight
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.logit_bias = nn.Parameter(torch.zeros(()))
        self.register_parameter("counts", nn.Parameter(torch.arange(3), requires_grad=False))


def test_shared_weights_padding_and_numbers() -> None:
    model = Tied()
    randomize(model)
    assert model.output.weight is model.table.weight
    assert 0.65 < model.table.weight.std() < 0.75  # as an embedding, drawn once
    assert model.table.weight[0].abs().min() > 0
    assert 0.5 < model.logit_scale < 2.5
    assert model.logit_bias != 0
    assert torch.equal(model.get_parameter("counts"), torch.arange(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_parameter_is_one_after_rounding(dtype: torch.dtype) -> None:
    norm = nn.LayerNorm(20_000).to(dtype)
    randomize(norm)
    assert norm.weight.dtype == dtype
    for parameter in norm.parameters():
        assert not ((parameter == 0) | (parameter == 1)).any()

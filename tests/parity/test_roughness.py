from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from siglip_port.parity import bounds
from siglip_port.parity.roughness import roughness
from siglip_port.parity.sides import Inputs, Side
from tests.parity.toy_models import float_noise

VECTORS = float_noise(3, 6).double()
IDS = torch.tensor([[0, 3], [2, 1]])


def is_rough(module: nn.Module, inputs: Inputs, *, from_outputs: bool) -> bool:
    """Whether steps of a module in float64 are less precise."""
    side = Side(module.double())
    outputs = side.run(inputs) if from_outputs else None
    sizes = roughness(side, inputs, outputs)
    return not all(bounds.within_float64_bound(size) for size in sizes.values())


class Narrow(nn.Module):
    """Rounds to float32 before or after a module."""

    def __init__(self, module: nn.Module, *, first: bool) -> None:
        super().__init__()
        self.module = module
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.module(x.float().double() if self.first else x)
        return output if self.first else output.float().double()


@pytest.mark.parametrize("from_outputs", [False, True])
def test_float64_is_smooth(from_outputs: bool) -> None:
    linear = nn.Sequential(nn.Linear(6, 4), nn.GELU())
    assert not is_rough(linear, VECTORS, from_outputs=from_outputs)
    assert is_rough(Narrow(linear, first=False), VECTORS, from_outputs=from_outputs)


def test_inputs_rounded_at_once_are_seen_from_other_inputs() -> None:
    linear = nn.Linear(6, 4)
    assert is_rough(Narrow(linear, first=True), VECTORS, from_outputs=False)


def test_weights_are_perturbed_for_integer_inputs() -> None:
    table = nn.Embedding(4, 6).double()
    weight = table.weight.detach().clone()
    assert not is_rough(table, IDS, from_outputs=False)
    assert is_rough(Narrow(table, first=False), IDS, from_outputs=False)
    assert torch.equal(table.weight, weight)


def test_integers_are_left_out() -> None:
    side = Side(lambda x: {"ids": x.argmax(-1), "values": x})
    assert roughness(side, VECTORS).keys() == {"values"}

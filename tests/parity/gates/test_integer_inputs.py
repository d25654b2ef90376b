from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from siglip_port.parity.gates.integer_inputs import check_integer_inputs
from siglip_port.parity.results import Finding
from siglip_port.parity.sides import Side
from tests.parity.toy_models import float_noise

IDS = torch.tensor([[1, 4, 2, 0, 3], [3, 0, 0, 2, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
Inputs = tuple[Tensor, Tensor]


class Lookup(nn.Module):
    """Mean of the embeddings of the tokens that are not masked."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(float_noise(5, 4))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        vectors: Tensor = self.table(ids) * mask[..., None]
        return vectors.sum(1)


class WithoutMask(Lookup):
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return super().forward(ids, torch.ones_like(mask))


class FirstTokenOnly(Lookup):
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return super().forward(ids[:, :1].expand_as(ids), mask)


class Sizes(nn.Module):
    """Sizes must be those of the tokens."""

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        if int(sizes.sum()) != x.shape[1]:
            raise ValueError("sizes do not match")
        return x * sizes[0]


def check(port: nn.Module, inputs: Inputs = (IDS, MASK)) -> tuple[int, list[Finding]]:
    return check_integer_inputs(Side(port), Side(Lookup()), inputs, torch.float32)


def test_equal_modules_pass() -> None:
    assert check(Lookup()) == (8, [])


def test_inputs_without_integers() -> None:
    side = Side(torch.relu)
    assert check_integer_inputs(side, side, float_noise(2, 3), torch.float32) == (0, [])


@pytest.mark.parametrize(
    ("port", "message"),
    [
        (WithoutMask, "integer input 1, at every 4th position from 0, affect only the reference"),
        (FirstTokenOnly, "integer input 0, at every 4th position from 1, affect only the ref"),
    ],
)
def test_ignored_inputs(port: type[nn.Module], message: str) -> None:
    _, findings = check(port())
    assert any(message in finding.message for finding in findings), findings


def test_positions_that_only_the_port_reads() -> None:
    ids = torch.tensor([[1, 4, 2, 0], [3, 0, 0, 2]])
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1]])

    class ReadsMasked(Lookup):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            read: Tensor = self.table(ids[:, 2])
            return super().forward(ids, mask) + read

    _, findings = check(ReadsMasked(), (ids, mask))
    message = "other values of integer input 0, at every 4th position from 2, affect only the port"
    assert [finding.message for finding in findings] == [message]


def test_values_that_the_reference_refuses_are_left_out() -> None:
    side = Side(Sizes())
    inputs = (float_noise(2, 3), torch.tensor([1, 2]))
    assert check_integer_inputs(side, side, inputs, torch.float32) == (0, [])


def test_constant_tensors_are_left_out() -> None:
    count, findings = check(WithoutMask(), (IDS, torch.ones_like(IDS)))
    assert (count, findings) == (4, [])

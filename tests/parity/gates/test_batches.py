from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from siglip_port.parity.gates.batches import check_batch
from siglip_port.parity.sides import Side
from tests.parity.toy_models import float_noise

VECTORS = float_noise(3, 4)

Function = Callable[[Tensor], Tensor]


def messages(port: Function, reference: Function) -> list[str]:
    """Messages of the findings for one output of two functions of [B, 4]."""
    return [finding.message for finding in check_batch(Side(port), Side(reference), VECTORS)]


def similarities(x: Tensor) -> Tensor:
    """[B, 4] -> [B, B]."""
    return x @ x.T


def minus_mean(x: Tensor) -> Tensor:
    """Subtract the mean of the batch."""
    return x - x.mean(0)


def mean_of_batch(x: Tensor) -> Tensor:
    """A number."""
    return x.square().mean()


def two_rows(x: Tensor) -> Tensor:
    """The first output is the same for every example."""
    return torch.ones_like(x)


@pytest.mark.parametrize("function", [torch.relu, similarities, minus_mean, mean_of_batch])
def test_same_dependence_passes(function: Function) -> None:
    assert messages(function, function) == []


ALONE = "differs between a batch and its examples run one by one"
OTHERWISE = "depends on the other examples of a batch in another way than the reference"


@pytest.mark.parametrize(
    ("port", "reference", "message"),
    [
        (minus_mean, torch.relu, ALONE),
        (lambda x: x + 1e-6 * x.mean(0), lambda x: x, ALONE),
        (lambda x: 2 * minus_mean(x), minus_mean, OTHERWISE),
        (lambda x: x.cummax(0).values, minus_mean, OTHERWISE),
        (lambda x: similarities(x).softmax(1), similarities, OTHERWISE),
        (two_rows, torch.relu, "same output for every example, so equality proves nothing"),
        (two_rows, two_rows, "same output for every example, so equality proves nothing"),
    ],
)
def test_other_dependence_is_found(port: Function, reference: Function, message: str) -> None:
    assert message in messages(port, reference)


def test_float32_inside_is_no_dependence() -> None:
    """A product in float32 may depend on the size of the batch."""

    def run(x: Tensor) -> Tensor:
        factor = 0.7 if len(x) > 1 else 1.3
        return (x.float() * factor / factor).to(x.dtype)

    assert messages(run, lambda x: x) == []
    assert messages(lambda x: x * (1 + 1e-5 * len(x)), lambda x: x) == [ALONE]


def test_constant_output_beside_one_that_varies() -> None:
    def call(_: object, x: Tensor) -> dict[str, Tensor]:
        return {"values": x, "ones": torch.ones_like(x)}

    side = Side(torch.relu, call)
    assert check_batch(side, side, VECTORS) == []


def test_integers() -> None:
    assert messages(lambda x: x.argmax(-1), lambda x: x.argmax(-1)) == []
    findings = messages(lambda x: (x > x.mean(0)).int(), lambda x: (x > 0).int())
    assert findings == [ALONE]

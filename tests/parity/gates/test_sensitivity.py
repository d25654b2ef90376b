from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from siglip_port.parity.gates import check_sensitivity
from siglip_port.parity.results import GateResult
from siglip_port.parity.sides import Side
from tests.parity.toy_models import ToyEncoder, toy_images

Bug = Callable[[Tensor, Tensor], Tensor]
"""Function (input, output) -> wrong output."""


def check(port: Side) -> GateResult:
    return check_sensitivity(port, Side(ToyEncoder()), toy_images())


def broken_model(bug: Bug) -> ToyEncoder:
    model = ToyEncoder()
    model.register_forward_hook(lambda _, args, output: bug(args[0], output))
    return model


def add_noise(x: Tensor, tokens: Tensor) -> Tensor:
    return tokens + torch.randn_like(tokens)


def leak_between_images(x: Tensor, tokens: Tensor) -> Tensor:
    return tokens + tokens.mean(0, keepdim=True)


def repeat_first_image(x: Tensor, tokens: Tensor) -> Tensor:
    return tokens[:1].expand_as(tokens)


def read_ignored_pixel(x: Tensor, tokens: Tensor) -> Tensor:
    return tokens + x[:, :1, -1, -1, None].expand(-1, 4, 8)


def drop_last_token(x: Tensor, tokens: Tensor) -> Tensor:
    return torch.cat([tokens[:, :3], tokens[:, :1]], 1)


def return_nan(x: Tensor, tokens: Tensor) -> Tensor:
    return tokens * torch.nan


def test_equal_models_pass() -> None:
    gate = check(Side(ToyEncoder()))
    assert gate.passed, gate
    assert gate.checked > 3 * 5 * 5


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        (add_noise, "differs between two runs"),
        (leak_between_images, "differs between a batch and its examples run one by one"),
        (repeat_first_image, "same output for every example"),
        (read_ignored_pixel, "positions of input 0 that affect only one side: "),
        (drop_last_token, "positions of input 0 that affect only one side: "),
        (return_nan, "contains NaN or Inf"),
    ],
)
def test_bugs(bug: Bug, message: str) -> None:
    findings = check(Side(broken_model(bug))).findings
    assert any(message in finding.message for finding in findings), findings


def test_unused_parameters() -> None:
    model = ToyEncoder()
    model.surplus = nn.Linear(3, 3)
    findings = check(Side(model)).findings
    assert [finding.port for finding in findings] == ["surplus.weight", "surplus.bias"]


def call_without_gradients(module: nn.Module, inputs: Any) -> dict[str, Tensor]:  # noqa: ANN401
    with torch.no_grad():
        return {"output": module(inputs)}


def test_port_without_gradients_passes() -> None:
    assert check(Side(ToyEncoder(), call_without_gradients)).passed


def test_bugs_of_port_without_gradients() -> None:
    model = broken_model(drop_last_token)
    model.surplus = nn.Linear(3, 3)
    findings = check(Side(model, call_without_gradients)).findings
    locations = {finding.port for finding in findings}
    assert locations == {"surplus.weight", "surplus.bias", "inputs"}


def test_requires_grad_is_restored() -> None:
    model = ToyEncoder().requires_grad_(False)
    assert check(Side(model)).passed
    assert not any(parameter.requires_grad for parameter in model.parameters())


class ShuffledSum(ToyEncoder):
    """Adds the channels in another order in every run, as atomic additions on a GPU do.

    Args:
        noise: Size of an error that is no rounding.
    """

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.noise = noise
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        order = torch.randperm(x.shape[1], generator=self.generator)
        tokens = nn.functional.conv2d(x[:, order], self.conv.weight[:, order], self.conv.bias, 2)
        noise = self.noise * torch.randn(tokens.shape, generator=self.generator).to(tokens)
        normalized: Tensor = self.norm((tokens + noise).flatten(2).transpose(1, 2))
        return normalized


def test_order_of_summation_may_change() -> None:
    port = ShuffledSum()
    assert not torch.equal(port(toy_images()), port(toy_images()))
    assert check(Side(port)).passed


def test_small_noise_is_no_order_of_summation() -> None:
    findings = check(Side(ShuffledSum(noise=1e-8))).findings
    assert any("differs between two runs" in finding.message for finding in findings)

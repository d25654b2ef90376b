"""Tests of the comparison of values: rounding to float32 passes, a bug as small does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from siglip_port.parity.siglip.entrances.subject import Batch, compare, compare_all, compare_bits
from siglip_port.parity.siglip.reference_features import Features

X = torch.rand(50, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5


def exact(x: Tensor) -> Tensor:
    return x.square().sin()


def test_equal_values_pass() -> None:
    assert not [*compare("f", exact, X, exact(X))]


def test_float32_step_passes() -> None:
    assert not [*compare("f", lambda x: exact(x).float().double(), X, exact(X))]


@pytest.mark.parametrize("error", [1e-9, 1e-8, 1e-7, 1e-3])
def test_smooth_errors_are_found(error: float) -> None:
    (finding,) = compare("f", lambda x: exact(x) * (1 + error), X, exact(X))
    assert finding.message == "f: differs in float64, bound 1e-10"
    assert finding.error == pytest.approx(error, rel=1e-3)


def test_float16_step_is_found() -> None:
    assert [*compare("f", lambda x: exact(x).half().double(), X, exact(X))]


def test_nan_is_found() -> None:
    assert [*compare("f", lambda x: exact(x) * torch.nan, X, exact(X))]


def test_other_shape_is_found() -> None:
    (finding,) = compare("f", lambda x: x[:, 1:], X, X)
    assert finding.message == "f: shape [50, 29], expected [50, 30]"


def test_each_value_is_compared() -> None:
    def compute(x: Tensor) -> tuple[Tensor, Tensor]:
        return exact(x), exact(2 * x)

    (finding,) = compare_all(["a", "b"], compute, X, [exact(X), exact(X)])
    assert finding.message.startswith("b: differs")
    (finding,) = compare_all(["a", "b"], lambda x: [x], X, [X, X])
    assert finding.message == "a: the result is a list of 1, expected a tuple of 2"


def test_bits() -> None:
    expected = {"a": torch.ones(2), "b": torch.zeros(2)}
    assert not [*compare_bits("x", expected, expected)]
    for tensors, message in (
        ({"a": torch.ones(2)}, "x: b is missing"),
        ({**expected, "c": torch.ones(1)}, "x: c is only in the port"),
        ({**expected, "a": torch.ones(3)}, "x: a is torch.float32 [3], expected torch.float32 [2]"),
        ({**expected, "a": torch.ones(2) + 1e-7}, "x: a differs bit for bit"),
    ):
        (finding,) = compare_bits("x", tensors, expected)
        assert finding.message == message


def test_padding_is_not_compared() -> None:
    tokens = torch.arange(12.0).reshape(2, 3, 2)
    features = Features(tokens, tokens, (), (), (), tokens)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = Batch("packed", {"pixel_attention_mask": mask}, features)
    assert batch.valid(tokens).tolist() == [[0, 1], [2, 3], [6, 7]]
    assert batch.is_packed

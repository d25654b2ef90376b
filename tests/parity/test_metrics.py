from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from siglip_port.parity.metrics import bits, cosine, relative_error


def test_figures_by_hand() -> None:
    truth = torch.tensor([[3.0, 4.0], [0.0, 5.0]], dtype=torch.float64)
    value = torch.tensor([[3.0, 4.1], [0.0, 5.0]])
    assert relative_error(value, truth) == pytest.approx(0.1 / math.sqrt(50), rel=1e-5)
    assert math.isnan(relative_error(torch.zeros(2, 2), torch.zeros(2, 2)))
    assert math.isnan(relative_error(value * math.nan, truth))


def test_cosine_is_taken_along_the_features() -> None:
    a, b = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    assert cosine(a, b).shape == (2, 5)
    assert cosine(a, b)[1, 2] == pytest.approx(
        float(F.cosine_similarity(a[1, 2].double(), b[1, 2].double(), dim=0))
    )


def test_bits_tell_zeros_apart_and_not_nans() -> None:
    assert not torch.equal(bits(torch.tensor([0.0])), bits(torch.tensor([-0.0])))
    assert torch.equal(bits(torch.tensor([math.nan])), bits(torch.tensor([math.nan])))

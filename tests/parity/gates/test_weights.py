from __future__ import annotations

import pytest
import torch
from torch import Tensor

from siglip_port.parity.gates import check_weights


@pytest.fixture
def reference() -> dict[str, Tensor]:
    return {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([[2.0]])}


@pytest.fixture
def port(reference: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in reference.items()}


Tensors = dict[str, Tensor]


def messages(port: Tensors, reference: Tensors) -> dict[str, str]:
    gate = check_weights(port, reference)
    return {finding.reference: finding.message for finding in gate.findings}


def test_equal_weights_pass(port: Tensors, reference: Tensors) -> None:
    assert check_weights(port, reference).passed


def test_single_bit_difference_fails(port: Tensors, reference: Tensors) -> None:
    port["a"][0] = -0.0
    assert messages(port, reference) == {"a": "1 of 2 elements differ"}


def test_tensors_on_one_side_only(port: Tensors, reference: Tensors) -> None:
    del port["a"]
    port["c"] = torch.ones(1)
    expected = {"a": "only in the reference", "c": "only in the port"}
    assert messages(port, reference) == expected


def test_shared_memory(port: Tensors, reference: Tensors) -> None:
    port["c"] = port["b"]
    reference["c"] = reference["b"].clone()
    expected = {"c": "tensors share memory: b, c; not in the reference"}
    assert messages(port, reference) == expected


def test_tensors_that_the_reference_ties_may_share_memory(
    port: Tensors, reference: Tensors
) -> None:
    reference["c"] = reference["b"]
    port["c"] = port["b"]
    assert messages(port, reference) == {}
    port["d"] = port["b"]
    reference["d"] = reference["b"].clone()
    assert list(messages(port, reference)) == ["d"]


def test_other_dtype(port: Tensors, reference: Tensors) -> None:
    port["b"] = reference["b"].double()
    expected = "has another dtype"
    assert messages(port, reference) == {"b": expected}


def test_other_shape(port: Tensors, reference: Tensors) -> None:
    port["b"] = reference["b"][0].clone()
    expected = "torch.float32 [1] in the port, torch.float32 [1, 1] in the reference"
    assert messages(port, reference) == {"b": expected}

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from siglip_port.parity.gates import check_sensitivity
from siglip_port.parity.nested import map_tensors
from siglip_port.parity.sides import (
    Inputs,
    Side,
    batch_size,
    call_module,
    cast,
    example,
)


class MaskedLinear(nn.Module):
    """Takes several arguments, not all of them tensors, and returns two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, a: Tensor, mask: Tensor, flag: bool = False) -> tuple[Tensor, Tensor]:
        output = self.linear(a) * mask[:, None]
        return output, output * 2 if flag else output


A = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([1, 2])
ALL_INPUTS: tuple[Inputs, ...] = ((A, MASK), {"a": A, "mask": MASK, "flag": True})


def test_call_module_names_outputs() -> None:
    module = MaskedLinear().eval()
    for inputs in ALL_INPUTS:
        assert call_module(module, inputs).keys() == {"output.0", "output.1"}
    assert call_module(module.linear, A).keys() == {"output"}


def test_all_kinds_of_inputs_can_be_compared() -> None:
    side = Side(MaskedLinear().eval())
    for inputs in ALL_INPUTS:
        assert check_sensitivity(side, side, inputs).passed


def test_batch_size() -> None:
    assert [batch_size(inputs) for inputs in (A, *ALL_INPUTS)] == [2, 2, 2]


def test_example_is_batch_of_one() -> None:
    for inputs in ALL_INPUTS:
        assert batch_size(example(inputs, 1)) == 1
    assert torch.equal(call_module(nn.Identity(), example(A, 1))["output"], A[1:])


def test_map_tensors_skips_other_dtypes() -> None:
    by_position = map_tensors((A, MASK), Tensor.double)
    by_name = map_tensors({"a": A, "mask": MASK, "flag": True}, Tensor.double)
    assert isinstance(by_position, tuple)
    assert isinstance(by_name, dict)
    assert by_position[0].dtype == by_name["a"].dtype == torch.float64
    assert by_position[1] is MASK
    assert by_name["mask"] is MASK
    assert by_name["flag"] is True


def test_cast_restores_original_memory() -> None:
    linear = nn.Linear(4, 4)
    address = linear.weight.data_ptr()
    exact = linear.weight.detach().clone()
    with cast(linear, torch.bfloat16, torch.float64):
        assert linear.weight.dtype == torch.float64
        assert torch.equal(linear.weight, exact.bfloat16().double())
    assert linear.weight.data_ptr() == address
    assert torch.equal(linear.weight, exact)


class Nested(NamedTuple):
    """Outputs in a named tuple."""

    first: Tensor
    rest: list[Tensor]


@dataclass
class Fields:
    """Outputs in a dataclass, with a cache that is no output."""

    tokens: Tensor
    inner: Nested
    loss: float
    array: np.ndarray[Any, Any]
    cache: object = None


def test_nested_outputs_are_named() -> None:
    fields = Fields(A, Nested(A, [A, MASK]), 0.5, A.numpy(), object())
    names = ["tokens", "inner.first", "inner.rest.0", "inner.rest.1", "loss", "array"]
    outputs = call_module(lambda x: fields, A)
    assert list(outputs) == names
    assert outputs["loss"].dtype == torch.float64
    assert torch.equal(outputs["array"], A)
    assert list(call_module(lambda x: {"a": (A, {"b": A})}, A)) == ["a.0", "a.1.b"]
    assert list(call_module(lambda x: (A, None, [A]), A)) == ["output.0", "output.2.0"]


def test_outputs_without_axes_get_one() -> None:
    assert Side(lambda x: x.sum()).run(A)["output"].shape == (1,)


def test_no_outputs() -> None:
    with pytest.raises(TypeError, match="function must return tensors, got dict; pass a call"):
        call_module(lambda x: {"cache": None}, A)


def test_example_keeps_what_all_examples_share() -> None:
    positions = torch.arange(4)[None]
    inputs = {"positions": positions, "parts": [A, (MASK, torch.tensor(2.0))], "flag": None}
    assert batch_size(inputs) == 2
    second = example(inputs, 1)
    assert isinstance(second, dict)
    assert second["positions"] is positions
    assert torch.equal(second["parts"][0], A[1:])
    assert torch.equal(second["parts"][1][0], MASK[1:])
    assert second["parts"][1][1] == 2
    assert second["flag"] is None


def test_nested_inputs_keep_their_types() -> None:
    inputs = (Nested(A, [A, MASK]), {"x": A})
    cast_inputs = map_tensors(inputs, Tensor.double)
    assert isinstance(cast_inputs, tuple)
    assert isinstance(cast_inputs[0], Nested)
    assert cast_inputs[0].first.dtype == cast_inputs[0].rest[0].dtype == torch.float64
    assert cast_inputs[0].rest[1] is MASK
    assert cast_inputs[1]["x"].dtype == torch.float64


def test_cast_restores_buffers() -> None:
    norm = nn.BatchNorm1d(4)
    assert norm.running_mean is not None
    exact = norm.running_mean
    with cast(norm, torch.float64):
        assert norm.running_mean.dtype == torch.float64
    assert norm.running_mean is exact
    assert norm.running_mean.dtype == torch.float32


def test_cast_leaves_other_callables_alone() -> None:
    with cast(torch.relu, torch.float64):
        assert torch.relu(A).dtype == torch.float32

from __future__ import annotations

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

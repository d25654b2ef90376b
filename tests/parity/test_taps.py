from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from siglip_port.parity.taps import Tap, expand, record, tap_hooks


class Residual(nn.Module):
    """x + second(x), x = first(...): the sum reads the input of `second`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        output: Tensor = x + self.second(x)
        return output


class Named(nn.Module):
    """Takes its input by keyword, after a flag, and returns a tuple."""

    def forward(self, *, flag: bool = True, hidden_states: Tensor) -> tuple[Tensor, None]:
        return hidden_states * 2, None


def test_points_are_recorded_in_order_of_computation() -> None:
    model = Residual()
    x = torch.randn(2, 3)
    recording = record(model, ["second", "second:input", "first"], lambda: {"output": model(x)})
    assert list(recording.taps) == ["first", "second:input", "second"]
    first = recording.taps["first"]
    assert torch.equal(first, model.first(x))
    assert torch.equal(recording.taps["second:input"], first)
    assert torch.equal(recording.outputs["output"], first + recording.taps["second"])


def test_input_is_replaced_in_residual_connection_too() -> None:
    model = Residual()
    ones = torch.ones(2, 3)
    with torch.inference_mode(), tap_hooks(model, ["second:input"], lambda _, value: ones.clone()):
        assert torch.equal(model(torch.randn(2, 3)), ones + model.second(ones))


def test_output_is_replaced() -> None:
    model = Residual()
    x = torch.randn(2, 3)
    ones = torch.ones(2, 3)
    with torch.inference_mode(), tap_hooks(model, ["second"], lambda point, value: ones):
        assert torch.equal(model(x), model.first(x) + ones)


def test_hooks_are_removed() -> None:
    model = Residual()
    with tap_hooks(model, ["second", "second:input"], lambda point, value: None):
        assert model.second._forward_hooks
        assert model.second._forward_pre_hooks
    assert not model.second._forward_hooks
    assert not model.second._forward_pre_hooks


def test_input_with_overlapping_memory_is_not_modified() -> None:
    """The probe of a pooling head is one vector, expanded to the batch."""
    model = nn.Linear(3, 3)
    probe = torch.randn(1, 3)
    original = probe.clone()
    zeros = torch.zeros(4, 3)
    with torch.inference_mode(), tap_hooks(model, [":input"], lambda point, value: zeros):
        assert torch.equal(model(probe.expand(4, 3)), model.bias.expand(4, 3))
    assert torch.equal(probe, original)


def test_keyword_inputs_and_tuple_outputs() -> None:
    model = Named()
    with torch.inference_mode(), tap_hooks(model, [":input", ""], lambda point, value: value + 1):
        assert torch.equal(model(hidden_states=torch.ones(2))[0], torch.tensor([5.0, 5.0]))


def test_keyword_input_with_overlapping_memory() -> None:
    model = Named()
    zeros = torch.zeros(4)
    with torch.inference_mode(), tap_hooks(model, [":input"], lambda point, value: zeros):
        assert torch.equal(model(hidden_states=torch.ones(1).expand(4))[0], zeros)


def test_consecutive_calls_are_concatenated() -> None:
    model = nn.Linear(3, 3)
    parts = torch.randn(4, 3).chunk(4)
    recording = record(model, [""], lambda: {"output": torch.cat([model(x) for x in parts])})
    assert torch.equal(recording.taps[""], recording.outputs["output"])


def test_expand_block_numbers() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])})
    port = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(3, 3)])})
    assert expand({"layers.{}:input": "blocks.{}:input"}, model, port) == [
        Tap("layers.0:input", "blocks.0:input"),
        Tap("layers.1:input", "blocks.1:input"),
    ]


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        (
            {"firsst": "first"},
            "tap 'firsst': 'first': the reference has no module 'firsst'",
        ),
        ({"first": "third"}, "the port has no module 'third'"),
        ({"first": "x.first"}, "no module 'x.first'; similar modules: first"),
        ({"first:output": "first:inputs"}, "must be one of input, q, k, v, context, got 'inputs'"),
        (
            {"first:q": "first"},
            ":q needs an nn.MultiheadAttention, got a Linear; tap the projection instead",
        ),
        ({"layers.{}": "first"}, r"the reference has no module 'layers.\{\}'"),
    ],
)
def test_unknown_points(taps: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand(taps, Residual(), Residual())


def test_taps_of_modules_that_the_port_lacks() -> None:
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)})
    fused = nn.ModuleDict({"first": nn.Linear(2, 2)})
    points = {"first": "first", "second": "second"}
    with pytest.raises(ValueError, match="the port has no module 'second'"):
        expand(points, model, fused)
    expected = [Tap("first", "first"), Tap("second", "second")]
    assert expand(points, model, fused, is_strict=False) == expected

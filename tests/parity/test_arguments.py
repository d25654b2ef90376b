"""Wrong arguments of `compare` are named in one sentence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from siglip_port.parity import compare
from tests.parity.toy_models import ToyEncoder, toy_images

IMAGES = toy_images()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("foo", "inputs must be a tensor, a tuple .* got str$"),
        (None, "inputs must be .* got NoneType$"),
        (3, "inputs must be .* got int$"),
        ([IMAGES], r"got a list; pass tuple\(inputs\)$"),
        ((), "inputs must contain a tensor, got none"),
        ({"x": None, "flag": "foo"}, "inputs must contain a tensor, got none"),
        ({0: IMAGES}, r"got the key 0; pass a dict .* as a tuple, \(inputs,\)"),
        (IMAGES[:0], r"inputs must not be empty, got a tensor of shape \[0, 3, 5, 5\]"),
        (IMAGES[:1], "inputs must hold at least two examples"),
        (torch.tensor(1.0), "inputs must hold at least two examples"),
        (IMAGES * torch.nan, "inputs must not contain NaN"),
        (IMAGES * 1j, r"inputs must be real numbers, got a tensor of torch.complex64"),
    ],
)
def test_inputs(inputs: Any, message: str) -> None:  # noqa: ANN401 (of a wrong type)
    with pytest.raises(ValueError, match=message):
        compare(ToyEncoder(), ToyEncoder(), inputs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reference": len}, TypeError, "reference must be a torch.nn.Module, got builtin_func"),
        ({"port": None}, TypeError, "port must be a torch.nn.Module or another callable, got None"),
        ({"port": "port.onnx"}, TypeError, "another callable, got str"),
        ({"taps": ["norm"]}, TypeError, "taps must be a dict of points, .* got list"),
        ({"taps": {"norm": None}}, TypeError, "taps must be a dict of strings, got None"),
        ({"taps": {"norm": "norm"}, "port": len}, ValueError, "taps need a port that is a torch"),
        ({"dtype": torch.int8}, ValueError, "dtype must be a floating point torch.dtype or None"),
        ({"dtype": "float32"}, ValueError, "dtype must be .* got 'float32'"),
        (
            {"call_port": lambda module, x: module(x)},
            TypeError,
            "call_port must return tensors by name, got Tensor; return a dict",
        ),
        (
            {"call_reference": lambda module, x: {"tokens": None}},
            TypeError,
            "call_reference must return tensors by name, got NoneType for 'tokens'",
        ),
        (
            {"call_port": lambda module, x: {}},
            TypeError,
            "call_port must return tensors by name, got an empty dict",
        ),
    ],
)
def test_other_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"reference": ToyEncoder(), "port": ToyEncoder(), "inputs": IMAGES}
    arguments |= options
    with pytest.raises(error, match=message):
        compare(**arguments)


def test_one_module_twice() -> None:
    model = ToyEncoder()
    with pytest.raises(ValueError, match="must be two modules, got the same one twice"):
        compare(model, model, IMAGES)


def test_shared_part() -> None:
    model = ToyEncoder()
    port = ToyEncoder()
    port.norm = model.norm
    message = "must not share modules, got norm of the reference as norm of the port, .*deepcopy"
    with pytest.raises(ValueError, match=message):
        compare(model, port, IMAGES)
    with pytest.raises(ValueError, match=r"got the model of the reference as 0 of the port"):
        compare(model, nn.Sequential(model), IMAGES)


def test_shared_tensors_and_copies_may_be_compared() -> None:
    model = ToyEncoder()
    port = ToyEncoder()
    port.conv.weight = model.conv.weight
    port.norm.weight.data = model.norm.weight.data
    assert compare(model, port, IMAGES).equal
    assert model.conv.weight.dtype == torch.float32
    assert compare(model, copy.deepcopy(model), IMAGES).equal


def test_port_that_exits() -> None:
    def leave(x: Tensor) -> Tensor:
        raise SystemExit(3)

    comparison = compare(ToyEncoder(), leave, IMAGES)
    assert not comparison.equal
    assert "the port raises SystemExit: 3" in comparison.verdict


def test_port_that_returns_nothing() -> None:
    comparison = compare(ToyEncoder(), lambda x: None, IMAGES)
    assert not comparison.equal
    assert "must return tensors, got NoneType; pass a call function" in comparison.verdict

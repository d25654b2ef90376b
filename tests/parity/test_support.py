"""Ports that are no module, or do not compute in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from siglip_port.parity import Comparison, compare, randomize
from siglip_port.parity.sides import Inputs
from tests.parity.toy_models import ToyEncoder, float_noise, toy_images


class Linears(nn.Module):
    """Two Linears with a GELU: [B, 6] -> [B, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 4)
        randomize(self)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.fc2(nn.functional.gelu(self.fc1(x)))
        return output


VECTORS = float_noise(3, 6)
NO_MODULE = "not judged: float64, gradients and calls: the port is no torch.nn.Module"


def linears_as_function(scale: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Function with float32 weights, which refuses other dtypes."""
    model = Linears()
    w1, b1, w2, b2 = (parameter.detach() for parameter in model.parameters())

    def run(x: Tensor) -> Tensor:
        hidden = nn.functional.gelu(torch.addmm(b1, x, w1.T))
        return torch.addmm(b2, hidden, w2.T) * scale

    return run


class Engine:
    """Object that runs a model in NumPy and returns an array."""

    def __init__(self, bias: float = 0.0) -> None:
        self.model = ToyEncoder()
        self.bias = bias

    def __call__(self, x: Tensor) -> np.ndarray[Any, Any]:
        assert x.dtype == torch.float32, "float32 expected"
        with torch.no_grad():
            output: np.ndarray[Any, Any] = self.model(x).numpy() + np.float32(self.bias)
        return output


def test_function_is_judged_by_rounding() -> None:
    comparison = compare(Linears(), linears_as_function(), VECTORS)
    assert comparison.equal, comparison
    assert comparison.verdict.endswith(f"; {NO_MODULE}, and refuses float64")
    assert "rounding float32" in comparison.verdict
    assert "numerics" not in comparison.verdict


def test_wrong_function_is_different() -> None:
    comparison = compare(Linears(), linears_as_function(1.001), VECTORS)
    assert not comparison.equal
    assert "rounding error in float32" in comparison.verdict
    assert NO_MODULE in comparison.verdict


def test_function_of_every_dtype_is_judged_in_float64() -> None:
    model = Linears()
    weights = [parameter.detach() for parameter in model.parameters()]

    def run(x: Tensor, scale: float = 1.0) -> Tensor:
        w1, b1, w2, b2 = (weight.to(x.dtype) for weight in weights)
        hidden = nn.functional.gelu(nn.functional.linear(x, w1, b1))
        return nn.functional.linear(hidden, w2, b2) * scale

    comparison = compare(Linears(), run, VECTORS)
    assert comparison.equal, comparison
    assert "numerics (2)" in comparison.verdict
    assert comparison.verdict.endswith(
        "not judged: gradients and calls: the port is no torch.nn.Module"
    )
    assert not compare(Linears(), lambda x: run(x, 1 + 1e-8), VECTORS).equal


def test_object_that_returns_arrays() -> None:
    comparison = compare(ToyEncoder(), Engine(), toy_images())
    assert comparison.equal, comparison
    assert NO_MODULE in comparison.verdict
    assert not compare(ToyEncoder(), Engine(0.01), toy_images()).equal


def test_function_with_leak_between_examples() -> None:
    run = linears_as_function()
    comparison = compare(Linears(), lambda x: run(x) + run(x).mean(0), VECTORS)
    assert "differs between a batch and its examples run one by one" in str(comparison)


def test_function_that_ignores_a_pixel() -> None:
    run = Engine()

    def ignore(x: Tensor) -> np.ndarray[Any, Any]:
        x = x.clone()
        x[:, :, 1, 1] = 0
        return run(x)

    comparison = compare(ToyEncoder(), ignore, toy_images())
    assert "positions of input 0 that affect only one side: 3" in str(comparison)


class Narrow(Linears):
    """Port that casts its inputs to bfloat16, whatever the dtype of its weights is."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.bfloat16()) * self.scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_module_in_bfloat16(dtype: torch.dtype) -> None:
    comparison = compare(Linears().bfloat16(), Narrow(), VECTORS.to(dtype))
    assert comparison.equal, comparison
    reason = "float64, gradients and calls: the port has steps of a fixed dtype (RuntimeError: "
    assert reason in comparison.verdict
    assert "rounding bfloat16" in comparison.verdict
    assert not compare(Linears().bfloat16(), Narrow(1.2), VECTORS.to(dtype)).equal


def test_modules_in_bfloat16_with_float32_inputs() -> None:
    comparison = compare(Linears().bfloat16(), Linears().bfloat16(), VECTORS)
    assert comparison.equal, comparison
    assert "numerics" in comparison.verdict


class WithoutDouble(Linears):
    """Port with an operator that does not support float64."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise NotImplementedError("\"toy_kernel\" not implemented for 'Double'")
        return super().forward(x)


def test_operator_without_float64() -> None:
    comparison = compare(Linears(), WithoutDouble(), VECTORS)
    assert comparison.equal, comparison
    reason = 'an operator of the port does not support it ("toy_kernel" not implemented for \'Do'
    assert reason in comparison.verdict


class WithEngine(Linears):
    """Module that runs an engine, which is lost if the module is cast."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        run = linears_as_function(scale)
        self.run: Callable[[Tensor], Tensor] | None = lambda x: run(x.float()).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.run is None else self.run(x)

    def _apply(self, *args: Any, **options: Any) -> Self:  # noqa: ANN401 (torch's own signature)
        before = [parameter.dtype for parameter in self.parameters()]
        nn.Module._apply(self, *args, **options)
        if before != [parameter.dtype for parameter in self.parameters()]:
            self.run = None
        return self


def test_engine_inside_a_module_is_judged_and_kept() -> None:
    port = WithEngine()
    comparison = compare(Linears(), port, VECTORS)
    assert comparison.equal, comparison
    assert "WithEngine of the port does not keep what it computes with" in comparison.verdict
    assert port.run is not None
    assert not compare(Linears(), WithEngine(1.001), VECTORS).equal


def test_float64_reference_of_float32_function() -> None:
    comparison = compare(Linears().double(), linears_as_function(), VECTORS)
    assert comparison.equal, comparison
    assert "rounding float32" in comparison.verdict
    with pytest.raises(ValueError, match="dtype must not be float64 for a port without it"):
        compare(Linears().double(), lambda x: linears_as_function()(x.float()), VECTORS.double())


class Scores(NamedTuple):
    """Outputs of several kinds."""

    classes: Tensor
    best: dict[str, list[Tensor]]
    loss: Tensor
    empty: None = None


class Classifier(Linears):
    """Returns scores, their argmax, and a loss without axes."""

    def __init__(self, shift: int = 0) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: Tensor) -> Any:  # noqa: ANN401 (outputs of several kinds)
        scores = super().forward(x)
        best = (scores.argmax(-1) + self.shift) % 4
        return Scores(scores, {"ids": [best, best == 0]}, scores.square().mean())


def test_integers_bools_and_scalars_as_outputs() -> None:
    inputs = float_noise(5, 6, seed=1)
    comparison = compare(Classifier(), Classifier(), inputs)
    assert comparison.equal, comparison
    measured = {one.reference for one in comparison.gates[2][1].measurements}
    assert measured == {"classes", "best.ids.0", "best.ids.1", "loss"}
    different = compare(Classifier(), Classifier(1), inputs)
    assert not different.equal
    places = {finding.reference for _, _, finding in different.findings}
    assert "best.ids.0" in places
    assert "classes" not in places


def only_classes(model: nn.Module, x: Inputs) -> Mapping[str, Tensor]:
    return {"best": model(x).best["ids"][0]}


def test_integers_only() -> None:
    inputs = float_noise(5, 6, seed=1)

    def check(port: nn.Module) -> Comparison:
        return compare(
            Classifier(), port, inputs, call_reference=only_classes, call_port=only_classes
        )

    comparison = check(Classifier())
    assert comparison.equal, comparison
    assert not check(Classifier(1)).equal


class WithUnused(Linears):
    """Linears with a parameter that no output depends on."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.ones(size))


def test_parameter_unused_by_both_sides() -> None:
    assert compare(WithUnused(6), WithUnused(6), VECTORS).equal
    comparison = compare(WithUnused(6), WithUnused(7), VECTORS)
    assert "mask_token: does not affect any output" in str(comparison)
    assert not compare(Linears(), WithUnused(6), VECTORS).equal

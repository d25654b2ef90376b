from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from siglip_port.parity import randomize
from siglip_port.parity.hints import explain, explain_output, explain_tap, explain_taps
from siglip_port.parity.observe import run_reference
from siglip_port.parity.sides import Side
from tests.parity.toy_models import ToyEncoder, double_noise, toy_images


def explain_layer(layer: nn.Module, x: Tensor, value: Tensor) -> str:
    """Return the hint for the output of a layer."""
    return explain(nn.ModuleDict({"layer": layer}), "layer", x, {"layer": layer(x)}, value)


def make_layer_norm() -> nn.LayerNorm:
    norm = nn.LayerNorm(32, eps=1e-6).double()
    randomize(norm)
    return norm


def make_linear(width: int = 6) -> nn.Linear:
    linear = nn.Linear(width, width).double()
    randomize(linear)
    return linear


@pytest.mark.parametrize("eps", [2.5e-7, 1e-5, 1e-3, 0.0])
def test_eps_is_fitted(eps: float) -> None:
    norm = make_layer_norm()
    x = double_noise(2, 5, 32)
    norm.eps = eps
    value = norm(x)
    norm.eps = 1e-6
    assert explain_layer(norm, x, value) == f"eps {eps:.3g} instead of 1e-06"


@pytest.mark.parametrize("layer", [make_layer_norm(), make_linear(32)], ids=["norm", "linear"])
def test_close_value_gets_no_hint(layer: nn.Module) -> None:
    x = double_noise(2, 5, 32)
    value = layer(x) * (1 + 1e-3 * double_noise(2, 5, 32, seed=1))
    assert explain_layer(layer, x, value) == ""


def test_linear() -> None:
    linear = make_linear()
    x = double_noise(2, 5, 6)
    right = linear(x)
    for value, hint in [
        (x @ linear.weight.T, "Linear without bias"),
        (x @ linear.weight + linear.bias, "weight transposed"),
        (x @ linear.weight.bfloat16().double().T + linear.bias, "weight rounded to bfloat16"),
        (linear(x.half().double()), "input rounded to float16"),
        (right.flip(1), "tokens reversed"),
        (right.roll(1, 2), "features shifted by 1"),
        (right.transpose(1, 2).reshape(right.shape), "reshaped instead of transposed"),
        (right * 1.5, "scaled by 1.5"),
        (right.float().double(), "cast to float32"),
        (right * 0, "all zeros"),
        (right / 0, "NaN or Inf in the port"),
        (right[:, :4], "shape [2, 4, 6], expected [2, 5, 6]"),
    ]:
        assert explain_layer(linear, x, value.detach()) == hint


def test_weights_of_other_layer() -> None:
    layers = nn.ModuleDict({"one": nn.Linear(6, 6), "other": nn.Linear(6, 6)}).double()
    randomize(layers)
    x = double_noise(2, 5, 6)
    value = layers["other"](x).detach()
    hint = explain(layers, "one", x, {"one": layers["one"](x)}, value)
    assert hint == "weights of other"


def test_value_of_other_tap() -> None:
    layers = nn.ModuleDict({"a": make_layer_norm(), "b": make_layer_norm()})
    taps = {"a": double_noise(2, 5, 32, seed=1), "b": double_noise(2, 5, 32, seed=2)}
    hint = explain(layers, "b", double_noise(2, 5, 32), taps, taps["a"])
    assert hint == "same as the reference at a"


def test_hint_uses_input_of_module() -> None:
    model = ToyEncoder()
    run = run_reference(Side(model), toy_images(), ["conv", "norm"], torch.float32)
    norm = model.norm
    tokens = run.exact.taps["conv"].flatten(2).transpose(1, 2)
    value = nn.functional.layer_norm(tokens, (8,), norm.weight.detach().double(), None, norm.eps)
    assert explain_tap(run, "norm", value) == "LayerNorm bias not applied"
    assert not norm._forward_pre_hooks
    assert norm.weight.dtype == torch.float32


def test_outputs() -> None:
    exact = double_noise(3, 16)
    unit = exact / exact.norm(dim=-1, keepdim=True)
    assert explain_output(unit, exact) == "vectors normalized to norm 1"
    assert explain_output(exact.flip(0), exact) == "images reversed"
    assert explain_output(exact[:, :3], exact) == "shape [3, 3], expected [3, 16]"
    assert explain_output(double_noise(3, 16, seed=1), exact) == ""


def test_guess_that_equals_the_exact_value_is_no_hint() -> None:
    """The value of an equal tap does not explain a difference of 1e-9."""
    layers = nn.ModuleDict({"a": make_layer_norm(), "b": make_layer_norm()})
    x = double_noise(2, 5, 32)
    exact = layers["b"](x).detach()
    taps = {"a": exact.clone(), "b": exact}
    value = exact * (1 + 1e-9 * double_noise(2, 5, 32, seed=1))
    assert explain(layers, "b", x, taps, value) == ""


def test_rounding_beside_a_bug_is_no_hint() -> None:
    """A bug in a float32 layer is not explained by the cast to float32."""
    linear = make_linear()
    x = double_noise(2, 5, 6)
    value = (linear(x) * (1 + 1e-6 * double_noise(2, 5, 6, seed=1))).float().double()
    assert explain_layer(linear, x, value.detach()) == ""
    assert explain_layer(linear, x, linear(x).detach().float().double()) == "cast to float32"


def test_searches_without_result_are_bounded() -> None:
    """A kind of taps that no known bug explains costs a few searches, other kinds get hints."""
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(6)], nn.LayerNorm(6)).eval()
    randomize(model)
    points = [str(i) for i in range(7)]
    run = run_reference(Side(model), double_noise(2, 5, 6), points, torch.float32)
    values = {point: run.exact.taps[point] + double_noise(2, 5, 6, seed=9) for point in points[:5]}
    values["5"] = run.exact.taps["5"] * 2
    values["6"] = run.exact.taps["6"] * 3
    explanations = explain_taps(run, values)
    assert list(explanations) == points
    assert explanations["6"].hint == ""  # the same kind
    assert explanations["0"].missing_taps == ()

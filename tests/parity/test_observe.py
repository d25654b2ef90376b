from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from siglip_port.parity.observe import compare_outputs, compare_run, run_reference
from siglip_port.parity.sides import Side
from tests.parity.toy_models import ToyEncoder, toy_images

POINTS = ["conv", "norm"]


def test_reference_run() -> None:
    run = run_reference(Side(ToyEncoder()), toy_images(), POINTS, torch.bfloat16)
    assert run.points == ["conv", "norm", "output"]
    assert run.exact.outputs["output"].dtype == torch.float64
    assert run.outputs[""]["output"].dtype == torch.bfloat16
    assert all(1e-4 < error.overall < 1e-1 for error in run.noise.values())


def test_noise_is_maximum_over_attentions() -> None:
    model = ToyEncoder()
    current = [""]

    def round_if_coarse(_: nn.Module, args: object, output: Tensor) -> Tensor:
        return output.bfloat16().to(output.dtype) if current == ["coarse"] else output

    model.norm.register_forward_hook(round_if_coarse)

    def set_attention(name: str) -> None:
        current[0] = name

    side = Side(model, attentions=("fine", "coarse"), set_attention=set_attention)
    run = run_reference(side, toy_images(), POINTS, torch.float32)
    fine = run_reference(side, toy_images(), POINTS, torch.float32, attentions=("fine",))
    assert run.noise["norm"].overall > 100 * fine.noise["norm"].overall
    assert run.outputs.keys() == {"fine", "coarse"}
    assert current == ["fine"]


def test_inputs_must_be_finite() -> None:
    with pytest.raises(
        ValueError, match=r"the reference computes NaN or Inf in float64 \(output\)"
    ):
        run_reference(Side(ToyEncoder()), toy_images() * math.nan, POINTS, torch.float32)


def test_float32_step_in_reference() -> None:
    model = ToyEncoder()
    model.norm.register_forward_hook(lambda _, args, output: output.float().to(output.dtype))
    with pytest.raises(ValueError, match="does not compute in float64 throughout"):
        run_reference(Side(model), toy_images(), POINTS, torch.float32)


def test_forced_run_feeds_exact_inputs_to_every_module() -> None:
    reference = run_reference(Side(ToyEncoder()), toy_images(), POINTS, torch.float32)
    port = ToyEncoder()
    assert port.conv.bias is not None
    with torch.no_grad():
        port.conv.bias.zero_()
    points = {point: point for point in POINTS}
    free = compare_run(Side(port), reference.inputs, reference.exact, points)
    forced = compare_run(Side(port), reference.inputs, reference.exact, points, forced=True)
    assert free.errors["norm"].overall > 1e-2
    assert forced.errors["norm"].overall < 1e-6
    assert forced.errors["conv"] == free.errors["conv"]


def test_values_are_captured_on_request() -> None:
    model = ToyEncoder()
    reference = run_reference(Side(model), toy_images(), POINTS, torch.float32)
    points = {point: point for point in POINTS}
    capture = frozenset(["norm"])
    run = compare_run(Side(model), reference.inputs, reference.exact, points, capture=capture)
    assert run.values.keys() == {"norm"}
    assert torch.equal(run.values["norm"], run.outputs["output"])


def test_uncompared_taps() -> None:
    reference = run_reference(Side(ToyEncoder()), toy_images(), POINTS, torch.float32)
    points = {"norm:input": "norm", "absent": "conv"}
    run = compare_run(Side(ToyEncoder()), reference.inputs, reference.exact, points)
    assert run.uncompared == {"conv": "the port never calls this module"}
    points = {"conv": "norm"}
    run = compare_run(Side(ToyEncoder()), reference.inputs, reference.exact, points)
    assert run.uncompared == {"norm": "the port calls this module with other shapes"}


def test_compare_outputs() -> None:
    exact = {"a": torch.ones(2, 3), "b": torch.ones(2, 3)}
    errors = compare_outputs({"a": torch.ones(2, 2)}, exact)
    assert errors == {"a": (math.inf, math.inf)}

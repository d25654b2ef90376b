from __future__ import annotations

import torch
from torch import Tensor, nn

from siglip_port.parity import randomize
from siglip_port.parity.gates import check_numerics, check_rounding
from siglip_port.parity.observe import run_reference
from siglip_port.parity.sides import Side
from siglip_port.parity.taps import Tap
from tests.parity.toy_models import ToyEncoder, float_noise, toy_images

TAPS = [Tap("conv", "conv"), Tap("norm", "norm")]


def test_rounding_bound_comes_from_reference() -> None:
    reference = Side(ToyEncoder())
    run = run_reference(reference, toy_images(), ["conv", "norm"], torch.float32)
    assert check_rounding(reference, run, TAPS).passed
    coarse = ToyEncoder()
    coarse.conv.register_forward_hook(lambda _, args, output: output.bfloat16().to(output.dtype))
    gate = check_rounding(Side(coarse), run, TAPS)
    assert [finding.reference for finding in gate.findings] == ["conv"]
    assert gate.measurements[0].ratio > 100


def test_port_must_be_exact_where_reference_is() -> None:
    """The bound is 0 if the reference does not round."""

    def round_up(_: nn.Module, args: object, output: Tensor) -> Tensor:
        return output * (1 + 2**-23) if output.dtype == torch.float32 else output

    reference = Side(nn.Sequential(nn.Identity()))
    port = nn.Sequential(nn.Identity())
    port[0].register_forward_hook(round_up)
    taps = [Tap("0", "0")]
    run = run_reference(reference, float_noise(2, 4), ["0"], torch.float32)
    assert run.noise["0"] == (0, 0)
    assert check_rounding(reference, run, taps).passed
    gate = check_rounding(Side(port), run, taps)
    assert [finding.reference for finding in gate.findings] == ["0"]
    assert check_numerics(Side(port), run, taps).passed


def test_single_vector_outside_its_bound() -> None:
    """Only the relative error of the worst vector exceeds its bound."""

    def spoil_one_vector(_: nn.Module, args: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[0, 7] *= 1 + 3e-6
        return output

    model = nn.Sequential(nn.Linear(16, 16)).eval()
    randomize(model)
    run = run_reference(Side(model), float_noise(2, 2000, 16), ["0"], torch.float32)
    model[0].register_forward_hook(spoil_one_vector)
    measurement = check_rounding(Side(model), run, [Tap("0", "0")]).measurements[0]
    assert measurement.error <= measurement.bound
    assert measurement.worst > 1
    assert not measurement.passed

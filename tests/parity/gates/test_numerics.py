from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from siglip_port.parity.gates import check_numerics
from siglip_port.parity.observe import ReferenceRun, run_reference
from siglip_port.parity.results import GateResult
from siglip_port.parity.sides import Side
from siglip_port.parity.taps import Tap
from tests.parity.toy_models import ToyEncoder, toy_images

TAPS = [Tap("conv", "conv"), Tap("norm:input", "norm:input"), Tap("norm", "norm")]


def reference_run() -> ReferenceRun:
    points = [tap.reference for tap in TAPS]
    return run_reference(Side(ToyEncoder()), toy_images(), points, torch.float32)


def check(port: nn.Module, *, with_hints: bool = True) -> GateResult:
    return check_numerics(Side(port), reference_run(), TAPS, with_hints=with_hints)


def places(gate: GateResult) -> list[str]:
    return [finding.reference for finding in gate.findings]


def test_equal_models_pass() -> None:
    gate = check(ToyEncoder())
    assert gate.passed, gate
    runs = [measurement.run for measurement in gate.measurements]
    assert runs == ["float64, free-running"] * 4 + ["float64, teacher-forced"] * 4


def test_only_wrong_step_is_reported() -> None:
    """Later steps agree in the teacher-forced run."""
    port = ToyEncoder()
    with torch.no_grad():
        assert port.conv.bias is not None
        port.conv.bias.zero_()
    gate = check(port)
    assert places(gate) == ["conv"]
    assert gate.findings[0].hint == "convolution without bias"
    errors = {m.reference: m.error for m in gate.measurements if m.run == "float64, free-running"}
    assert all(error > 1e-3 for error in errors.values())


def test_without_hints() -> None:
    port = ToyEncoder()
    port.norm.eps = 1e-3
    assert check(port).findings[0].hint == "eps 0.001 instead of 1e-05"
    assert check(port, with_hints=False).findings[0].hint == ""


def test_difference_after_last_tap() -> None:
    port = ToyEncoder()
    port.register_forward_hook(lambda _, args, output: output * 2)
    gate = check(port)
    assert places(gate) == ["output"]
    assert gate.findings[0].hint == "scaled by 2"


def test_nan_is_located() -> None:
    port = ToyEncoder()
    port.norm.register_forward_hook(lambda _, args, output: output * math.nan)
    assert places(check(port)) == ["norm"]


def without_norm_module(self: ToyEncoder, x: Tensor) -> Tensor:
    tokens = self.conv(x).flatten(2).transpose(1, 2)
    return nn.functional.layer_norm(tokens, (8,), self.norm.weight, self.norm.bias, self.norm.eps)


class FusedEncoder(ToyEncoder):
    """Does not call its `norm` module."""

    forward = without_norm_module


def test_fused_module_passes_and_is_uncompared() -> None:
    gate = check(FusedEncoder())
    assert gate.passed
    assert gate.uncompared_taps == ("norm:input", "norm")


def test_wrong_fused_module_is_reported_once() -> None:
    port = FusedEncoder()
    port.norm.eps = 1e-3
    gate = check(port)
    assert places(gate) == ["output"]
    assert "this step includes norm, which the port does not call" in gate.findings[0].message
    assert gate.uncompared_taps == ("norm:input", "norm")


def test_missing_output() -> None:
    port = Side(ToyEncoder(), lambda module, x: {})
    gate = check_numerics(port, reference_run(), TAPS)
    assert gate.findings[0].message == "the port does not return this output"


def test_float32_step_differs_from_bug_of_its_size() -> None:
    port = ToyEncoder()
    port.norm.register_forward_hook(lambda _, args, output: output.float().to(output.dtype))
    gate = check(port)
    assert gate.passed, gate
    assert gate.float32_upcasts == ("norm",)
    port.norm.register_forward_hook(lambda _, args, output: output * (1 + 1e-7))
    assert not check(port).passed


def test_float32_upcasts_are_bounded_by_rounding() -> None:
    port = ToyEncoder()
    port.norm.register_forward_hook(lambda _, args, output: output.float().to(output.dtype))
    bounds = {measurement.bound for measurement in check(port).measurements}
    assert 1e-10 not in bounds
    assert max(bounds) < 1e-5

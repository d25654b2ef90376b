"""Ports with other values inside, fused modules and float32 steps, each right and with a bug."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from siglip_port.parity.gates import check_numerics, check_rounding
from siglip_port.parity.observe import run_reference
from siglip_port.parity.results import Comparison, GateResult, Section
from siglip_port.parity.sides import Side
from siglip_port.parity.taps import Tap
from tests.parity.toy_transformer import (
    BLOCKS,
    WIDTH,
    ToyMLP,
    ToyTransformer,
    toy_run,
    toy_taps,
)

LOW = (torch.bfloat16, torch.float16)


def check(port: nn.Module, taps: list[Tap] | None = None) -> GateResult:
    if taps is None:
        taps = toy_taps()
    run = toy_run(points=[tap.reference for tap in taps])
    return check_numerics(Side(port), run, taps)


def places(gate: GateResult) -> list[str]:
    return [finding.reference for finding in gate.findings]


def hook(module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """Replace the output of a module with a function of it."""
    module.register_forward_hook(lambda _, args, output: function(output))


# --- equivalent ports -----------------------------------------------------------------------------


class TokensReordered(ToyTransformer):
    """Runs the blocks on the tokens in reversed order."""

    def encode(self, x: Tensor) -> Tensor:
        """Run the blocks."""
        return super().encode(x.flip(1)).flip(1)


class ScaleFolded(ToyTransformer):
    """Holds the scale of the attention in the weights of q."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            for block in self.stack:
                block.attention.q.weight.mul_(0.25)
                block.attention.q.bias.mul_(0.25)
                block.attention.scale = 1.0


class FusedLinear(nn.Linear):
    """Linear and GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(super().forward(x))


class ActivationFused(ToyTransformer):
    """Computes GELU inside `fc1`."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.stack:
            fused = FusedLinear(WIDTH, 2 * WIDTH)
            fused.load_state_dict(block.mlp.fc1.state_dict())
            block.mlp.fc1 = fused
            block.mlp.activation = nn.Identity()


class FeaturesPermuted(ToyTransformer):
    """Holds the hidden units of the MLPs in another order."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.stack:
            block.mlp.fc1.weight.data = block.mlp.fc1.weight.data.flip(0).contiguous()
            block.mlp.fc1.bias.data = block.mlp.fc1.bias.data.flip(0).contiguous()
            block.mlp.fc2.weight.data = block.mlp.fc2.weight.data.flip(1).contiguous()


class StreamScaled(ToyTransformer):
    """Keeps the residual stream scaled by 2."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.embed.weight.mul_(2)
            self.embed.bias.mul_(2)
            for block in self.stack:
                for linear in (block.attention.out, block.mlp.fc2):
                    linear.weight.mul_(2)
                    linear.bias.mul_(2)
                for norm in (block.norm1, block.norm2):
                    norm.eps *= 4
            self.norm.eps *= 4


EQUIVALENT = [TokensReordered, ScaleFolded, ActivationFused, FeaturesPermuted, StreamScaled]


@pytest.mark.parametrize("port", EQUIVALENT)
def test_other_values_inside_pass(port: type[ToyTransformer]) -> None:
    gate = check(port())
    assert gate.passed, places(gate)
    assert gate.differing_taps
    assert all(measurement.passed for measurement in gate.measurements)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("port", EQUIVALENT)
def test_other_values_inside_pass_rounding(port: type[ToyTransformer], dtype: torch.dtype) -> None:
    gate = check_rounding(Side(port()), toy_run(dtype), toy_taps())
    assert gate.passed, gate.findings
    assert gate.differing_taps


@pytest.mark.parametrize("port", [TokensReordered, ScaleFolded, ActivationFused, FeaturesPermuted])
def test_bug_beside_other_values(port: type[ToyTransformer]) -> None:
    broken = port()
    broken.stack[1].norm2.eps = 1e-3
    gate = check(broken)
    assert places(gate)[0] == "blocks.1.norm2"
    assert gate.findings[0].hint == "eps 0.001 instead of 1e-05"


def test_bug_after_last_block_beside_other_values() -> None:
    broken = ScaleFolded()
    broken.norm.eps = 1e-3
    assert places(check(broken)) == ["norm"]


def test_differing_taps_are_in_the_verdict() -> None:
    comparison = Comparison((Section("toy", "", (check(ScaleFolded()),)),))
    assert "other values inside, without effect on the outputs: blocks.0" in comparison.verdict


# --- uncompared modules ---------------------------------------------------------------------------


class FusedMLP(ToyMLP):
    """Does not call its modules."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(x, self.fc1.weight, self.fc1.bias)
        x = self.activation(x)
        return nn.functional.linear(x, self.fc2.weight, self.fc2.bias)


def fused_port() -> ToyTransformer:
    port = ToyTransformer()
    for block in port.stack:
        block.mlp.__class__ = FusedMLP
    return port


def test_fused_modules_are_no_suspects() -> None:
    port = fused_port()
    assert check(port).passed
    port.norm.eps = 1e-3
    gate = check(port)
    assert places(gate) == ["norm"]
    assert "blocks.0.mlp.fc1" in gate.uncompared_taps


def test_bug_in_fused_module_is_at_the_step_that_covers_it() -> None:
    port = fused_port()
    port.stack[1].mlp.activation = nn.SiLU()
    gate = check(port)
    assert places(gate) == ["blocks.1.mlp"]
    assert "this step includes blocks.1.mlp.fc1" in gate.findings[0].message


class BlockSkipped(ToyTransformer):
    """Does not call the second block."""

    def encode(self, x: Tensor) -> Tensor:
        """Run the other blocks."""
        encoded: Tensor = self.blocks[2](self.blocks[0](x))
        return encoded


def test_skipped_block_is_a_suspect() -> None:
    gate = check(BlockSkipped())
    assert places(gate)[0] == "blocks.1"
    assert gate.findings[0].message == "the port never calls this module"


def test_missing_taps_are_proposed() -> None:
    port = ToyTransformer()
    port.stack[1].mlp.activation = nn.SiLU()
    taps = [Tap(f"blocks.{i}.mlp", f"blocks.{i}.mlp") for i in range(BLOCKS)]
    gate = check(port, taps)
    assert places(gate) == ["blocks.1.mlp"]
    advice = "tap blocks.1.mlp.fc1 and blocks.1.mlp.activation and blocks.1.mlp.fc2:input"
    assert advice in gate.findings[0].message


def test_outputs_are_in_order_of_computation() -> None:
    points = toy_run().points
    assert points.index("tokens") == points.index("norm") + 1
    assert points[-2:] == ["head", "pooled"]


# --- hints ----------------------------------------------------------------------------------------


def test_every_cause_gets_its_hint() -> None:
    port = ToyTransformer()
    for block in port.stack:
        block.norm1.eps = 1e-3
        block.norm2.eps = 1e-3
    port.stack[-1].mlp.activation = nn.GELU(approximate="tanh")
    hint_by_tap = {finding.reference: finding.hint for finding in check(port).findings}
    assert len(hint_by_tap) == 2 * BLOCKS + 1
    last = hint_by_tap.pop(f"blocks.{BLOCKS - 1}.mlp.fc2:input")
    assert last == "tanh GELU instead of exact (erf) GELU"
    assert set(hint_by_tap.values()) == {"eps 0.001 instead of 1e-05"}


# --- float32 inside a port ------------------------------------------------------------------------


class InFloat32(nn.Module):
    """Computes a module in float32 at every dtype.

    Args:
        inner: The module.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = call_in_float32(self.inner, x)
        return output.to(x.dtype)


def call_in_float32(module: nn.Module, x: Tensor) -> Any:  # noqa: ANN401
    parameters = {name: tensor.float() for name, tensor in module.named_parameters()}
    return functional_call(module, parameters, (x.float(),))


def float32_part(part: str) -> Side:
    """Return a port with one kind of module in float32, or all of it."""
    port = ToyTransformer()
    if part == "all":
        return Side(port, call_in_float32)
    if part == "norm":
        parents: list[nn.Module] = [port]
    else:
        parents = list(port.stack)
    for parent in parents:
        owner = parent.get_submodule(part.rpartition(".")[0])
        name = part.rpartition(".")[2]
        setattr(owner, name, InFloat32(getattr(owner, name)))
    return Side(port)


PARTS = ["norm", "norm1", "mlp.fc1", "mlp", "attention", "all"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("with_taps", [True, False])
def test_float32_parts_pass(part: str, with_taps: bool) -> None:
    taps = toy_taps() if with_taps else []
    run = toy_run(points=[tap.reference for tap in taps])
    gate = check_numerics(float32_part(part), run, taps)
    assert gate.passed, gate.findings
    assert gate.float32_upcasts


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_parts_pass_in_other_dtypes(part: str, dtype: torch.dtype) -> None:
    assert check_numerics(float32_part(part), toy_run(dtype), toy_taps()).passed
    gate = check_rounding(float32_part(part), toy_run(dtype), toy_taps())
    assert gate.passed, gate.findings


@pytest.mark.parametrize("part", PARTS)
def test_small_bug_in_float32_port(part: str) -> None:
    side = float32_part(part)
    for name, module in side.module.named_modules():
        if isinstance(module, nn.LayerNorm) and name.startswith("norm"):
            module.eps = 1.1e-5  # changes its output by about 1e-7
    gate = check_numerics(side, toy_run(), toy_taps())
    assert places(gate) == ["norm"]


def test_float32_step_beside_bug_is_no_finding() -> None:
    side = float32_part("attention")
    side.module.get_submodule("blocks.1.norm2").register_forward_hook(
        lambda _, args, output: output * (1 + 1e-5)
    )
    gate = check_numerics(side, toy_run(), toy_taps())
    assert places(gate) == ["blocks.1.norm2"]
    assert gate.float32_upcasts


class Constants(nn.Module):
    """Adds constants that depend on no input, as positions do.

    Args:
        scale: Function of the table of constants.
    """

    def __init__(self, scale: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale(self.table)


@pytest.mark.parametrize(
    ("scale", "passes"),
    [
        (lambda table: (table.float() * 0.7).to(table.dtype), True),
        (lambda table: table * (0.7 + 1e-7), False),
    ],
)
def test_float32_constants(scale: Callable[[Tensor], Tensor], passes: bool) -> None:
    reference = Side(Constants(lambda table: table * 0.7))
    inputs = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    run = run_reference(reference, inputs, [], torch.float32)
    assert check_numerics(Side(Constants(scale)), run, []).passed == passes


# --- bugs in low precision ------------------------------------------------------------------------


def scale_if_low(factor: float) -> Callable[[Tensor], Tensor]:
    def scale(x: Tensor) -> Tensor:
        return x * factor if x.dtype in LOW else x

    return scale


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("part", ["mlp", "attention", "norm2", "mlp.fc1"])
def test_bug_in_low_precision_only(part: str, dtype: torch.dtype) -> None:
    port = ToyTransformer()
    assert check_rounding(Side(port), toy_run(dtype), toy_taps()).passed
    hook(port.get_submodule(f"blocks.1.{part}"), scale_if_low(1.01))
    assert check_numerics(Side(port), toy_run(dtype), toy_taps()).passed
    gate = check_rounding(Side(port), toy_run(dtype), toy_taps())
    assert places(gate) == [f"blocks.1.{part}"]
    assert "systematic error in" in gate.findings[0].message


@pytest.mark.parametrize("dtype", LOW)
def test_fused_modules_pass_in_low_precision(dtype: torch.dtype) -> None:
    gate = check_rounding(Side(fused_port()), toy_run(dtype), toy_taps())
    assert gate.passed, gate.findings

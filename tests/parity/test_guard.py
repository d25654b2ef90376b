"""An error of the port is a finding; errors of the reference and of the machine are raised."""

from __future__ import annotations

import re
from typing import NoReturn

import pytest
import torch
from torch import Tensor, nn

from siglip_port.parity import compare, guard
from siglip_port.parity.gates import check_sensitivity
from siglip_port.parity.results import GateResult
from siglip_port.parity.sides import Side
from siglip_port.parity.taps import Tap
from tests.parity.toy_models import ToyEncoder, toy_images


class Refusing(nn.LayerNorm):
    """LayerNorm that raises an error."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(8)
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


def refusing_port(error: BaseException) -> ToyEncoder:
    port = ToyEncoder()
    port.norm = Refusing(error).eval()
    return port


def check(port: nn.Module, reference: Side | None = None) -> GateResult:
    reference = reference or Side(ToyEncoder())
    guarded = guard.guard_with_taps(port, [Tap("layernorm", "norm")])
    return guarded.run(
        "sensitivity", lambda: check_sensitivity(Side(port), reference, toy_images())
    )


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("no\nmore"), "RuntimeError: no"),
        (KeyError("a"), "KeyError: 'a'"),
        (ValueError("pixels are NaN"), "ValueError: pixels are NaN"),
        (OSError("no file"), "OSError: no file"),
        (SystemExit(3), "SystemExit: 3"),
        (AssertionError(), "AssertionError (test_guard.py:#, in forward)"),
    ],
)
def test_error_of_port_is_a_finding(error: BaseException, text: str) -> None:
    gate = check(refusing_port(error))
    assert not gate.passed
    (finding,) = gate.findings
    line = re.sub(r"\.py:\d+", ".py:#", str(finding))
    assert line == f"layernorm (port: norm): the port raises {text}"
    assert finding.kind == "error"
    assert gate.bound


def test_good_port_passes() -> None:
    assert check(ToyEncoder()).passed


def test_error_of_the_reference_is_raised() -> None:
    reference = Side(refusing_port(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        check(ToyEncoder(), reference)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_error_of_the_machine_is_raised(error: Exception) -> None:
    with pytest.raises(type(error)):
        check(refusing_port(error))


def test_interrupt_is_raised() -> None:
    def interrupt() -> NoReturn:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guard.Guard(ToyEncoder()).run("weights", interrupt)


def test_gate_that_fails_on_results_of_the_port() -> None:
    """A port without the module `norm` in its results: no frame is the port's."""

    def fail() -> GateResult:
        raise KeyError("pooled")

    gate = guard.Guard(ToyEncoder()).run("rounding bfloat16", fail)
    assert gate.name == "rounding bfloat16"
    place = r"the port raises KeyError: 'pooled' (test_guard.py:"
    assert str(gate.findings[0]).startswith(place)


def test_missing_package_is_no_error_of_the_port() -> None:
    def fail() -> GateResult:
        raise ImportError("no transformers")

    with pytest.raises(ImportError):
        guard.Guard(ToyEncoder()).run("numerics", fail)


def test_parts_of_a_gate_are_joined() -> None:
    port = refusing_port(KeyError("a"))
    result = guard.Guard(port).run(
        "environment",
        lambda: GateResult("environment", 3, ""),
        lambda: check_sensitivity(Side(port), Side(ToyEncoder()), toy_images()),
    )
    assert result.checked == 4
    assert [finding.port for finding in result.findings] == ["norm"]


def test_load() -> None:
    def load(error: Exception | None = None) -> ToyEncoder:
        if error is not None:
            raise error
        return ToyEncoder()

    assert isinstance(guard.load(load), ToyEncoder)
    gate = guard.load(lambda: load(TypeError("no weights")))
    assert isinstance(gate, GateResult)
    text = "loading the port raises TypeError: no weights (test_guard.py:"
    assert str(gate.findings[0]).startswith(text)
    with pytest.raises(OSError, match="disk full"):
        guard.load(lambda: load(OSError("disk full")))


def test_port_that_raises_for_some_inputs_is_different() -> None:
    class OnlyBatches(ToyEncoder):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 1:
                raise AssertionError
            return super().forward(x)

    port = OnlyBatches()
    port.conv.bias = None
    comparison = compare(ToyEncoder(), port, toy_images(), {"conv": "conv", "norm": "norm"})
    texts = [cause.text for cause in comparison.causes]
    assert texts[0].startswith(
        "sensitivity: port: model: the port raises AssertionError (test_guard"
    )
    assert "looks like: convolution without bias" in texts[1]
    assert comparison.verdict.startswith(
        f"DIFFERENT (weights as given): {texts[0]}; also: numerics"
    )
    assert [gate.name for _, gate in comparison.gates][-1] == "rounding float32"

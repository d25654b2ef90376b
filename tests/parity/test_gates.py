"""Each gate on the smallest modules that show what it is for.

What it catches in towers is in test_selftest.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from siglip_port.parity import gates, randomise
from siglip_port.parity.observe import run_reference
from siglip_port.parity.sides import Side, batch_size, call_module, map_tensors
from siglip_port.parity.taps import Tap


class Tower(nn.Module):
    """A convolution whose last column of pixels is ignored, then a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 2, stride=2)
        self.norm = nn.LayerNorm(8)
        randomise(self)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x).flatten(2).transpose(1, 2))
        return out


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def test_environment() -> None:
    tower = Tower()
    assert gates.check_environment({"port": tower}).passed
    tower.norm.train()
    gate = gates.check_environment({"port": tower})
    assert [f.message for f in gate.findings] == [
        "1 modules of the port are in training mode, first norm; call eval()"
    ]
    tower.norm.eval().double()
    assert "2 dtypes" in gates.check_environment({"port": tower}).findings[0].message


@pytest.fixture
def switches() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("switches")
def test_switches_that_bend_results() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert [f.message for f in gates.check_environment({}).findings] == [
            "autocast is True, expected False"
        ]
    torch.set_float32_matmul_precision("high")
    assert (
        "the float32 matmul precision is high, expected highest"
        in gates.check_environment({}).findings[0].message
    )
    torch.set_float32_matmul_precision("highest")
    torch.set_default_dtype(torch.float64)
    assert "the default dtype is torch.float64" in gates.check_environment({}).findings[0].message


def test_config() -> None:
    assert gates.check_config({"eps": 1e-6, "more": 1}, {"eps": 1e-6}).passed
    gate = gates.check_config({"eps": 1e-5}, {"eps": 1e-6, "heads": 3})
    assert [f.reference for f in gate.findings] == ["eps", "heads"]
    assert not gates.check_config({}, {}).passed


def test_weights() -> None:
    theirs = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([[2.0]])}
    ours = {name: tensor.clone() for name, tensor in theirs.items()}
    assert gates.check_weights(ours, theirs).passed
    ours["a"][0] = -0.0
    assert [(f.reference, f.message) for f in gates.check_weights(ours, theirs).findings] == [
        ("a", "1 of 2 elements differ")
    ]
    del ours["a"]
    ours["c"] = ours["b"]
    what = {f.reference: f.message for f in gates.check_weights(ours, theirs).findings}
    assert what == {
        "a": "only the reference has it",
        "c": "only the port has it",
        "b": "these share one memory: b, c",
    }
    for other in (theirs["b"].double(), theirs["b"][0]):
        gate = gates.check_weights({"a": theirs["a"], "b": other}, theirs)
        assert "in the port, torch.float32 [1, 1] in the reference" in gate.findings[0].message


def test_liveness(x: Tensor) -> None:
    tower = Tower()
    gate = gates.check_sensitivity(Side(tower), Side(tower), x)
    assert gate.passed, gate
    assert gate.checked > 3 * 5 * 5


def noisy(x: Tensor, out: Tensor) -> Tensor:
    return out + torch.randn_like(out)


def leaking(x: Tensor, out: Tensor) -> Tensor:
    return out + out.mean(0, keepdim=True)


def constant(x: Tensor, out: Tensor) -> Tensor:
    return out[:1].expand_as(out)


def margin(x: Tensor, out: Tensor) -> Tensor:
    return out + x[:, :1, -1, -1, None].expand(-1, 4, 8)


def blind(x: Tensor, out: Tensor) -> Tensor:
    return torch.cat([out[:, :3], out[:, :1]], 1)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (noisy, "is another one each time"),
        (leaking, "of a batch is not that of its pictures one by one"),
        (constant, "it is the same for every input"),
        (margin, "matter to one side and not to the other"),
        (blind, "matter to one side and not to the other"),
    ],
)
def test_what_is_dead_or_mixes(x: Tensor, fault: object, sentence: str) -> None:
    faulty = Tower()
    faulty.register_forward_hook(lambda _, args, out: fault(args[0], out))  # type: ignore[operator]
    findings = gates.check_sensitivity(Side(faulty), Side(Tower()), x).findings
    assert any(sentence in f.message for f in findings), findings


def test_parameters_that_change_nothing(x: Tensor) -> None:
    tower = Tower()
    tower.surplus = nn.Linear(3, 3)
    gate = gates.check_sensitivity(Side(tower), Side(Tower()), x)
    assert [f.port for f in gate.findings] == ["surplus.weight", "surplus.bias"]


def test_a_port_without_gradients_is_alive_and_a_dead_one_is_found_all_the_same(x: Tensor) -> None:
    def frozen(module: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"output": module(inputs)}

    tower = Tower()
    assert gates.check_sensitivity(Side(tower, frozen), Side(Tower()), x).passed
    tower.surplus = nn.Linear(3, 3)
    tower.register_forward_hook(lambda _, args, out: blind(args[0], out))
    findings = gates.check_sensitivity(Side(tower, frozen), Side(Tower()), x).findings
    assert {f.port for f in findings} == {"surplus.weight", "surplus.bias", "inputs"}


TAPS = [Tap("conv", "conv"), Tap("norm", "norm")]


def test_where_the_reference_is_exact_so_must_be_the_port() -> None:
    """A step without rounding has no noise to hide behind."""
    identity = nn.Sequential(nn.Identity())
    wrong = nn.Sequential(nn.Identity())
    wrong[0].register_forward_hook(
        lambda _, args, out: out * (1 + 2**-23) if out.dtype == torch.float32 else out
    )
    inputs = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    truth = run_reference(Side(identity), inputs, ["0"], torch.float32)
    assert truth.noise["0"] == (0, 0)
    assert gates.check_rounding(Side(identity), truth, [Tap("0", "0")]).passed
    gate = gates.check_rounding(Side(wrong), truth, [Tap("0", "0")])
    assert [f.reference for f in gate.findings] == ["0"]
    assert gates.check_numerics(Side(wrong), truth, [Tap("0", "0")]).passed


def test_rounding_is_bounded_by_the_reference_s_own(x: Tensor) -> None:
    tower, coarse = Tower(), Tower()
    truth = run_reference(Side(tower), x, ["conv", "norm"], torch.float32)
    assert gates.check_rounding(Side(tower), truth, TAPS).passed
    coarse.conv.register_forward_hook(lambda _, args, out: out.bfloat16().to(out.dtype))
    gate = gates.check_rounding(Side(coarse), truth, TAPS)
    assert [f.reference for f in gate.findings] == ["conv"]
    assert gate.measurements[0].ratio > 100


def test_one_coarse_vector_among_many_is_seen() -> None:
    """The relative error of the whole hides it; that of the worst vector does not."""
    tower = nn.Sequential(nn.Linear(16, 16)).eval()
    randomise(tower)
    inputs = torch.randn(2, 2000, 16, generator=torch.Generator().manual_seed(0))
    truth = run_reference(Side(tower), inputs, ["0"], torch.float32)

    def coarse(_: nn.Module, args: object, out: Tensor) -> Tensor:
        out = out.clone()
        out[0, 7] *= 1 + 3e-6
        return out

    tower[0].register_forward_hook(coarse)
    (m, _) = gates.check_rounding(Side(tower), truth, [Tap("0", "0")]).measurements
    assert m.error <= m.bound
    assert m.worst > 1
    assert not m.passed


def test_inputs_of_all_kinds() -> None:
    class Kinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, a: Tensor, mask: Tensor, flag: bool = False) -> tuple[Tensor, Tensor]:
            out = self.linear(a) * mask[:, None]
            return out, out * 2 if flag else out

    tower = Kinds().eval()
    a, mask = torch.randn(2, 4), torch.tensor([1, 2])
    for inputs in ((a, mask), {"a": a, "mask": mask, "flag": True}):
        assert call_module(tower, inputs).keys() == {"output.0", "output.1"}
        assert gates.check_sensitivity(Side(tower), Side(tower), inputs).passed
        assert batch_size(inputs) == 2
    assert map_tensors((a, mask), Tensor.double)[1] is mask
    assert map_tensors({"a": a, "mask": mask}, Tensor.double)["mask"] is mask


def test_every_gate_has_its_meaning() -> None:
    assert list(gates.MEANING) == [
        "pixels",
        "environment",
        "config",
        "weights",
        "liveness",
        "semantics",
        "interface",
        "rounding",
    ]

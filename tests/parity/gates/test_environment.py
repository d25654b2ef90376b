from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from siglip_port.parity import switches
from siglip_port.parity.gates import check_environment, check_shared_modules, check_switches
from siglip_port.parity.gates.environment import exact_switches, isolated
from siglip_port.parity.sides import Side
from siglip_port.parity.taps import Tap
from tests.parity.toy_models import ToyEncoder, toy_images


@pytest.fixture(autouse=True)
def restored_switches() -> Iterator[None]:
    with switches.restored_switches():
        yield


def messages() -> list[str]:
    return [finding.message for finding in check_environment({}).findings]


def test_eval_mode_passes() -> None:
    assert check_environment({"port": ToyEncoder()}).passed


def test_training_mode() -> None:
    model = ToyEncoder()
    model.norm.train()
    gate = check_environment({"port": model})
    assert [finding.message for finding in gate.findings] == [
        "the port is in training mode (modules: 1, first norm); call eval()"
    ]


def test_activation_without_modes_may_be_in_training_mode() -> None:
    model = nn.Sequential(ToyEncoder(), nn.GELU()).eval()
    model[1].train()
    assert check_environment({"port": model}).passed
    model.append(nn.Dropout())
    assert not check_environment({"port": model}).passed


def test_several_dtypes() -> None:
    model = ToyEncoder()
    model.norm.double()
    assert check_environment({"port": model}).findings[0].message == (
        "the port's parameters have 2 dtypes (first of each: torch.float32: conv.weight, "
        "torch.float64: norm.weight), expected one; call to(dtype)"
    )


def set_matmul_precision() -> None:
    torch.set_float32_matmul_precision("high")


def set_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)


def set_default_device() -> None:
    torch.set_default_device("meta")


def set_autocast() -> None:
    torch.set_autocast_enabled("cpu", True)


def set_autocast_on_cuda() -> None:
    torch.set_autocast_enabled("cuda", True)


def set_grad_mode() -> None:
    torch.set_grad_enabled(False)


SETTINGS: dict[Callable[[], None], tuple[str, object, object]] = {
    set_matmul_precision: ("torch.get_float32_matmul_precision()", "highest", "high"),
    set_default_dtype: ("torch.get_default_dtype()", torch.float32, torch.float64),
    set_default_device: ("torch.get_default_device()", "cpu", "meta"),
    set_autocast: ("torch.is_autocast_enabled('cpu')", False, True),
    set_autocast_on_cuda: ("torch.is_autocast_enabled('cuda')", False, True),
    set_grad_mode: ("torch.is_grad_enabled()", True, False),
}


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.__name__)
def test_switch_that_was_set_before(setting: Callable[[], None]) -> None:
    setting()
    name, default, value = SETTINGS[setting]
    assert messages() == [f"{name} is {value} before the port runs, expected {default}"]


class Switching(ToyEncoder):
    """A port that changes a global setting when it runs."""

    def __init__(self, setting: Callable[[], None]) -> None:
        super().__init__()
        self.setting = setting

    def forward(self, x: Tensor) -> Tensor:
        tokens = super().forward(x)
        self.setting()
        return tokens


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.__name__)
def test_switch_that_the_port_changes(setting: Callable[[], None]) -> None:
    before = switches.read_switches()
    gate = check_switches(Side(Switching(setting)), toy_images())
    name, default, value = SETTINGS[setting]
    assert [finding.message for finding in gate.findings] == [
        f"a run of the port changes {name} from {default} to {value}, and does not restore it"
    ]
    assert switches.read_switches() == before


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.__name__)
def test_isolated_port_does_not_reach_the_reference(setting: Callable[[], None]) -> None:
    before = switches.read_switches()
    isolated(Side(Switching(setting))).run(toy_images())
    assert switches.read_switches() == before


def test_port_that_restores_its_switches_passes() -> None:
    class WithAutocast(ToyEncoder):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
                return super().forward(x)

    model = WithAutocast()
    assert check_switches(Side(model), toy_images()).passed
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_port_that_switches_to_training_mode() -> None:
    class Training(ToyEncoder):
        def forward(self, x: Tensor) -> Tensor:
            self.norm.train()
            return super().forward(x)

    (finding,) = check_switches(Side(Training()), toy_images()).findings
    assert str(finding) == "port: norm: a run of the port switches this module to training mode"


def test_exact_switches_report_what_was_set_before() -> None:
    torch.set_float32_matmul_precision("medium")
    with exact_switches():
        assert torch.get_float32_matmul_precision() == "highest"
        assert torch.backends.cudnn.allow_tf32 is False
        expected = (
            "torch.get_float32_matmul_precision() is medium before the port runs, expected highest"
        )
        assert messages() == [expected]
        with exact_switches():
            assert messages() == [expected]
    assert torch.get_float32_matmul_precision() == "medium"
    torch.set_float32_matmul_precision("highest")
    assert messages() == []


def test_default_tf32_of_convolutions_is_no_finding() -> None:
    assert torch.backends.cudnn.allow_tf32
    assert messages() == []
    with exact_switches():
        assert messages() == []
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "fp32_precision"), reason="torch before 2.9")
@pytest.mark.parametrize(
    "path",
    [
        *("fp32_precision", "cuda.matmul.fp32_precision", "cudnn.fp32_precision"),
        *("mkldnn.matmul.fp32_precision", "mkldnn.conv.fp32_precision"),
    ],
)
def test_fp32_precision(path: str) -> None:
    (switch,) = [item for item in switches.SWITCHES if item.name == f"torch.backends.{path}"]
    default = switch.read()
    switch.write("tf32")
    name = f"torch.backends.{path}"
    assert f"{name} is tf32 before the port runs, expected {default}" in messages()
    with exact_switches():
        assert switch.read() == "ieee"
    assert switch.read() == "tf32"


class TwoNorms(nn.Module):
    """Two LayerNorms, one after the other, and two activations, which may be shared."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LayerNorm(8)
        self.second = nn.LayerNorm(8)
        self.activations = nn.ModuleList([nn.GELU()] * 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x))
        return result


def shared(port: nn.Module, reference: nn.Module, taps: list[Tap]) -> list[str]:
    gate = check_shared_modules(Side(port), Side(reference), taps)
    assert gate.checked == len(list(port.named_modules(remove_duplicate=False)))
    return list(map(str, gate.findings))


def test_shared_module() -> None:
    port = TwoNorms()
    assert shared(port, TwoNorms(), []) == []
    port.second = port.first
    expected = "second: the port has one module for this and first, the reference two"
    assert shared(port, TwoNorms(), []) == [expected]
    reference = TwoNorms()
    reference.second = reference.first
    assert shared(port, reference, []) == []


def test_shared_module_named_by_taps() -> None:
    port = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2))})
    port["b"] = port["a"]
    assert shared(port, TwoNorms(), []) == []
    taps = [Tap("first", "a"), Tap("second", "b"), Tap("second:input", "b.0")]
    expected = "second (port: b): the port has one module for this and first, the reference two"
    assert shared(port, TwoNorms(), taps) == [expected]

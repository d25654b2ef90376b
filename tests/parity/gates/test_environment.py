from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from siglip_port.parity.gates import check_environment
from tests.parity.toy_models import ToyEncoder


@pytest.fixture
def restored_switches() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    torch.set_default_dtype(torch.float32)


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


def test_several_dtypes() -> None:
    model = ToyEncoder()
    model.norm.double()
    assert check_environment({"port": model}).findings[0].message == (
        "the port's parameters have 2 dtypes (torch.float32, torch.float64), expected one; call "
        "to(dtype)"
    )


def test_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert messages() == ["autocast is True, expected False"]


@pytest.mark.usefixtures("restored_switches")
def test_matmul_precision() -> None:
    torch.set_float32_matmul_precision("high")
    assert messages() == ["torch.get_float32_matmul_precision() is high, expected highest"]


@pytest.mark.usefixtures("restored_switches")
def test_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    assert messages() == ["torch.get_default_dtype() is torch.float64, expected torch.float32"]

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from siglip_port import SigLipVisionModel
from siglip_port.parity.siglip.cases import (
    ALL_GATES,
    Case,
    noise_images,
    random_case,
    small_cases,
    tensors_by_reference_name,
)
from tests.helpers.checkpoints import SMALL

NAFLEX = replace(SMALL, naflex=True, image_size=24)
LOW_DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module", params=[SMALL, NAFLEX], ids=["fixed", "naflex"])
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    with random_case(request.param, "N1", dtypes=LOW_DTYPES) as case:
        yield case


@pytest.fixture
def port(case: Case) -> SigLipVisionModel:
    return SigLipVisionModel.from_hf(case.source)


def test_port_passes_all_gates(case: Case, port: SigLipVisionModel) -> None:
    results = list(case.check(port))
    names = [*ALL_GATES[:-1], "rounding float32", "rounding bfloat16"]
    assert [result.name for result in results] == names
    assert [result.name for result in results if not result.passed] == []


def test_only_gates_of_case_run(case: Case, port: SigLipVisionModel) -> None:
    subset = replace(case, gates=("config", "weights"))
    assert [result.name for result in subset.check(port)] == ["config", "weights"]


def test_port_is_called_by_function(case: Case, port: SigLipVisionModel) -> None:
    subset = replace(case, gates=("numerics",))
    (result,) = subset.check(port, lambda port, x: {"tokens": port(x)})
    assert [finding.message for finding in result.findings] == [
        "the port does not return this output"
    ]


def test_reference_runs_once(case: Case) -> None:
    assert case.reference_run(torch.float32) is case.reference_run(torch.float32)


def test_tensors_by_reference_name(case: Case, port: SigLipVisionModel) -> None:
    expected = case.reference.state_dict()
    tensors = tensors_by_reference_name(port)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name


def test_noise_images() -> None:
    images = noise_images(SMALL, batch=3)
    assert images.shape == (3, 3, 16, 16)
    assert -1 <= images.min() < -0.9
    assert 0.9 < images.max() < 1
    assert noise_images(NAFLEX).shape == (2, 3, 16, 40)


@pytest.mark.parametrize(("full", "count"), [(False, 4), (True, 12)])
def test_small_cases(full: bool, count: int) -> None:
    cases = list(small_cases(SMALL, "cpu", ("sdpa",), full=full))
    assert len(cases) == count
    with cases[0] as case:
        assert case.attentions == ("sdpa",)
        assert case.reference.model.config.layer_norm_eps == SMALL.layer_norm_eps

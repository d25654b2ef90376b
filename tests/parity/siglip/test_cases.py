from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port.parity.siglip import reference, regimes
from siglip_port.parity.siglip.cases import (
    ALL_GATES,
    Case,
    noise_images,
    port_call,
    port_outputs,
    random_case,
    regime_models,
    small_cases,
    tensors_by_reference_name,
    weight_models,
)
from siglip_port.parity.siglip.regimes import Regime
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


@pytest.mark.parametrize(("full", "count"), [(False, 18), (True, 25)])
def test_small_cases(full: bool, count: int) -> None:
    models = list(small_cases(SMALL, "cpu", ("sdpa",), full=full))
    assert len(models) == count
    with models[0] as (case,):
        assert case.attentions == ("sdpa",)
        assert case.reference.config()["layer_norm_eps"] == SMALL.layer_norm_eps


def test_small_models_are_of_both_kinds() -> None:
    for config in (SMALL, NAFLEX):
        kinds = {model.config.naflex for model in regime_models(config)}
        assert kinds == {False, True}


def test_another_activation_and_eps_than_the_checkpoint() -> None:
    for hidden_act in ("gelu", "gelu_pytorch_tanh"):
        config = replace(SMALL, hidden_act=hidden_act, layer_norm_eps=1e-4)
        models = [*weight_models(config), *regime_models(config)]
        computations = {(m.config.hidden_act, m.config.layer_norm_eps) for m in models}
        assert (hidden_act, 1e-4) in computations
        assert len({act for act, _ in computations}) == len({eps for _, eps in computations}) == 2


@pytest.mark.parametrize("number", range(len(regime_models(SMALL))))
@pytest.mark.parametrize("config", [SMALL, replace(NAFLEX, pooling_head=False, hidden_act="gelu")])
def test_port_passes_in_all_regimes(config: SigLipVisionConfig, number: int) -> None:
    with regime_models(config)[number].load("cpu", ("sdpa", "eager")) as cases:
        port = SigLipVisionModel.from_hf(cases[0].source, **cases[0].load_options)
        for case in cases:
            for result in case.check(port):
                assert result.passed, (case.name, result.findings)
                assert not result.uncompared_taps


def port_that_ignores_mask(port: SigLipVisionModel) -> None:
    port.pooling_head.register_forward_pre_hook(lambda _, args: args[:1])  # type: ignore[union-attr]


def test_difference_in_packed_images_is_located_inside_head() -> None:
    (model,) = [m for m in regime_models(SMALL) if m.name == "NaFlex encoder"]
    with model.load("cpu", ("sdpa",)) as cases:
        port = SigLipVisionModel.from_hf(cases[0].source)
        port_that_ignores_mask(port)
        (case,) = [case for case in cases if case.name == "NaFlex encoder, packed images"]
        (numerics,) = [result for result in case.check(port) if result.name == "numerics"]
    assert [finding.reference for finding in numerics.findings] == ["head.attention:context"]


def test_values_at_padding_are_not_compared() -> None:
    (model,) = [m for m in regime_models(SMALL) if m.name == "NaFlex encoder"]
    with model.load("cpu", ("sdpa",)) as cases:
        port = SigLipVisionModel.from_hf(cases[0].source)
        (case,) = [case for case in cases if case.name == "NaFlex encoder, much padding"]
        defined = reference.find_defined(case.inputs)

        def change_padding(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
            assert defined is not None
            return output.masked_fill(~defined[..., None], 7.0)

        port.transformer.embeddings.register_forward_hook(change_padding)
        assert [result for result in case.check(port) if not result.passed] == []


@pytest.mark.parametrize("arrange", [regimes.to_transposed, regimes.to_slice])
def test_port_gets_arranged_images(
    arrange: Callable[[torch.Tensor], torch.Tensor], case: Case, port: SigLipVisionModel
) -> None:
    seen = []
    port.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    call = port_call(Regime("", case.inputs, arrange=arrange))
    with torch.inference_mode():
        expected = port_outputs(port, case.inputs)
        outputs = call(port, case.inputs)
    assert [images.is_contiguous() for images in seen] == [True, False]
    assert torch.equal(seen[0], seen[1])
    torch.testing.assert_close(outputs["tokens"], expected["tokens"])

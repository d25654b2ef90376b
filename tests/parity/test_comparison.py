"""The comparison must pass what is equal and fail what is not. The second half of that is what most checks lack."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from siglip_port import SigLipVisionModel
from siglip_port.parity import references
from siglip_port.parity.comparison import compare, cosine, differing_weights, measure, relative_error
from siglip_port.parity.references import Attention
from tests.conftest import ODD, SMALL, MakeCheckpoint, pixels
from tests.parity.faults import FAULTS, Fault, block, exact_gelu


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    references.write_random_checkpoint(folder, ODD)
    return folder


def load(
    folder: Path, dtype: torch.dtype = torch.float32, attention: Attention = "sdpa"
) -> tuple[SigLipVisionModel, references.Reference]:
    reference = references.load(folder, pooling_head=True, dtype=dtype, attention=attention)
    return SigLipVisionModel.from_hf(folder, dtype=dtype), reference


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_false_alarm(tmp_path: Path, seed: int, attention: Attention, dtype: torch.dtype) -> None:
    references.write_random_checkpoint(tmp_path, ODD, seed)
    result = compare(*load(tmp_path, dtype, attention), pixels(ODD, seed=seed))
    assert result.equal, result
    rows = [(m.point, m.dtype) for m in result.measurements]
    low = str(dtype).removeprefix("torch.")
    expected = [("tokens", "float64"), ("pooled", "float64")]
    if (dtype, attention) != (torch.float64, "sdpa"):
        expected += [("tokens", low), ("pooled", low)]
    assert rows == expected
    assert result.num_weights == 16 * ODD.num_encoder_blocks + 16


def test_a_headless_checkpoint_is_compared_before_pooling(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint(replace(SMALL, pooling_head=False))
    reference = references.load(folder, pooling_head=False, dtype=torch.float32, attention="sdpa")
    result = compare(SigLipVisionModel.from_hf(folder), reference, pixels(SMALL))
    assert result.equal
    assert {m.point for m in result.measurements} == {"tokens"}


# --- faults: each changes the port in one place, and must be noticed ------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_faults_are_noticed_by_the_outputs_alone(folder: Path, fault: Fault, dtype: torch.dtype) -> None:
    """Also those that change weights: the weights' own check is not what notices them here."""
    port, reference = load(folder, dtype)
    with torch.no_grad():
        fault(port)
    result = compare(port, reference, pixels(ODD))
    assert not result.equal
    assert not all(m.equal for m in result.measurements)


def test_exact_gelu_is_far_outside_while_its_cosine_is_perfect(folder: Path) -> None:
    """A cosine is one minus half the square of a relative error: 0.9999 is a test of errors above 1.4 percent."""
    port, reference = load(folder)
    exact_gelu(port)
    measurements = compare(port, reference, pixels(ODD)).measurements
    for m in measurements:
        assert m.cosine_min > 0.9999
        assert m.error > 30 * m.bound


def test_a_bias_of_the_keys_is_noticed_by_the_weights_alone(folder: Path) -> None:
    """It moves all scores of a query alike, so no output can show it."""
    port, reference = load(folder)
    with torch.no_grad():
        block(port).self_attn.k_proj.bias.add_(1)
    result = compare(port, reference, pixels(ODD))
    assert all(m.equal for m in result.measurements)
    assert result.differing_weights == ["encoder.layers.5.self_attn.k_proj.bias"]
    assert not result.equal


def test_weights_rounded_to_bfloat16_are_noticed(folder: Path) -> None:
    port, reference = load(folder)
    table = port.transformer.embeddings.position_embedding.weight
    table.data = table.data.bfloat16().float()
    assert not any(m.equal for m in compare(port, reference, pixels(ODD)).measurements)


def test_low_precision_inside_float32_is_noticed(folder: Path) -> None:
    """In float64 this port is the reference's equal; it is only that in float32 it rounds more than it may."""
    port, reference = load(folder)
    block(port).self_attn.out_proj.register_forward_pre_hook(
        lambda _, inputs: inputs[0].bfloat16().float() if inputs[0].dtype == torch.float32 else None
    )
    result = compare(port, reference, pixels(ODD))
    assert [m.equal for m in result.measurements] == [True, True, False, False]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_equal_to_nothing(folder: Path, value: float) -> None:
    port, reference = load(folder)
    with torch.no_grad():
        next(iter(port.parameters())).fill_(value)
    assert not any(m.equal for m in compare(port, reference, pixels(ODD)).measurements)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reference_that_is_not_finite_is_no_reference(folder: Path, value: float) -> None:
    port, reference = load(folder)
    with torch.no_grad():
        for model in (port, reference.model):
            next(iter(model.parameters())).fill_(value)
    with pytest.raises(ValueError, match=r"the reference itself gives NaN or infinity \(tokens\)"):
        compare(port, reference, pixels(ODD))


def test_overflow_in_a_narrow_dtype_is_no_verdict(folder: Path) -> None:
    """Both overflow: infinity is not inside an infinite bound."""
    port, reference = load(folder, torch.float16)
    with torch.no_grad():
        port.transformer.post_layernorm.weight.fill_(6e4)
        reference.model.post_layernorm.weight.fill_(6e4)
    with pytest.raises(ValueError, match="the reference itself gives NaN or infinity"):
        compare(port, reference, pixels(ODD))


def test_two_dead_models_are_not_equal(folder: Path) -> None:
    port, reference = load(folder)
    with torch.no_grad():
        for parameter in [*port.parameters(), *reference.model.parameters()]:
            parameter.zero_()
    result = compare(port, reference, pixels(ODD))
    assert not any(m.equal for m in result.measurements)


def test_outputs_of_which_one_side_has_none_are_not_compared(folder: Path) -> None:
    _, reference = load(folder)
    port = SigLipVisionModel.from_hf(folder, pooling_head=False)
    with pytest.raises(ValueError, match="the port gives tokens, but the reference gives tokens, pooled"):
        compare(port, reference, pixels(ODD))


def test_outputs_of_other_shapes_are_not_compared(folder: Path) -> None:
    port, reference = load(folder)
    assert port.pooling_head is not None
    port.pooling_head.register_forward_hook(lambda _, inputs, output: output[:, :-1])
    with pytest.raises(ValueError, match=r"pooled: the port gives torch.float64 of shape \[2, 71\], the reference"):
        compare(port, reference, pixels(ODD))


# --- the figures ---------------------------------------------------------------------------------------------------


def test_cosine_is_taken_along_the_features() -> None:
    a, b = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    assert cosine(a, b).shape == (2, 5)
    assert cosine(a, b)[1, 2] == pytest.approx(float(F.cosine_similarity(a[1, 2].double(), b[1, 2].double(), dim=0)))


def test_figures_by_hand() -> None:
    truth = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    reference = torch.tensor([[3.0, 4.05]])
    port = torch.tensor([[3.0, 4.1]])
    m = measure("pooled", port, reference, truth)
    assert relative_error(reference, truth) == pytest.approx(0.01, rel=1e-5)
    assert (m.error, m.bound, m.max_abs) == pytest.approx((0.02, 0.03, 0.05), rel=1e-5)
    assert m.equal
    assert not measure("pooled", torch.tensor([[3.0, 4.16]]), reference, truth).equal
    exact = measure("pooled", truth, truth, truth)
    assert (exact.error, exact.bound) == (0, 1e-10)


def test_an_infinite_error_is_inside_no_bound() -> None:
    """Both may overflow, and infinity is not more than three times infinity."""
    truth = torch.ones(1, 2, dtype=torch.float64)
    overflown = torch.full((1, 2), math.inf)
    m = measure("pooled", overflown, overflown.clone(), truth)
    assert m.error == m.bound == math.inf
    assert not m.equal


def test_weights_are_compared_as_bits(folder: Path) -> None:
    """A zero of the other sign computes the same and is not the file's; a NaN is equal to itself."""
    port, reference = load(folder)
    with torch.no_grad():
        block(port).mlp.fc1.bias[0] = -0.0
        reference.model.encoder.layers[5].mlp.fc1.bias[0] = 0.0
        block(port).mlp.fc2.bias[0] = math.nan
        reference.model.encoder.layers[5].mlp.fc2.bias[0] = math.nan
    assert differing_weights(port, reference.model) == ["encoder.layers.5.mlp.fc1.bias"]


@dataclass
class Fake:
    """A reference that is no transformers model: the protocol is all that is needed."""

    model: nn.Module
    attention: str = "mine"
    is_exact: bool = False

    def outputs(self, pixel_values: Tensor) -> dict[str, Tensor]:
        with torch.inference_mode():
            return {"tokens": self.model(pixel_values)}

    def to_float64(self) -> Self:
        self.model.double()
        return self


def test_any_reference_will_do_and_its_weights_are_compared_by_name() -> None:
    port = SigLipVisionModel(replace(SMALL, pooling_head=False)).eval()
    result = compare(port, Fake(port), pixels(SMALL))
    assert all(m.equal for m in result.measurements)
    assert len(result.differing_weights) == 2 * len(port.state_dict())  # each side names them its own way
    assert not result.equal

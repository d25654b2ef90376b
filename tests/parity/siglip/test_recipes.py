"""Tests of the recipes at the taps of the reference."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import SiglipVisionModel

from siglip_port.parity.siglip.cases import ODD, random_case
from siglip_port.parity.siglip.recipes import RECIPES, fill
from siglip_port.parity.siglip.reference import hf_config
from tests.helpers import checkpoints


@functools.cache
def taps_of(recipe: str) -> dict[str, Tensor]:
    """Return the reference's taps in float64 on these weights."""
    with random_case(ODD, recipe) as case:
        return case.reference_run(torch.float32).exact.taps


@pytest.mark.parametrize(
    "point",
    [
        "encoder.layers.0.layer_norm1:input",
        "encoder.layers.5.layer_norm2:input",
        "post_layernorm:input",
    ],
)
def test_s1_variances_are_near_eps(point: str) -> None:
    assert 0.1e-6 < float(taps_of("S1")[point].var(-1).median()) < 100e-6


def test_s1_half_of_units_are_in_gelu_tail() -> None:
    hidden = taps_of("S1")["encoder.layers.3.mlp.fc1"]
    is_in_tail = (hidden > -4.2) & (hidden < -2.2)
    assert 0.45 < is_in_tail.double().mean() < 0.6
    tail = torch.linspace(-4, -2.5, 50)
    assert (F.gelu(tail) - F.gelu(tail, approximate="tanh")).abs().max() > 1e-4


@pytest.mark.parametrize("point", ["layer_norm1", "layer_norm2", "self_attn.v_proj"])
def test_l7_adds_large_constants(point: str) -> None:
    name = f"encoder.layers.0.{point}"
    assert taps_of("L7")[name].std() > 30 * taps_of("S1")[name].std()


@pytest.mark.parametrize("point", ["self_attn.q_proj", "mlp.fc1", "self_attn"])
def test_l7_removes_large_constants(point: str) -> None:
    name = f"encoder.layers.0.{point}"
    assert taps_of("L7")[name].std() < 3 * taps_of("S1")[name].std()


def test_l8_scales_last_layer_norm() -> None:
    l7 = taps_of("L7")
    l8 = taps_of("L8")
    assert l8["post_layernorm:input"].std() > 3 * l7["post_layernorm:input"].std()
    assert l8["post_layernorm"].std() < l7["post_layernorm"].std()


def test_default_is_constructor_initialization() -> None:
    model = SiglipVisionModel(hf_config(checkpoints.ODD))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fill(model, "default")
    for name, tensor in model.state_dict().items():
        assert torch.equal(before[name], tensor), name


def test_unknown_recipe() -> None:
    model = torch.nn.Linear(1, 1)
    with pytest.raises(
        ValueError, match="recipe must be one of default, N1, S1, L7, L8, O1, O2, got 'N2'"
    ):
        fill(model, "N2")


def test_every_recipe_has_purpose() -> None:
    assert all(recipe is None or recipe.purpose for recipe in RECIPES.values())

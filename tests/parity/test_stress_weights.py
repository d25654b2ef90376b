from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import SiglipVisionModel

from siglip_port import SigLipVisionModel
from siglip_port.parity.siglip import reference as references
from siglip_port.parity.siglip.cases import ODD as PROOF
from siglip_port.parity.siglip.cases import random_case
from siglip_port.parity.siglip.recipes import RECIPES, fill
from siglip_port.parity.stress_weights import randomise
from tests.helpers.checkpoints import ODD


def test_nothing_is_zero_and_nothing_is_one() -> None:
    model = SigLipVisionModel(ODD)
    randomise(model)
    for name, parameter in model.named_parameters():
        assert not ((parameter == 0) | (parameter == 1)).any(), name
        assert parameter.std() > 0.02, name


def test_the_recipe() -> None:
    torch.manual_seed(0)
    linear, norm, conv = nn.Linear(400, 300), nn.LayerNorm(4000), nn.Conv2d(3, 64, 16)
    attention, table = nn.MultiheadAttention(64, 4), nn.Embedding(64, 64)
    for module in (linear, norm, conv, attention, table):
        randomise(module)
    for tensor, spread in [
        (linear.weight, 400**-0.5),
        (linear.bias, 0.3),
        (norm.bias, 0.5),
        (norm.weight.abs().log(), 0.5),
        (conv.weight, 1.5 * (3 * 16 * 16) ** -0.5),
        (attention.in_proj_weight, 64**-0.5),
        (attention.in_proj_bias, 0.3),
        (attention.out_proj.weight, 64**-0.5),
        (table.weight, 0.7),
    ]:
        assert tensor is not None
        assert abs(tensor.std() / spread - 1) < 5 * tensor.numel() ** -0.5
        assert abs(tensor.mean()) < 5 * spread * tensor.numel() ** -0.5
    assert 0.07 < (norm.weight < 0).float().mean() < 0.13


def test_is_reproducible_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    models = [SigLipVisionModel(ODD) for _ in range(3)]
    after_construction = torch.get_rng_state()
    for model, seed in zip(models, (7, 7, 8), strict=True):
        randomise(model, seed)
    assert torch.equal(torch.get_rng_state(), after_construction)
    assert not torch.equal(before, after_construction)
    first, second, third = (nn.utils.parameters_to_vector(model.parameters()) for model in models)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


# --- what the recipes do, seen at the taps of the reference ---------------------------------------


def taps_of(recipe: str) -> dict[str, Tensor]:
    """What goes through the first block, the last LayerNorm and the head of a tower with these weights."""
    with random_case(PROOF, recipe) as case:
        return case.reference_run(torch.float32).exact.taps


def test_s1_brings_variances_down_to_eps_and_half_of_the_units_into_gelus_tail() -> None:
    taps = taps_of("S1")
    for point in (
        "encoder.layers.0.layer_norm1:input",
        "encoder.layers.5.layer_norm2:input",
        "post_layernorm:input",
    ):
        assert 0.1e-6 < float(taps[point].var(-1).median()) < 100e-6, point
    hidden = taps["encoder.layers.3.mlp.fc1"]
    assert 0.45 < ((hidden > -4.2) & (hidden < -2.2)).double().mean() < 0.6
    tail = torch.linspace(-4, -2.5, 50)
    assert (F.gelu(tail) - F.gelu(tail, approximate="tanh")).abs().max() > 1e-4  # which is why


def test_l7_adds_constants_that_cancel() -> None:
    """Large on the way, and S1-sized again where they have cancelled."""
    s1, l7 = taps_of("S1"), taps_of("L7")
    for large in (
        "encoder.layers.0.layer_norm1",
        "encoder.layers.0.layer_norm2",
        "encoder.layers.0.self_attn.v_proj",
    ):
        assert l7[large].std() > 30 * s1[large].std(), large
    for small in (
        "encoder.layers.0.self_attn.q_proj",
        "encoder.layers.0.mlp.fc1",
        "encoder.layers.0.self_attn",
    ):
        assert l7[small].std() < 3 * s1[small].std(), small


def test_l8_lifts_the_last_layernorm() -> None:
    l7, l8 = taps_of("L7"), taps_of("L8")
    assert l8["post_layernorm:input"].std() > 3 * l7["post_layernorm:input"].std()
    assert l8["post_layernorm"].std() < l7["post_layernorm"].std()


def test_default_is_what_the_constructor_leaves() -> None:
    model = SiglipVisionModel(references.hf_config(ODD))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fill(model, "default")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="recipe must be one of default, N1, S1, L7, L8, got 'N2'"):
        fill(model, "N2")
    assert all(recipe is None or recipe.purpose for recipe in RECIPES.values())

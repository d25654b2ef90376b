"""Tests of outliers: they are at every tap, and clamps are detected where they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from siglip_port import SigLipVisionModel
from siglip_port.model import MultiheadAttention
from siglip_port.parity.siglip.cases import Case, random_case
from tests.helpers.checkpoints import ODD

CONFIG = replace(ODD, num_encoder_blocks=2)
"""Clamped modules that are inside another one are reported first."""


@pytest.fixture(scope="module")
def case() -> Iterator[Case]:
    with random_case(CONFIG, "O1", gates=("numerics",)) as case:
        yield case


def test_every_tap_has_outliers(case: Case) -> None:
    for name, tensor in case.reference_run(torch.float32).exact.taps.items():
        assert tensor.abs().max() > 1000, name
        assert tensor.abs().median() < 30, name


def test_outliers_have_both_signs(case: Case) -> None:
    for name, tensor in case.reference_run(torch.float32).exact.taps.items():
        if not name.endswith("fc2:input"):  # GELU is never below -0.2
            assert tensor.min() < -100, name


MODULES = {
    "transformer.embeddings.patch_embedding": "embeddings.patch_embedding",
    "transformer.embeddings": "embeddings",
    "transformer.encoder.encoder_blocks.0.layer_norm1": "encoder.layers.0.layer_norm1",
    "transformer.encoder.encoder_blocks.0.self_attn.q_proj": "encoder.layers.0.self_attn.q_proj",
    "transformer.encoder.encoder_blocks.0.self_attn.k_proj": "encoder.layers.0.self_attn.k_proj",
    "transformer.encoder.encoder_blocks.1.self_attn.v_proj": "encoder.layers.1.self_attn.v_proj",
    "transformer.encoder.encoder_blocks.1.layer_norm2": "encoder.layers.1.layer_norm2",
    "transformer.encoder.encoder_blocks.1.mlp.fc1": "encoder.layers.1.mlp.fc1",
    "transformer.encoder.encoder_blocks.1.mlp": "encoder.layers.1.mlp",
    "transformer.encoder.encoder_blocks.1": "encoder.layers.1",
    "transformer.post_layernorm": "post_layernorm",
    "pooling_head.attention.q_proj": "head.attention:q",
    "pooling_head.attention.k_proj": "head.attention:k",
    "pooling_head.layernorm": "head.layernorm",
    "pooling_head.mlp.fc2": "head.mlp.fc2",
    "pooling_head": "head",
}
"""Module of the port -> tap of the reference."""


@pytest.mark.parametrize("limit", [20, 1000])
@pytest.mark.parametrize("module", MODULES)
def test_clamp_is_located(case: Case, module: str, limit: float) -> None:
    port = SigLipVisionModel.from_hf(case.source)
    port.get_submodule(module).register_forward_hook(
        lambda _, args, output: output.clamp(-limit, limit)
    )
    (result,) = case.check(port, with_hints=False)
    assert result.findings[0].reference == MODULES[module]


FLOAT16_MODULES = [
    "transformer.encoder.encoder_blocks.0.layer_norm1",
    "transformer.encoder.encoder_blocks.1.mlp.fc1",
    "transformer.encoder.encoder_blocks.1",
    "pooling_head.mlp.fc1",
    "pooling_head",
]


@pytest.fixture(scope="module")
def float16_case() -> Iterator[Case]:
    with random_case(CONFIG, "O2", gates=("rounding",), dtypes=(torch.float16,)) as case:
        yield case


@pytest.mark.parametrize("module", [None, *FLOAT16_MODULES])
def test_clamp_in_float16_only(float16_case: Case, module: str | None) -> None:
    """Squares of larger values are Inf in float16."""
    port = SigLipVisionModel.from_hf(float16_case.source)
    for name in filter(None, [module]):
        port.get_submodule(name).register_forward_hook(
            lambda _, args, output: (
                output.clamp(-256, 256) if output.dtype == torch.float16 else output
            )
        )
    (result,) = float16_case.check(port, with_hints=False)
    assert [finding.port for finding in result.findings][:1] == ([module] if module else [])


@pytest.mark.parametrize("limit", [20, 100, 300])
def test_clamped_scores_are_located(
    case: Case, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attend(attention: MultiheadAttention, q: Tensor, k: Tensor, v: Tensor, _: None) -> Tensor:
        scores: Tensor = q @ k.mT * attention.head_dim**-0.5
        weights: Tensor = scores.clamp(-limit, limit).softmax(-1)
        return weights @ v

    monkeypatch.setattr(MultiheadAttention, "attend", attend)
    (result,) = case.check(SigLipVisionModel.from_hf(case.source), with_hints=False)
    assert [finding.reference for finding in result.findings][:3] == [
        "encoder.layers.0.self_attn.out_proj:input",
        "encoder.layers.1.self_attn.out_proj:input",
        "head.attention:context",
    ]

"""Tests of the names of timm: timm's own models have them, and compute the same with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from siglip_port import SigLipVisionModel
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.siglip import reference
from siglip_port.parity.siglip.cases import tensors_by_reference_name
from siglip_port.parity.siglip.timm_names import to_timm
from tests.helpers.checkpoints import ODD, TANH
from tests.helpers.other_libraries import timm_encoder

CONFIG = replace(ODD, hidden_act=TANH, num_encoder_blocks=2, image_size=42)


def timm_model(*, naflex: bool) -> Any:  # noqa: ANN401 (timm's models are untyped)
    """Build the model of timm with the sizes of `CONFIG`."""
    if not naflex:
        return timm_encoder("vit_so400m_patch16_siglip_512", depth=2, img_size=42)
    return timm.create_model(
        "naflexvit_base_patch16_siglip",
        embed_dim=72,
        depth=2,
        num_heads=4,
        mlp_ratio=1.41,
        patch_size=7,
        pos_embed_grid_size=(6, 6),
        act_layer="gelu_tanh",
        num_classes=0,
    )


@pytest.mark.parametrize("naflex", [False, True])
def test_timm_loads_these_names(naflex: bool, tmp_path: Path) -> None:
    model = timm_model(naflex=naflex)
    fields = reference.fields_of(replace(CONFIG, naflex=naflex))
    reference.write_random_checkpoint(tmp_path, fields, 0, "N1")
    port = SigLipVisionModel.from_hf(tmp_path)
    tensors = to_timm(tensors_by_reference_name(port), naflex=naflex)
    model.load_state_dict(tensors, strict=True)
    images = torch.rand(2, 3, 42, 42, dtype=torch.float64)
    with torch.no_grad():
        expected = model.double().eval()(images)
        assert relative_error(port.double().embed(images), expected) < 1e-10

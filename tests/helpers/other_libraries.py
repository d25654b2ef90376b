"""Models of timm and transformers, and files that they write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import SiglipConfig, SiglipForImageClassification, SiglipModel, SiglipTextConfig

from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.siglip import reference as references
from siglip_port.parity.stress_weights import randomize
from tests.helpers.checkpoints import ODD, SMALL, pixels

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


def timm_encoder(name: str, **sizes: object) -> Any:  # noqa: ANN401 (timm's models are untyped)
    """Build a timm model with the sizes of ODD and random weights."""
    arguments: dict[str, Any] = {
        "embed_dim": 72,
        "depth": 11,
        "num_heads": 4,
        "mlp_ratio": 1.41,
        "img_size": 45,
        "patch_size": 7,
        **sizes,
    }
    model: nn.Module = timm.create_model(name, num_classes=0, **arguments)
    randomize(model)
    return model


def timm_outputs(model: Any) -> Callable[[Tensor], dict[str, Tensor]]:  # noqa: ANN401
    """Return the function for `assert_same_outputs` that runs a timm model."""
    return lambda x: {"tokens": model.forward_features(x), "pooled": model(x)}


@torch.no_grad()
def assert_same_outputs(
    folder: Path, reference: nn.Module, run: Callable[[Tensor], dict[str, Tensor]]
) -> SigLipVisionModel:
    """Load the port and compare its outputs with the reference's on random pixels."""
    for dtype, tolerance in TOLERANCES.items():
        model = SigLipVisionModel.from_hf(folder, dtype=dtype)
        reference.to(dtype).eval()
        pixel_values = pixels(model.config).to(dtype)
        expected = run(pixel_values)
        tokens = model(pixel_values)
        assert relative_error(tokens, expected["tokens"]) <= tolerance
        if "pooled" in expected:
            assert relative_error(model.pool(tokens), expected["pooled"]) <= tolerance
        else:
            assert model.pooling_head is None
    reference.float()
    return SigLipVisionModel.from_hf(folder)


def write_hf_encoder(folder: Path, config: SigLipVisionConfig = ODD) -> dict[str, Tensor]:
    """Write a vision encoder with transformers; return its tensors, without a prefix."""
    references.write_random_checkpoint(folder, config)
    return load_file(folder / "model.safetensors")


def write_two_encoders(
    folder: Path, kind: type[SiglipModel | SiglipForImageClassification]
) -> None:
    """Write a model with image and text encoder with transformers."""
    text = SiglipTextConfig(
        hidden_size=24,
        intermediate_size=30,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=9,
    )
    config = SiglipConfig(text_config=text, vision_config=references.hf_config(SMALL))
    model = kind(config)
    randomize(model)
    model.save_pretrained(folder)

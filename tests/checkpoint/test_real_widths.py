"""One checkpoint a layout at the width of a published model, with its configuration file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port.checkpoint.key_rules import Layout
from siglip_port.checkpoint.layouts import LAYOUTS
from siglip_port.checkpoint.registry import SIZES
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.stress_weights import randomize
from tests.helpers.checkpoints import EXACT

BASE = replace(SIZES["base"], num_encoder_blocks=1)
LARGE = replace(SIZES["large"], num_encoder_blocks=1)
SO400M = replace(SIZES["so400m"], num_encoder_blocks=1)
SO400M_KEYS = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 1,
}


@dataclass(frozen=True)
class Example:
    """A published model, cut to one block.

    Attributes:
        config: Its architecture.
        prefix: Prefix of its names.
        content: Its config.json; None if it has none.
        beside: Shapes of more tensors that are stored.
    """

    config: SigLipVisionConfig
    prefix: str
    content: dict[str, Any] | None = None
    beside: dict[str, tuple[int, ...]] = field(default_factory=dict)


EXAMPLES = {
    "huggingface": Example(  # google/siglip-so400m-patch14-384
        replace(SO400M, image_size=384, patch_size=14, pooling_head=True),
        "vision_model.",
        {
            "architectures": ["SiglipModel"],
            "model_type": "siglip",
            "text_config": {"hidden_size": 1152, "model_type": "siglip_text_model"},
            "vision_config": {
                **SO400M_KEYS,
                "image_size": 384,
                "model_type": "siglip_vision_model",
                "patch_size": 14,
            },
        },
        {"text_model.head.weight": (2, 2), "logit_scale": (1,), "logit_bias": (1,)},
    ),
    "huggingface-naflex": Example(  # google/siglip2-so400m-patch16-naflex
        replace(SO400M, image_size=256, naflex=True, pooling_head=True),
        "vision_model.",
        {
            "architectures": ["Siglip2Model"],
            "model_type": "siglip2",
            "text_config": {"hidden_size": 1152, "model_type": "siglip2_text_model"},
            "vision_config": {**SO400M_KEYS, "model_type": "siglip2_vision_model"},
        },
        {"text_model.head.weight": (2, 2), "logit_scale": (1,), "logit_bias": (1,)},
    ),
    "huggingface-matrix": Example(  # ByteDance-Seed/BAGEL-7B-MoT, on a smaller grid
        replace(SO400M, image_size=224, patch_size=14, interpolation="crop"),
        "vit_model.vision_model.",
        {
            "model_type": "bagel",
            "vit_config": {
                **SO400M_KEYS,
                "image_size": 224,
                "model_type": "siglip_vision_model",
                "num_hidden_layers": 2,  # Its code removes the last one.
                "patch_size": 14,
                "rope": False,
            },
        },
        {"connector.fc1.weight": (2, 1152)},
    ),
    "mlx-janus": Example(  # mlx-community/Janus-Pro-1B
        replace(LARGE, image_size=384, layer_norm_eps=1e-5),
        "vision_model.vision_tower.",
        {
            "model_type": "multi_modality",
            "vision_config": {
                "cls": "CLIPVisionTower",
                "model_type": "vision",
                "params": {
                    "image_size": 384,
                    "model_name": "siglip_large_patch16_384",
                    "select_feature": "same",
                    "select_layer": -1,
                },
            },
        },
        {"aligner.layers.0.weight": (2, 1024)},
    ),
    "mlx": Example(  # PaliGemma
        replace(SO400M, patch_size=14),
        "vision_tower.vision_model.",
        {
            "architectures": ["PaliGemmaForConditionalGeneration"],
            "model_type": "paligemma",
            "hidden_size": 2048,
            "text_config": {"hidden_size": 2048, "model_type": "gemma"},
            "vision_config": {
                **SO400M_KEYS,
                "model_type": "siglip_vision_model",
                "num_image_tokens": 256,
                "patch_size": 14,
                "projection_dim": 2048,
                "vision_use_head": False,
            },
        },
        {"multi_modal_projector.linear.weight": (2, 1152)},
    ),
    "timm": Example(  # timm/ViT-SO400M-14-SigLIP-384
        replace(SO400M, image_size=384, patch_size=14, hidden_act=EXACT, pooling_head=True),
        "",
        {
            "architecture": "vit_so400m_patch14_siglip_384",
            "num_classes": 0,
            "num_features": 1152,
            "global_pool": "map",
            "pretrained_cfg": {
                "tag": "webli",
                "input_size": [3, 384, 384],
                "fixed_input_size": True,
                "interpolation": "bicubic",
                "mean": [0.5, 0.5, 0.5],
                "std": [0.5, 0.5, 0.5],
                "num_classes": 0,
                "first_conv": "patch_embed.proj",
                "classifier": "head",
            },
        },
    ),
    "timm-naflex": Example(  # timm/naflexvit_so400m_patch16_siglip.v2_webli
        replace(SO400M, image_size=256, naflex=True, pooling_head=True),
        "",
        {
            "architecture": "naflexvit_so400m_patch16_siglip",
            "num_classes": 0,
            "num_features": 1152,
            "global_pool": "map",
            "pretrained_cfg": {"tag": "v2_webli", "input_size": [3, 384, 384]},
        },
    ),
    "big_vision": Example(  # webli_en_so400m_384
        replace(SO400M, image_size=384, patch_size=14, pooling_head=True),
        "params/img/",
        beside={"params/txt/head/kernel": (2, 2), "params/t": (1,), "params/b": (1,)},
    ),
    "big_vision-scanned": Example(  # PaliGemma
        replace(SO400M, image_size=224, patch_size=14),
        "params/img/",
        beside={"params/img/head/kernel": (1152, 2), "params/llm/final_norm/scale": (2,)},
    ),
    "big_vision-naflex": Example(  # siglip2_so400m16_naflex
        replace(SO400M, image_size=256, naflex=True, pooling_head=True),
        "params/img/",
        beside={"params/t": (1,), "params/b": (1,)},
    ),
    "big_vision-naflex-scanned": Example(
        replace(SO400M, image_size=256, naflex=True, pooling_head=True),
        "params/img/",
        beside={"params/t": (1,), "params/b": (1,)},
    ),
    "janus": Example(  # deepseek-community/Janus-Pro-1B
        replace(LARGE, image_size=384, hidden_act=EXACT),
        "model.vision_model.",
        {
            "architectures": ["JanusForConditionalGeneration"],
            "model_type": "janus",
            "text_config": {"hidden_size": 2048, "model_type": "llama"},
            "vision_config": {
                "attention_dropout": 0.0,
                "hidden_act": "gelu",
                "hidden_size": 1024,
                "image_size": 384,
                "layer_norm_eps": 1e-06,
                "mlp_ratio": 4.0,
                "model_type": "janus_vision_model",
                "num_attention_heads": 16,
                "num_hidden_layers": 1,
                "patch_size": 16,
                "projection_dim": 2048,
            },
        },
        {"model.aligner.fc1.weight": (2, 1024)},
    ),
    "gemma_pytorch": Example(  # google/gemma-3-4b-it
        replace(SO400M, image_size=896, patch_size=14),
        "siglip_vision_model.",
        beside={"mm_input_projection.weight": (2, 1152)},
    ),
    "nanovlm": Example(  # lusxvr/nanoVLM-222M
        replace(BASE, image_size=224),
        "vision_encoder.",
        {
            "vit_hidden_dim": 768,
            "vit_inter_dim": 3072,
            "vit_patch_size": 16,
            "vit_img_size": 224,
            "vit_n_heads": 12,
            "vit_dropout": 0.0,
            "vit_n_blocks": 1,
            "vit_ln_eps": 1e-06,
            "vit_cls_flag": False,
            "vit_model_type": "google/siglip-base-patch16-224",
            "lm_hidden_dim": 576,
            "lm_n_heads": 9,
            "lm_model_type": "HuggingFaceTB/SmolLM2-135M",
        },
        {"MP.proj.weight": (2, 768), "decoder.norm.weight": (2,)},
    ),
    "moondream": Example(  # vikhyatk/moondream2 from 2025
        replace(SO400M, image_size=378, patch_size=14, layer_norm_eps=1e-5),
        "model.vision.",
        {
            "architectures": ["HfMoondream"],
            "model_type": "moondream1",
            "config": {},
        },
        {"model.vision.proj_mlp.fc1.weight": (2, 2304), "model.text.wte": (2, 2)},
    ),
    "moondream-old": Example(  # vikhyatk/moondream2 from 2024
        replace(SO400M, image_size=378, patch_size=14, layer_norm_eps=1e-5),
        "vision_encoder.encoder.model.visual.",
        {"architectures": ["Moondream"], "model_type": "moondream1", "text_config": {}},
        {"vision_encoder.projection.mlp.fc1.weight": (2, 2304), "text_model.lm_head.bias": (2,)},
    ),
}
"""Layout -> a published model that is stored in it."""


def write_example(folder: Path, layout: Layout, model: SigLipVisionModel) -> Path:
    """Write the files of an example; return what `from_hf` is called with."""
    example = EXAMPLES[layout.name]
    stored = layout.to_stored(
        model.state_dict(),
        model.config.num_encoder_blocks,
        model.config.num_attention_heads,
        layout.rules(model.config.pooling_head),
        example.prefix,
    )
    stored |= {name: torch.ones(shape) for name, shape in example.beside.items()}
    if layout.name.startswith("big_vision"):
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in stored.items()}
        np.savez(folder / "model.npz", **arrays)
        return folder / "model.npz"
    tensors = {name: tensor.contiguous() for name, tensor in stored.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if example.content is not None:
        (folder / "config.json").write_text(json.dumps(example.content))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@torch.no_grad()
def test_real_width(layout: Layout, tmp_path: Path) -> None:
    config = EXAMPLES[layout.name].config
    original = SigLipVisionModel(config).eval()
    randomize(original)
    model = SigLipVisionModel.from_hf(write_example(tmp_path, layout, original))
    assert model.config == config
    assert model.provenance is not None
    assert model.provenance.layout.startswith(layout.title)
    assert sum(model.provenance.ignored.values()) == len(EXAMPLES[layout.name].beside)
    state = original.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    # Tensors in a mapped file are aligned differently, which can change the last bits of a product.
    copy = SigLipVisionModel(model.config).eval()
    copy.load_state_dict(model.state_dict())
    images = torch.rand(1, 3, config.image_size, config.image_size) * 2 - 1
    tokens = original(images)
    assert torch.equal(copy(images), tokens)
    assert relative_error(model(images), tokens) <= 1e-6
    if config.pooling_head:
        assert torch.equal(copy.embed(images), original.embed(images))
    other = SigLipVisionModel(replace(config, num_attention_heads=config.num_attention_heads // 2))
    other.load_state_dict(state)
    assert relative_error(other.eval()(images), tokens) > 1e-3

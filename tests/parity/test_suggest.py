from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from siglip_port.parity import randomize, suggest_taps
from siglip_port.parity.taps import expand
from tests.parity.ports import test_bert, test_clip, test_dinov2, test_resnet, test_whisper
from tests.parity.toy_models import float_noise

IDS = torch.tensor([[48, 11, 7, 49, 0], [48, 25, 41, 5, 49]])
INPUTS: dict[ModuleType, Any] = {
    test_bert: test_bert.token_inputs(),
    test_clip: {"input_ids": IDS, "pixel_values": float_noise(2, 3, 24, 24)},
    test_dinov2: float_noise(2, 3, 24, 48),
    test_resnet: float_noise(2, 3, 32, 40),
    test_whisper: float_noise(2, 8, 20),
}


def call_reference(model: nn.Module, inputs: Any) -> dict[str, Tensor]:  # noqa: ANN401 (of any model)
    """Call a reference; the types of BERT's tokens are its third argument in the port."""
    if isinstance(inputs, dict):
        return {"output": model(**inputs)[0]}
    if isinstance(inputs, tuple):
        ids, mask, types = inputs
        return {"output": model(input_ids=ids, attention_mask=mask, token_type_ids=types)[0]}
    return {"output": model(inputs)[0]}


def suggest(example: ModuleType, port: nn.Module) -> dict[str, str]:
    """Taps for a port of another model, expanded to all blocks."""
    reference = example.reference()
    taps = suggest_taps(reference, port, INPUTS[example], call_reference=call_reference)
    return {tap.reference: tap.port for tap in expand(taps, reference, port)}


EXPECTED = {
    test_bert: {
        "encoder.layer.1.attention.self": "blocks.1.attention.out:input",
        "encoder.layer.1.intermediate.intermediate_act_fn": "blocks.1.mlp.fc2:input",
        "embeddings.LayerNorm:input": "norm:input",
        "encoder.layer.0.output.LayerNorm": "blocks.0.norm2",
    },
    test_clip: {
        "vision_model.embeddings": "vision.pre_norm:input",
        "vision_model.encoder.layers.2.mlp.activation_fn": "vision.blocks.2.mlp.fc2:input",
        "text_model.encoder.layers.1": "text.blocks.1",
        "text_projection": "text_projection",
    },
    test_dinov2: {
        "embeddings": "blocks.0:input",
        "encoder.layer.1.layer_scale2": "blocks.1.scale2",
        "encoder.layer.0.attention.k_proj": "blocks.0.attention.k",
    },
    test_resnet: {
        "embedder.embedder.normalization": "stem.1",
        "encoder.stages.1.layers.0.shortcut.normalization": "stages.1.0.shortcut.1",
        "encoder.stages.1.layers.1.activation": "stages.1.1",
    },
    test_whisper: {
        "conv2:input": "conv2:input",
        "layers.1.self_attn.k_proj": "blocks.1.attention.k",
        "layers.0.activation_fn": "blocks.0.mlp.fc2:input",
    },
}


@pytest.mark.parametrize("example", EXPECTED, ids=lambda example: example.__name__.split("_")[-1])
def test_ports_of_other_models(example: ModuleType) -> None:
    taps = suggest(example, example.make_port())
    assert EXPECTED[example].items() <= taps.items(), taps


def test_fused_projection_is_left_out() -> None:
    taps = suggest(test_bert, test_bert.make_port(fused=True))
    assert not [point for point in taps if point.endswith(("query", "key", "value"))]
    assert taps["encoder.layer.0.attention.output.dense"] == "blocks.0.attention.out"


@pytest.mark.parametrize(
    ("example", "bug"),
    [
        (test_bert, test_bert.tanh_gelu),
        (test_bert, test_bert.types_ignored),
        (test_clip, test_clip.class_token_last),
        (test_clip, test_clip.exact_gelu_in_last_block),
        (test_whisper, test_whisper.features_shifted),
        (test_dinov2, test_dinov2.tanh_gelu),
    ],
)
def test_bug_does_not_hide_its_own_tap(example: ModuleType, bug: Callable[[Any], None]) -> None:
    expected = suggest(example, example.make_port())
    port = example.make_port()
    bug(port)
    assert suggest(example, port) == expected


def test_changed_weights_are_paired_by_names() -> None:
    port = test_dinov2.make_port()
    with torch.no_grad():
        port.get_parameter("blocks.1.attention.q.bias").zero_()
        port.get_parameter("blocks.1.attention.k.bias").zero_()
    taps = suggest(test_dinov2, port)
    assert taps["encoder.layer.1.attention.q_proj"] == "blocks.1.attention.q"
    assert taps["encoder.layer.1.attention.k_proj"] == "blocks.1.attention.k"


def test_without_inputs() -> None:
    taps = suggest_taps(test_dinov2.reference(), test_dinov2.make_port())
    assert taps["encoder.layer.{}.attention"] == "blocks.{}.attention"
    assert taps["encoder.layer.{}.mlp.fc1"] == "blocks.{}.mlp.fc1"
    assert taps["encoder.layer.{}"] == "blocks.{}"
    assert "encoder" not in taps


class Twins(nn.Module):
    """Two Linears of one shape with names that say nothing."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        self.add_module(first, nn.Linear(4, 4))
        self.add_module(second, nn.Linear(4, 4))


def test_ambiguous_modules_are_left_out() -> None:
    reference = Twins("alpha", "beta")
    port = Twins("gamma", "delta")
    randomize(reference, seed=0)
    randomize(port, seed=1)
    assert suggest_taps(reference, port) == {}
    port.load_state_dict(
        {
            name.replace("alpha", "delta").replace("beta", "gamma"): tensor
            for name, tensor in reference.state_dict().items()
        }
    )
    assert suggest_taps(reference, port) == {"alpha": "delta", "beta": "gamma"}


def test_timm_and_transformers() -> None:
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=16,
        patch_size=8,
    )
    reference = ViTModel(config, add_pooling_layer=False).eval()
    randomize(reference)
    port = timm.models.VisionTransformer(
        16, 8, embed_dim=24, depth=3, num_heads=3, num_classes=0, global_pool=""
    ).eval()
    for module in port.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-12
    copy_vit(reference, port)
    taps = suggest_taps(
        reference,
        port,
        float_noise(2, 3, 16, 16),
        call_reference=lambda model, x: {"output": model(x).last_hidden_state},
    )
    assert taps["layers.{}.layernorm_before"] == "blocks.{}.norm1"
    assert taps["layers.{}.mlp.activation_fn"] == "blocks.{}.mlp.act"
    assert taps["layernorm"] == "norm"
    assert "layers.{}.attention.o_proj" in taps


def copy_vit(reference: nn.Module, port: nn.Module) -> None:
    """Copy the weights of transformers' ViT to timm's."""
    renames = {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "attention.o_proj": "attn.proj",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "layers": "blocks",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "layernorm.": "norm.",
    }
    weights = reference.state_dict()
    for i in range(3):
        for kind in ("weight", "bias"):
            parts = [weights.pop(f"layers.{i}.attention.{part}_proj.{kind}") for part in "qkv"]
            weights[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    for old, new in renames.items():
        weights = {name.replace(old, new): tensor for name, tensor in weights.items()}
    port.load_state_dict(weights)


def test_wrong_arguments() -> None:
    model = nn.Linear(2, 2)
    function: Any = call_reference
    text: Any = "images"
    with pytest.raises(ValueError, match="must be two modules, got the same one twice"):
        suggest_taps(model, model)
    with pytest.raises(ValueError, match=r"inputs must be a tensor, .* got str"):
        suggest_taps(model, nn.Linear(2, 2), text)
    with pytest.raises(TypeError, match=r"port must be a torch.nn.Module, got function"):
        suggest_taps(model, function)

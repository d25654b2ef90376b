"""A port of CLIP: two encoders, a causal mask, QuickGELU, and similarities as outputs."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from siglip_port.parity import Comparison, compare, randomize
from tests.parity.ports.common import (
    MLP,
    Attention,
    Bug,
    assert_first,
    change,
    in_float32,
    load,
    suitable,
)
from tests.parity.toy_models import float_noise

END = 49
CONFIG = CLIPConfig(
    text_config={
        "vocab_size": 50,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "max_position_embeddings": 12,
        "bos_token_id": 48,
        "eos_token_id": END,
    },
    vision_config={
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 40,
        "image_size": 24,
        "patch_size": 8,
    },
    projection_dim=16,
    attn_implementation="sdpa",
)


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, heads: int, *, fused: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(24)
        self.attention = Attention(24, heads, fused=fused)
        self.norm2 = nn.LayerNorm(24)
        self.mlp = MLP(24, 40, quick_gelu)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        output: Tensor = x + self.mlp(self.norm2(x))
        return output


class TextEncoder(nn.Module):
    """Token ids [B, N] -> embedding of the token that ends the text, [B, D]."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 24)
        self.positions = nn.Embedding(12, 24)
        self.blocks = nn.ModuleList(Block(3, fused=fused) for _ in range(2))
        self.norm = nn.LayerNorm(24)
        self.future_score = -math.inf

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        x = self.tokens(ids) + self.positions.weight[:length]
        mask = torch.full((length, length), self.future_score, dtype=x.dtype).triu(1)
        for block in self.blocks:
            x = block(x, mask)
        ends = (ids == END).int().argmax(-1)
        output: Tensor = self.norm(x)[torch.arange(len(ids)), ends]
        return output


class VisionEncoder(nn.Module):
    """Images [B, 3, 24, 24] -> embedding of the class token, [B, D]."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.empty(24))
        self.patches = nn.Conv2d(3, 24, 8, stride=8, bias=False)
        self.positions = nn.Embedding(10, 24)
        self.pre_norm = nn.LayerNorm(24)
        self.blocks = nn.ModuleList(Block(2, fused=fused) for _ in range(3))
        self.norm = nn.LayerNorm(24)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(images), 1, -1), patches], 1)
        x = self.pre_norm(tokens + self.positions.weight)
        for block in self.blocks:
            x = block(x)
        output: Tensor = self.norm(x[:, 0])
        return output


@dataclass
class Outputs:
    """Outputs with the names of the reference's."""

    logits_per_image: Tensor
    logits_per_text: Tensor
    text_embeds: Tensor
    image_embeds: Tensor


class Clip(nn.Module):
    """Token ids [T, N] and images [I, 3, 24, 24] -> similarities [I, T]."""

    def __init__(self, *, fused: bool = False) -> None:
        super().__init__()
        self.text = TextEncoder(fused=fused)
        self.vision = VisionEncoder(fused=fused)
        self.text_projection = nn.Linear(24, 16, bias=False)
        self.visual_projection = nn.Linear(24, 16, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(()))

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Outputs:
        texts = F.normalize(self.text_projection(self.text(input_ids)), dim=-1)
        images = F.normalize(self.visual_projection(self.vision(pixel_values)), dim=-1)
        similarities = self.logit_scale.exp() * images @ texts.T
        return Outputs(similarities, similarities.T, texts, images)


RENAMES = {
    "text_model.embeddings.token_embedding": "text.tokens",
    "text_model.embeddings.position_embedding": "text.positions",
    "text_model.encoder.layers": "text.blocks",
    "text_model.final_layer_norm": "text.norm",
    "vision_model.embeddings.class_embedding": "vision.class_token",
    "vision_model.embeddings.patch_embedding": "vision.patches",
    "vision_model.embeddings.position_embedding": "vision.positions",
    "vision_model.pre_layrnorm": "vision.pre_norm",
    "vision_model.encoder.layers": "vision.blocks",
    "vision_model.post_layernorm": "vision.norm",
    "self_attn.out_proj": "attention.out",
    "self_attn.": "attention.",
    "_proj.": ".",
    "layer_norm": "norm",
}
BLOCK_TAPS = {
    "layer_norm1": "norm1",
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.out_proj:input": "attention.out:input",
    "self_attn": "attention",
    "layer_norm2:input": "norm2:input",
    "layer_norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.activation_fn": "mlp.fc2:input",
    "mlp": "mlp",
}
TAPS = {
    "text_model.final_layer_norm": "text.norm",
    "text_projection": "text_projection",
    "vision_model.embeddings": "vision.pre_norm:input",
    "vision_model.pre_layrnorm": "vision.pre_norm",
    "vision_model.post_layernorm": "vision.norm",
    "visual_projection": "visual_projection",
}
for side in ("text", "vision"):
    for point, port_point in BLOCK_TAPS.items():
        TAPS[f"{side}_model.encoder.layers.{{}}.{point}"] = f"{side}.blocks.{{}}.{port_point}"


@functools.cache
def reference() -> CLIPModel:
    model = CLIPModel(CONFIG).eval()
    randomize(model)
    return model


def make_port(*, fused: bool = False) -> Clip:
    port = Clip(fused=fused).eval()
    load(port, reference(), RENAMES)
    return port


def check(port: nn.Module) -> Comparison:
    """Compare on three texts and two images; names of the outputs agree by themselves."""
    ids = torch.tensor([[48, 11, 7, END, 0], [48, 25, 41, 5, END], [48, 9, END, 0, 0]])
    inputs = {"input_ids": ids, "pixel_values": float_noise(2, 3, 24, 24)}

    def call_reference(model: CLIPModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = model(**inputs)
        names = ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")
        return {name: outputs[name] for name in names}

    return compare(reference(), port, inputs, suitable(TAPS, port), call_reference=call_reference)


@pytest.mark.parametrize("fused", [False, True])
def test_equal(fused: bool) -> None:
    comparison = check(make_port(fused=fused))
    assert comparison.equal, comparison


def test_float32_inside_is_equal() -> None:
    port = make_port()
    in_float32(port.get_submodule("vision.blocks.1.norm2"))
    comparison = check(port)
    assert comparison.equal, comparison


def vision_eps(port: Clip) -> None:
    for module in port.vision.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6


def exact_gelu_in_last_block(port: Clip) -> None:
    change(port, "vision.blocks.2.mlp", activation=F.gelu)


def no_causal_mask(port: Clip) -> None:
    port.text.future_score = 0.0


def end_is_last_token(port: Clip) -> None:
    port.text.norm.register_forward_hook(lambda _, args, output: output[:, -1:].expand_as(output))


def class_token_last(port: Clip) -> None:
    def roll(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0].roll(-1, 1),)

    port.vision.pre_norm.register_forward_pre_hook(roll)


def text_leaks_into_next(port: Clip) -> None:
    port.text_projection.register_forward_hook(lambda _, args, output: output + output.mean(0))


def scale_not_exponential(port: Clip) -> None:
    port.logit_scale.data = port.logit_scale.data.log()


@pytest.mark.parametrize(
    ("bug", "place", "hint"),
    [
        (vision_eps, "vision_model.pre_layrnorm", "eps 1e-06 instead of 1e-05"),
        (
            exact_gelu_in_last_block,
            "vision_model.encoder.layers.2.mlp.activation_fn",
            "exact (erf) GELU instead of QuickGELU",
        ),
        (
            no_causal_mask,
            "text_model.encoder.layers.0.self_attn.out_proj:input",
            "mask not applied",
        ),
        (end_is_last_token, "text_model.final_layer_norm", ""),
        (class_token_last, "vision_model.embeddings", ""),
        (text_leaks_into_next, "text_projection", ""),
        (scale_not_exponential, "logits_per_image", "scaled by"),
    ],
)
def test_bugs(bug: Bug, place: str, hint: str) -> None:
    port = make_port()
    bug(port)
    assert_first(check(port), place, hint)


def test_similarities_depend_on_batch_without_false_alarm() -> None:
    """The reference's similarities [I, T] have another shape if examples run one by one."""
    comparison = check(make_port())
    assert "run one by one" not in str(comparison)
    assert comparison.equal, comparison

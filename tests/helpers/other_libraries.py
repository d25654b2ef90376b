"""Models of other libraries, and files as their code writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import transformers
from torch import Tensor, nn
from transformers import SiglipConfig, SiglipForImageClassification, SiglipModel, SiglipTextConfig

from siglip_port import SigLipVisionConfig
from siglip_port.parity.siglip import reference as references
from siglip_port.parity.stress_weights import randomise
from tests.helpers.checkpoints import SMALL

# Sizes as in ODD: nothing divides evenly, nothing is the default.
VISION = {
    "hidden_size": 72,
    "intermediate_size": 101,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 45,
    "patch_size": 7,
}


TEXT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def timm_tower(name: str, **sizes: Any) -> nn.Module:  # noqa: ANN401
    sizes = {
        "embed_dim": 72,
        "depth": 11,
        "num_heads": 4,
        "mlp_ratio": 1.41,
        "img_size": 45,
        "patch_size": 7,
        **sizes,
    }
    tower: nn.Module = timm.create_model(name, num_classes=0, **sizes)
    randomise(tower)
    return tower


def flax(
    config: SigLipVisionConfig, state: dict[str, Tensor], *, scanned: bool
) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of big_vision, by the transforms of its converters and not by our tables.

    {in} einsum by einsum.
    """
    h, d, p = config.num_attention_heads, config.embed_dim, config.patch_size
    s = {name: tensor.double().numpy() for name, tensor in state.items()}
    arrays: dict[str, np.ndarray[Any, Any]] = {}

    def attention(ours: str, flax: str) -> None:
        for name, theirs in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            # y[t, h, e] = sum_i x[t, i] kernel[i, h, e]
            kernel = np.zeros((d, h, d // h))
            for head in range(h):
                kernel[:, head, :] = s[f"{ours}.{name}.weight"][
                    head * (d // h) : (head + 1) * (d // h)
                ].T
            arrays[f"{flax}/{theirs}/kernel"] = kernel
            arrays[f"{flax}/{theirs}/bias"] = s[f"{ours}.{name}.bias"].reshape(h, d // h)
        out = np.zeros((h, d // h, d))
        for head in range(h):
            out[head] = s[f"{ours}.out_proj.weight"][:, head * (d // h) : (head + 1) * (d // h)].T
        arrays[f"{flax}/out/kernel"], arrays[f"{flax}/out/bias"] = out, s[f"{ours}.out_proj.bias"]

    def norm(ours: str, flax: str) -> None:
        arrays[f"{flax}/scale"], arrays[f"{flax}/bias"] = s[f"{ours}.weight"], s[f"{ours}.bias"]

    def mlp(ours: str, flax: str) -> None:
        for i in (1, 2):
            arrays[f"{flax}/Dense_{i - 1}/kernel"] = s[f"{ours}.fc{i}.weight"].T
            arrays[f"{flax}/Dense_{i - 1}/bias"] = s[f"{ours}.fc{i}.bias"]

    conv = s["transformer.embeddings.patch_embedding.weight"]
    kernel = np.zeros((p, p, conv.shape[1], d))
    for y in range(p):
        for x in range(p):
            kernel[y, x] = conv[:, :, y, x].T
    positions = s["transformer.embeddings.position_embedding.weight"]
    side = config.grid_size
    arrays["embedding/kernel"] = kernel.reshape(-1, d) if config.naflex else kernel
    arrays["embedding/bias"] = s["transformer.embeddings.patch_embedding.bias"]
    arrays["pos_embedding"] = positions.reshape(side, side, d) if config.naflex else positions[None]
    for i in range(config.num_encoder_blocks):
        ours, theirs = f"transformer.encoder.encoder_blocks.{i}", f"Transformer/encoderblock_{i}"
        norm(f"{ours}.layer_norm1", f"{theirs}/LayerNorm_0")
        attention(f"{ours}.self_attn", f"{theirs}/MultiHeadDotProductAttention_0")
        norm(f"{ours}.layer_norm2", f"{theirs}/LayerNorm_1")
        mlp(f"{ours}.mlp", f"{theirs}/MlpBlock_0")
    norm("transformer.post_layernorm", "Transformer/encoder_norm")
    if config.pooling_head:
        arrays["MAPHead_0/probe"] = s["pooling_head.probe"]
        attention("pooling_head.attention", "MAPHead_0/MultiHeadDotProductAttention_0")
        norm("pooling_head.layernorm", "MAPHead_0/LayerNorm_0")
        mlp("pooling_head.mlp", "MAPHead_0/MlpBlock_0")
    if scanned:
        first = [name for name in arrays if "encoderblock_0/" in name]
        for name in first:
            blocks = [
                arrays.pop(name.replace("_0/", f"_{i}/", 1))
                for i in range(config.num_encoder_blocks)
            ]
            arrays[name.replace("encoderblock_0/", "encoderblock/")] = np.stack(blocks)
    return arrays


def write_npz(
    path: Path, arrays: dict[str, np.ndarray[Any, Any]], root: str, dtype: str = "float32"
) -> None:
    typed = {f"{root}{name}": array.astype(np.float32) for name, array in arrays.items()}
    if dtype == "bfloat16":  # as ml_dtypes leaves them: two bytes without a type
        typed = {
            name: torch.from_numpy(array).bfloat16().view(torch.int16).numpy().view("V2")
            for name, array in typed.items()
        }
    outer = root.removesuffix("img/")
    rest = {f"{outer}txt/Encoder_0/x": np.ones(3, np.float32), f"{outer}t": np.ones(1, np.float32)}
    np.savez(path, **typed, **rest)  # type: ignore[arg-type]


def small_vision(kind: str, **changes: Any) -> dict[str, Any]:  # noqa: ANN401
    return {"model_type": kind, **VISION, **changes}


def build(kind: str) -> tuple[Any, Callable[[Any], Any]]:
    """A tiny vision-language model, and how to get at its tower."""
    t, siglip = transformers, small_vision("siglip_vision_model", vision_use_head=False)
    gemma, llama, qwen = (dict(TEXT, model_type=m) for m in ("gemma", "llama", "qwen2"))
    if kind == "paligemma":
        config = t.PaliGemmaConfig(
            vision_config=siglip, text_config=gemma, projection_dim=16, hidden_size=16
        )
        return t.PaliGemmaForConditionalGeneration(config), lambda m: m.model.vision_tower
    if kind == "colpali":
        whole, _ = build("paligemma")
        config = t.ColPaliConfig(vlm_config=whole.config, embedding_dim=8)
        return (
            t.ColPaliForRetrieval(config),
            lambda m: (
                m.vlm.vision_tower if hasattr(m.vlm, "vision_tower") else m.vlm.model.vision_tower
            ),
        )
    if kind == "gemma3":
        text = dict(TEXT, model_type="gemma3_text", sliding_window=8)
        config = t.Gemma3Config(
            vision_config=dict(siglip, image_size=42), text_config=text, mm_tokens_per_image=9
        )
        return t.Gemma3ForConditionalGeneration(config), lambda m: m.model.vision_tower
    if kind == "llava_onevision":
        config = t.LlavaOnevisionConfig(
            vision_config=siglip, text_config=qwen, image_grid_pinpoints=[[45, 45]]
        )
        return t.LlavaOnevisionForConditionalGeneration(config), lambda m: m.model.vision_tower
    if kind == "llava_next":
        config = t.LlavaNextConfig(
            vision_config=siglip, text_config=llama, image_grid_pinpoints=[[45, 45]]
        )
        return t.LlavaNextForConditionalGeneration(config), lambda m: m.model.vision_tower
    if kind == "idefics2":
        perceiver = {
            "hidden_size": 16,
            "resampler_n_latents": 2,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 1,
        }
        config = t.Idefics2Config(
            vision_config=small_vision("idefics2_vision"),
            text_config=dict(TEXT, model_type="mistral"),
            perceiver_config=perceiver,
        )
        return t.Idefics2ForConditionalGeneration(config), lambda m: m.model.vision_model
    if kind in ("idefics3", "smolvlm"):
        made = t.Idefics3Config if kind == "idefics3" else t.SmolVLMConfig
        config = made(
            vision_config=small_vision(f"{kind}_vision"), text_config=llama, scale_factor=1
        )
        model = (
            t.Idefics3ForConditionalGeneration
            if kind == "idefics3"
            else t.SmolVLMForConditionalGeneration
        )
        return model(config), lambda m: m.model.vision_model
    if kind == "lfm2_vl":
        vision = {**small_vision("siglip2_vision_model", vision_use_head=False, num_patches=36)}
        vision.pop("image_size")
        text = dict(
            TEXT, model_type="lfm2", block_dim=16, conv_dim=16, layer_types=["full_attention"]
        )
        return t.Lfm2VlForConditionalGeneration(
            t.Lfm2VlConfig(vision_config=vision, text_config=text)
        ), lambda m: m.model.vision_tower
    if kind == "janus":
        vision = small_vision("janus_vision_model", mlp_ratio=1.41, projection_dim=16)
        vision.pop("intermediate_size")
        vq = {
            "embed_dim": 4,
            "num_embeddings": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "num_patches": 2,
            "projection_dim": 16,
            "image_token_embed_dim": 16,
            "double_latent": False,
            "latent_channels": 32,
        }
        return t.JanusForConditionalGeneration(
            t.JanusConfig(vision_config=vision, text_config=llama, vq_config=vq)
        ), lambda m: m.model.vision_model
    assert kind == "deepseek_vl"
    return t.DeepseekVLForConditionalGeneration(
        t.DeepseekVLConfig(vision_config=siglip, text_config=llama)
    ), lambda m: m.model.vision_model


def write_two_towers(folder: Path, kind: type[SiglipModel | SiglipForImageClassification]) -> None:
    text = SiglipTextConfig(
        hidden_size=24,
        intermediate_size=30,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=9,
    )
    config = SiglipConfig(text_config=text, vision_config=references.hf_config(SMALL))
    model = kind(config)
    randomise(model)
    model.save_pretrained(folder)

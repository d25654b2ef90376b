"""Small vision-language models of transformers with a SigLIP vision encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

# Sizes as in ODD, with no default value.
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

LLAMA = {**TEXT, "model_type": "llama"}

PERCEIVER = {
    "hidden_size": 16,
    "resampler_n_latents": 2,
    "resampler_depth": 1,
    "resampler_n_heads": 2,
    "resampler_head_dim": 8,
    "num_key_value_heads": 1,
}

JANUS_VQ = {
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


def small_vision(kind: str, **changes: object) -> dict[str, Any]:
    """Return the configuration of a small vision encoder."""
    return {"model_type": kind, **VISION, **changes}


SIGLIP = small_vision("siglip_vision_model", vision_use_head=False)


def build(kind: str) -> tuple[Any, Callable[[Any], Any]]:
    """Return a small vision-language model and a function that returns its vision encoder."""
    model = BUILDERS[kind]()
    if kind == "colpali":
        return model, lambda whole: getattr(whole.vlm, "model", whole.vlm).vision_tower
    name = "vision_model" if kind in HAS_VISION_MODEL else "vision_tower"
    return model, lambda whole: getattr(whole.model, name)


def paligemma_config() -> object:
    text = {**TEXT, "model_type": "gemma"}
    return transformers.PaliGemmaConfig(
        vision_config=SIGLIP, text_config=text, projection_dim=16, hidden_size=16
    )


def build_paligemma() -> object:
    return transformers.PaliGemmaForConditionalGeneration(paligemma_config())


def build_colpali() -> object:
    config = transformers.ColPaliConfig(vlm_config=paligemma_config(), embedding_dim=8)
    return transformers.ColPaliForRetrieval(config)


def build_gemma3() -> object:
    text = {**TEXT, "model_type": "gemma3_text", "sliding_window": 8}
    config = transformers.Gemma3Config(
        vision_config={**SIGLIP, "image_size": 42}, text_config=text, mm_tokens_per_image=9
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def build_llava_onevision() -> object:
    text = {**TEXT, "model_type": "qwen2"}
    config = transformers.LlavaOnevisionConfig(
        vision_config=SIGLIP, text_config=text, image_grid_pinpoints=[[45, 45]]
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def build_llava_next() -> object:
    config = transformers.LlavaNextConfig(
        vision_config=SIGLIP, text_config=LLAMA, image_grid_pinpoints=[[45, 45]]
    )
    return transformers.LlavaNextForConditionalGeneration(config)


def build_idefics2() -> object:
    config = transformers.Idefics2Config(
        vision_config=small_vision("idefics2_vision"),
        text_config={**TEXT, "model_type": "mistral"},
        perceiver_config=PERCEIVER,
    )
    return transformers.Idefics2ForConditionalGeneration(config)


def build_idefics3() -> object:
    config = transformers.Idefics3Config(
        vision_config=small_vision("idefics3_vision"), text_config=LLAMA, scale_factor=1
    )
    return transformers.Idefics3ForConditionalGeneration(config)


def build_smolvlm() -> object:
    config = transformers.SmolVLMConfig(
        vision_config=small_vision("smolvlm_vision"), text_config=LLAMA, scale_factor=1
    )
    return transformers.SmolVLMForConditionalGeneration(config)


def build_lfm2_vl() -> object:
    vision = small_vision("siglip2_vision_model", vision_use_head=False, num_patches=36)
    del vision["image_size"]
    text = {
        **TEXT,
        "model_type": "lfm2",
        "block_dim": 16,
        "conv_dim": 16,
        "layer_types": ["full_attention"],
    }
    config = transformers.Lfm2VlConfig(vision_config=vision, text_config=text)
    return transformers.Lfm2VlForConditionalGeneration(config)


def build_janus() -> object:
    vision = small_vision("janus_vision_model", mlp_ratio=1.41, projection_dim=16)
    del vision["intermediate_size"]
    config = transformers.JanusConfig(vision_config=vision, text_config=LLAMA, vq_config=JANUS_VQ)
    return transformers.JanusForConditionalGeneration(config)


def build_deepseek_vl() -> object:
    config = transformers.DeepseekVLConfig(vision_config=SIGLIP, text_config=LLAMA)
    return transformers.DeepseekVLForConditionalGeneration(config)


BUILDERS: dict[str, Callable[[], object]] = {
    "paligemma": build_paligemma,
    "colpali": build_colpali,
    "gemma3": build_gemma3,
    "llava_onevision": build_llava_onevision,
    "llava_next": build_llava_next,
    "idefics2": build_idefics2,
    "idefics3": build_idefics3,
    "smolvlm": build_smolvlm,
    "lfm2_vl": build_lfm2_vl,
    "janus": build_janus,
    "deepseek_vl": build_deepseek_vl,
}
HAS_VISION_MODEL = ("idefics2", "idefics3", "smolvlm", "janus", "deepseek_vl")

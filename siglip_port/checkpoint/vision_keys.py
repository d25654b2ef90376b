"""Keys of a vision section that change nothing, and refusal of those that might.

transformers ignores keys that its classes do not know. Models with their own code use such keys for
rotary positions, window attention and the like, under a `model_type` of SigLIP; timm builds other
models from other arguments. Only keys known to leave the computation unchanged are accepted.

Sources: transformers 4.37 to 5.23 `configuration_utils.py` and the configurations of the models in
`siglip_port.checkpoint.hf_config`; published files of models with their own code; timm 1.0.31
`vision_transformer.py` and `naflexvit.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from siglip_port.checkpoint.registry import TIMM_NAME

# fmt: off
TRANSFORMERS_KEYS = frozenset({
    "add_cross_attention", "architectures", "auto_map", "bad_words_ids",
    "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample",
    "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "gradient_checkpointing", "id2label", "initializer_factor",
    "initializer_range", "is_decoder", "is_encoder_decoder", "keys_to_ignore_at_inference",
    "label2id", "length_penalty", "max_length", "min_length", "model_type",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores",
    "pad_token_id", "prefix", "problem_type", "quantization", "quantization_config",
    "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate",
    "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss",
    "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "top_k", "top_p",
    "torch_dtype", "torchscript", "transformers.js_config", "transformers_version", "typical_p",
    "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache", "use_return_dict",
})
"""Keys of every configuration of transformers, and of tools that write its files."""

OTHER_COMPONENT_KEYS = frozenset({
    "backbone", "backbone_id", "comment", "crop_size", "depth", "feature_layer", "hidden_stride",
    "hub_id", "image_mean", "image_std", "image_token_id", "initializer_std",
    "logit_scale_init_value", "max_image_size", "max_num_patches", "mm_tokens_per_image",
    "mm_vision_select_layer", "model_id", "model_name", "name", "num_image_tokens", "output_dim",
    "patch_pooling", "projection_dim", "projector_hidden_act", "projector_type", "resample",
    "select_feature", "select_layer", "text_config", "tokens_per_image", "version",
    "vision_feature_layer", "vision_feature_select_strategy", "vision_select_layer",
})
"""Keys of the processor, of the projector behind the encoder, and names."""

TRAINING_KEYS = frozenset({
    "attention_probs_dropout_prob", "attn_dropout", "attn_drop_rate", "classifier_dropout",
    "drop_path", "drop_path_rate", "drop_rate", "dropout", "embed_dropout", "hidden_dropout",
    "hidden_dropout_prob", "hidden_dropout_rate", "layerdrop", "mlp_dropout", "patch_dropout",
    "patch_drop_rate", "pos_drop_rate", "proj_drop_rate", "projection_dropout", "weight_init",
    "fix_init",
})
"""Keys without effect in `eval()`. The port has no dropout but that of attention weights."""

BACKEND_KEYS = frozenset({
    "attn_implementation", "attn_backend", "flash_attn", "fused_attn", "use_flash_attn",
    "use_flash_attention", "use_flash_attention_2", "use_flash_attn_2", "use_sdpa",
    "use_xformers",
})
"""Keys that choose an implementation of the same computation."""

OWN_KEYS = frozenset({
    "attention_dropout", "hidden_act", "hidden_size", "image_size", "intermediate_size",
    "layer_norm_eps", "mean_pooling", "mlp_ratio", "num_attention_heads", "num_channels",
    "num_hidden_layers", "num_patches", "patch_size", "vision_use_head",
})
"""Keys that `hf_config` reads. `mlp_ratio` is only read for Janus; tensor shapes show the width."""

TIMM_KEYS = frozenset({
    "act_layer", "attn_drop_rate", "checkpoint_path", "depth", "device", "drop_path_rate",
    "drop_rate", "dtype", "dynamic_img_size", "embed_dim", "features_only", "fix_init",
    "global_pool", "img_size", "in_chans", "mlp_ratio", "no_embed_class", "num_classes",
    "num_heads", "patch_drop_rate", "patch_size", "pos_drop_rate", "pos_embed_grid_size",
    "pretrained", "proj_drop_rate", "weight_init",
})
"""Arguments of timm's models that the port reads, that tensor shapes show, or without effect in
`eval()`. `no_embed_class` has none without a class token."""

OPEN_CLIP_KEYS = frozenset({
    "act_layer", "head_width", "heads", "image_size", "layers", "mlp_ratio", "num_heads",
    "output_tokens", "patch_dropout", "patch_size", "timm_drop", "timm_drop_path",
    "timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "width",
})
"""Keys of open_clip's `vision_cfg` of a timm model. Tensors show the projection."""

NANOVLM_KEYS = frozenset({
    "vit_architecture", "vit_dropout", "vit_hidden_dim", "vit_img_size", "vit_inter_dim",
    "vit_ln_eps", "vit_model_type", "vit_n_blocks", "vit_n_heads", "vit_patch_size",
})
"""nanoVLM's keys of the vision encoder, which it stores beside those of the language model."""

MOONDREAM_KEYS = frozenset({
    "crop_size", "enc_dim", "enc_ff_dim", "enc_n_heads", "enc_n_layers", "enc_patch_size",
    "in_channels", "max_crops", "overlap_margin", "proj_inner_dim", "proj_out_dim",
})
"""Keys of Moondream's `config.vision`."""

JANUS_KEYS = frozenset({
    "ckpt_path", "concat_type", "freeze_high", "freeze_low", "high_res_cfg", "image_size",
    "low_res_cfg", "model_name", "num_heads", "pixel_mean", "pixel_std", "select_feature",
    "select_layer", "select_layers",
})
"""Keys of `vision_config.params` in the original files of Janus and DeepSeek-VL."""

# fmt: on
HARMLESS_KEYS = TRANSFORMERS_KEYS | OTHER_COMPONENT_KEYS | TRAINING_KEYS | BACKEND_KEYS | OWN_KEYS

SWITCHES: dict[str, Any] = {
    "attention_bias": True,
    "class_token": False,
    "layer_scale": False,
    "mlp_bias": True,
    "num_register_tokens": 0,
    "num_registers": 0,
    "output_norm": True,
    "pooling_type": "map",
    "position_embedding_type": "learned",
    "proj_bias": True,
    "pruned_heads": {},
    "qk_layernorm": False,
    "qk_norm": False,
    "qk_normalization": False,
    "qkv_bias": True,
    "reg_tokens": 0,
    "rope": False,
    "rope_type": "",
    "use_absolute_position_embeddings": True,
    "use_bias": True,
    "use_class_token": False,
    "use_cls_token": False,
    "use_head": True,
    "use_layer_scale": False,
    "use_post_layernorm": True,
    "use_qk_norm": False,
    "use_register_tokens": False,
    "use_relative_position_bias": False,
    "use_rope": False,
    "use_rotary": False,
    "use_window_attn": False,
    "use_windows_attn": False,
}
"""Keys that change the computation -> their value in SigLIP."""

TIMM_SWITCHES: dict[str, Any] = {
    "class_token": False,
    "dynamic_img_pad": False,
    "enable_patch_interpolator": False,
    "fc_norm": False,
    "final_norm": True,
    "norm_layer": "layernorm",
    "patchify_channels_last": True,
    "pool_include_prefix": False,
    "pos_embed": "learn",
    "pos_embed_align_corners": False,
    "pos_embed_antialias": True,
    "pos_embed_ar_preserving": False,
    "pos_embed_interp_mode": "bilinear",
    "pos_embed_use_grid_sample": False,
    "pre_norm": False,
    "proj_bias": True,
    "qk_norm": False,
    "qkv_bias": True,
    "qkv_fused": True,
    "reg_tokens": 0,
    "rope_type": "",
    "scale_attn_inner_norm": False,
    "scale_attn_norm": False,
    "scale_mlp_norm": False,
    "swiglu_mlp": False,
}
"""Arguments of timm's models that change the computation -> their value in SigLIP."""

DEPENDENT_KEYS = {
    "full_attention_indexes": ("use_windows_attn", "use_window_attn"),
    "fullatt_block_indexes": ("use_windows_attn", "use_window_attn"),
    "window_size": ("use_windows_attn", "use_window_attn"),
    "rope_parameters": ("use_rope", "rope", "use_rotary"),
    "rope_scaling": ("use_rope", "rope", "use_rotary"),
    "rope_theta": ("use_rope", "rope", "use_rotary"),
}
"""Keys without effect where one of these switches is off."""


OTHER_SECTIONS: tuple[tuple[tuple[str, ...], frozenset[str], dict[str, Any]], ...] = (
    (("model_args",), TIMM_KEYS, TIMM_SWITCHES),
    (("model_cfg", "vision_cfg"), OPEN_CLIP_KEYS, {}),
    (("config", "vision"), MOONDREAM_KEYS, {}),
    (("vision_config", "params"), JANUS_KEYS, {}),
)
"""Paths of the vision encoder's section in other libraries, their harmless keys and switches."""


def refuse_unknown_keys(vision: Mapping[str, Any]) -> None:
    """Raise ValueError if a vision section has keys that might change the computation.

    Args:
        vision: Section of the vision encoder in transformers' `config.json`.
    """
    unknown = unknown_keys(vision)
    if unknown:
        raise ValueError(
            f"vision settings {', '.join(unknown)} are not SigLIP's, so the model may compute "
            "something else"
        )


def refuse_unknown_sections(content: Mapping[str, Any]) -> None:
    """Raise ValueError if another library would build something else than a SigLIP encoder.

    Args:
        content: Contents of a configuration file of timm, open_clip, nanoVLM, Moondream, Janus,
            OpenVLA or Prismatic; those of other libraries pass.
    """
    architecture = content.get("architecture")
    if isinstance(architecture, str) and TIMM_NAME.fullmatch(architecture) is None:
        raise ValueError(f"architecture must be one of timm's SigLIP models, got {architecture!r}")
    activations = content.get("timm_override_act_layers")
    if isinstance(activations, list) and any(name is not None for name in activations):
        raise ValueError(f"timm_override_act_layers must be null, got {activations}; pass config=")
    nanovlm = {key: value for key, value in content.items() if key.startswith("vit_")}
    switches: dict[str, Any] = {"vit_cls_flag": False}
    unknown = {"the configuration": settings_outside(nanovlm, NANOVLM_KEYS, switches)}
    for path, harmless, switches in OTHER_SECTIONS:
        section = section_at(content, path)
        if section is not None:
            unknown[".".join(path)] = settings_outside(section, harmless, switches)
    for name, settings in unknown.items():
        if settings:
            raise ValueError(
                f"{name}: settings {', '.join(settings)} are not SigLIP's, so the model may "
                "compute something else; if not, pass config="
            )


def section_at(content: object, path: tuple[str, ...]) -> Mapping[str, Any] | None:
    """Return the object at a path of keys; None if there is none."""
    for key in path:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content if isinstance(content, Mapping) else None


def unknown_keys(vision: Mapping[str, Any]) -> list[str]:
    """Return the settings `key=value` of a vision section that might change the computation."""
    return settings_outside(vision, HARMLESS_KEYS, SWITCHES)


def settings_outside(
    section: Mapping[str, Any], harmless: Collection[str], switches: Mapping[str, Any]
) -> list[str]:
    """Return the settings `key=value` of a section that are not known to change nothing.

    A null is the same as a missing key.

    Args:
        section: Section of a configuration file.
        harmless: Keys with any value.
        switches: Keys with one harmless value.
    """
    unknown = []
    for key, value in section.items():
        if value is None or key in harmless or key.startswith("_"):
            continue
        if key in switches and equals(value, switches[key]):
            continue
        if any(section.get(switch) is False for switch in DEPENDENT_KEYS.get(key, ())):
            continue
        unknown.append(f"{key}={value!r}")
    return unknown


def equals(value: object, expected: object) -> bool:
    """Return whether JSON values are equal; True and 1 are not."""
    return value == expected and isinstance(value, bool) == isinstance(expected, bool)

"""timm's `config.json`: a published architecture and the arguments that differ from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from siglip_port.config import SigLipVisionConfig
from siglip_port.image_options import RESAMPLE


def config_to_timm(config: SigLipVisionConfig, preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """Return timm's `config.json` of a model.

    Args:
        config: Architecture of the model.
        preprocessor: Contents of its `preprocessor_config.json`.

    Raises:
        ValueError: `layer_norm_eps` is not 1e-6, the only value in timm's SigLIP models.
    """
    if config.layer_norm_eps != SigLipVisionConfig.layer_norm_eps:
        raise ValueError(
            f"layer_norm_eps must be 1e-6 in timm's SigLIP models, got {config.layer_norm_eps}; "
            "write the HuggingFace format instead"
        )
    architecture = "vit_base_patch16_siglip_224"
    if config.naflex:
        architecture = "naflexvit_base_patch16_siglip"
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": config.embed_dim,
        "global_pool": global_pool(config),
        "model_args": model_args(config),
        "pretrained_cfg": pretrained_cfg(config, preprocessor),
    }


def model_args(config: SigLipVisionConfig) -> dict[str, Any]:
    """Return the arguments of timm's model constructor."""
    sizes: dict[str, Any] = {"img_size": config.image_size}
    if config.naflex:
        sizes = {"pos_embed_grid_size": [config.grid_size, config.grid_size]}
    return {
        **sizes,
        "patch_size": config.patch_size,
        "in_chans": config.num_channels,
        "embed_dim": config.embed_dim,
        "depth": config.num_encoder_blocks,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": mlp_ratio(config),
        "act_layer": "gelu_tanh" if config.hidden_act == "gelu_pytorch_tanh" else "gelu",
        "global_pool": global_pool(config),
        "fc_norm": False,
    }


def pretrained_cfg(config: SigLipVisionConfig, preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """Return timm's description of the weights and of their input images."""
    return {
        "custom_load": False,
        "input_size": [config.num_channels, config.image_size, config.image_size],
        "fixed_input_size": not config.naflex,
        "interpolation": interpolation_name(preprocessor.get("resample")),
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": preprocessor.get("image_mean"),
        "std": preprocessor.get("image_std"),
        "num_classes": 0,
        "first_conv": "embeds.proj" if config.naflex else "patch_embed.proj",
        "classifier": "head",
    }


def interpolation_name(resample: object) -> str:
    """Return the name of a PIL filter number; bicubic if it is unknown."""
    for name, number in RESAMPLE.items():
        if number == resample:
            return name
    return "bicubic"


def global_pool(config: SigLipVisionConfig) -> str:
    """Return timm's pooling: `map` for the attention head, `avg` for the mean, or none."""
    if config.pooling_head:
        return "map"
    return "avg" if config.mean_pooling else ""


def mlp_ratio(config: SigLipVisionConfig) -> float:
    """Return the ratio from which timm computes the MLP's hidden width.

    timm truncates, int(width * ratio), so the ratio may need rounding up.
    """
    ratio = config.mlp_hidden_dim / config.embed_dim
    if int(config.embed_dim * ratio) == config.mlp_hidden_dim:
        return ratio
    return (config.mlp_hidden_dim + 0.5) / config.embed_dim

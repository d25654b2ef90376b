"""timm's `config.json` of a model: a published architecture, and what differs from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from siglip_port.checkpoint.preprocessor_config import RESAMPLE
from siglip_port.config import SigLipVisionConfig


def config_to_timm(config: SigLipVisionConfig, preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `config.json` of a model in timm's words.

    Args:
        config: of the model.
        preprocessor: the contents of its `preprocessor_config.json`.

    Raises:
        ValueError: the model has another epsilon than 1e-6, which timm fixes.
    """
    if config.layer_norm_eps != SigLipVisionConfig.layer_norm_eps:
        raise ValueError(
            f"timm's SigLIP encoders have layer_norm_eps 1e-6, this one has {config.layer_norm_eps}"
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
    """Return the arguments of timm's model."""
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
    """Return what timm says of the weights, and of the images that they take."""
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
    """Return the name of the filter of PIL's number; bicubic for anything else."""
    for name, number in RESAMPLE.items():
        if number == resample:
            return name
    return "bicubic"


def global_pool(config: SigLipVisionConfig) -> str:
    """Return how timm pools tokens: `map` is the pooling head, `avg` the mean."""
    if config.pooling_head:
        return "map"
    return "avg" if config.mean_pooling else ""


def mlp_ratio(config: SigLipVisionConfig) -> float:
    """Return the ratio of which timm makes the width of the MLP's hidden layer.

    timm takes int(width * ratio), which must not fall below the number meant.
    """
    ratio = config.mlp_hidden_dim / config.embed_dim
    if int(config.embed_dim * ratio) == config.mlp_hidden_dim:
        return ratio
    return (config.mlp_hidden_dim + 0.5) / config.embed_dim

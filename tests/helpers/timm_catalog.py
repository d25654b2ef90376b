"""Small models of every ViT architecture that timm has, saved by timm and loaded by the port."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from siglip_port import CheckpointError, SigLipVisionModel
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.stress_weights import randomize

MODULES = (
    "vision_transformer",
    "naflexvit",
    "eva",
    "deit",
    "beit",
    "vision_transformer_relpos",
    "vision_transformer_sam",
)
"""Modules of timm with vision transformers."""

WITH_CONVOLUTIONS = ("vision_transformer_hybrid", "hiera")
"""More modules, whose models are large and slow to build; only the first variant is checked."""

SMALL = {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}
UNACCEPTED = ((), ("patch_size",), ("img_size",), ("depth", "img_size", "patch_size"))
"""Arguments that are left out, in this order, until an architecture can be built."""

VARIANTS: dict[str, dict[str, Any]] = {
    "unchanged": {},
    "classifier": {"num_classes": 5},
    "no pooling": {"global_pool": ""},
    "mean": {"global_pool": "avg"},
    "mean, fc_norm": {"global_pool": "avg", "fc_norm": True},
    "mean, no fc_norm": {"global_pool": "avg", "fc_norm": False},
    "mean and maximum": {"global_pool": "avgmax"},
    "maximum": {"global_pool": "max"},
    "token": {"global_pool": "token"},
    "attention": {"global_pool": "map"},
    "attention, fc_norm": {"global_pool": "map", "fc_norm": True},
    "attention, no class token": {"global_pool": "map", "class_token": False},
    "mean, no class token": {"global_pool": "avg", "class_token": False, "fc_norm": False},
    "no class token": {"global_pool": "", "class_token": False},
    "registers": {"class_token": False, "global_pool": "avg", "reg_tokens": 2},
    "no_embed_class": {"no_embed_class": True},
    "pre_norm": {"pre_norm": True},
    "no final_norm": {"final_norm": False},
    "no qkv_bias": {"qkv_bias": False},
    "no proj_bias": {"proj_bias": False},
    "qk_norm": {"qk_norm": True},
    "scale_attn_norm": {"scale_attn_norm": True},
    "scale_mlp_norm": {"scale_mlp_norm": True},
    "init_values": {"init_values": 1e-2},
    "no positions": {"pos_embed": "none"},
    "rotary positions": {"pos_embed": "none", "rope_type": "axial"},
    "learned and rotary positions": {"rope_type": "axial"},
    "mixed rotary positions": {"rope_type": "mixed"},
    "use_rot_pos_emb": {"use_rot_pos_emb": True},
    "pos_embed_interp_mode": {"pos_embed_interp_mode": "bicubic"},
    "pos_embed_ar_preserving": {"pos_embed_ar_preserving": True},
    "pos_embed_grid_size": {"pos_embed_grid_size": [6, 6]},
    "rectangular image": {"img_size": [64, 16]},
    "rectangular image, other count": {"img_size": [48, 32]},
    "rectangular patches": {"patch_size": [4, 8]},
    "gray images": {"in_chans": 1},
    "dynamic_img_size": {"dynamic_img_size": True},
    "dynamic_img_pad": {"dynamic_img_size": True, "dynamic_img_pad": True},
    "relu": {"act_layer": "relu"},
    "silu": {"act_layer": "silu"},
    "quick_gelu": {"act_layer": "quick_gelu"},
    "exact GELU": {"act_layer": "gelu"},
    "tanh GELU": {"act_layer": "gelu_tanh"},
    "rmsnorm": {"norm_layer": "rmsnorm"},
    "layernorm": {"norm_layer": "layernorm"},
    "other heads": {"num_heads": 4},
    "mlp_ratio": {"mlp_ratio": 1.5},
    "differential attention": {"attn_layer": "diff"},
    "dropout": {"drop_rate": 0.5, "attn_drop_rate": 0.5, "patch_drop_rate": 0.5},
    "pool_include_prefix": {"global_pool": "avg", "pool_include_prefix": True},
    "embed_norm_layer": {"embed_norm_layer": "layernorm"},
    "input_norm_layer": {"input_norm_layer": "layernorm"},
    "no antialiasing": {"pos_embed_antialias": False},
    "corners aligned": {"pos_embed_align_corners": True},
    "pos_embed_use_grid_sample": {"pos_embed_use_grid_sample": True},
    "factorized positions": {"pos_embed": "factorized"},
    "padded images": {"dynamic_img_pad": True},
    "channels first": {"patchify_channels_last": False},
    "convolution": {"embed_proj_type": "conv"},
    "other heads of the pooling": {"attn_pool_num_heads": 4},
    "other MLP of the pooling": {"attn_pool_mlp_ratio": 1.5},
    "fewer keys": {"num_kv_heads": 1},
    "rotary attention": {"attn_type": "rope"},
    "rotary temperature": {"rope_type": "axial", "rope_temperature": 100.0},
    "gated attention": {"attn_gated": True},
    "scale_attn_inner_norm": {"scale_attn_inner_norm": True},
    "gated MLP": {"swiglu_mlp": True},
    "separate projections": {"qkv_fused": False},
    "use_key_only_attn_mask": {"use_key_only_attn_mask": True},
    "attn_only_layer_scale": {"attn_only_layer_scale": True, "init_values": 1e-2},
    "enable_patch_interpolator": {"enable_patch_interpolator": True},
    "no positions, EVA": {"use_abs_pos_emb": False},
    "relative positions": {"use_rel_pos_bias": True},
}
"""Name of a variant -> arguments of `timm.create_model`."""

TOLERANCE = 1e-4


def architectures(variant: str) -> list[str]:
    """Return the names of the ViT architectures of the installed timm to check a variant with."""
    modules: tuple[str, ...] = MODULES
    if not VARIANTS[variant]:
        modules += WITH_CONVOLUTIONS
    names: list[str] = []
    for module in modules:
        names += timm.list_models(module=module)
    return names


def build_small(name: str, changes: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Build a small model of an architecture with random weights.

    Returns:
        The model and its arguments; None if the architecture does not accept them.
    """
    for left_out in UNACCEPTED:
        arguments: dict[str, Any] = {"num_classes": 0}
        arguments |= {key: value for key, value in SMALL.items() if key not in left_out}
        arguments |= changes
        try:
            model: Any = timm.create_model(name, **arguments)
        except Exception:  # whatever an architecture raises for arguments that it does not accept
            continue
        randomize(model)
        return model.eval(), arguments
    return None


def image_shapes(model: Any) -> list[tuple[int, int]]:  # noqa: ANN401 (timm's models are untyped)
    """Return heights and widths of images that a model accepts."""
    if hasattr(model, "embeds"):  # NaFlex
        return [(32, 32), (48, 16), (16, 64)]
    return [model.patch_embed.img_size or (32, 32)]


@torch.no_grad()
def verdict(model: Any, arguments: dict[str, Any], folder: Path) -> str:  # noqa: ANN401
    """Save a model with timm, load it, and compare its outputs.

    Returns:
        "equal", "refused", or what is wrong.
    """
    timm.models.save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True)
    try:
        port = SigLipVisionModel.from_hf(folder)
    except CheckpointError:
        return "refused"
    except Exception as error:  # a fault of the port, whatever it is
        return f"{type(error).__name__} instead of CheckpointError: {error}"
    for shape in image_shapes(model):
        images = torch.randn(2, arguments.get("in_chans", 3), *shape)
        try:
            difference = first_difference(model, port, images)
        except ValueError as error:
            return f"loaded, but images of {shape} are refused: {error}"
        if difference:
            return difference
    return "equal"


def first_difference(model: Any, port: SigLipVisionModel, images: Tensor) -> str:  # noqa: ANN401
    """Compare tokens, and the embedding if the port has one; return an empty string if equal."""
    tokens = model.forward_features(images)
    pairs = [("tokens", port(images), tokens)]
    if port.config.has_pooled_output:
        pooled = model.forward_head(tokens, pre_logits=True)
        pairs.append(("embedding", port.embed(images), pooled))
    for name, actual, expected in pairs:
        if actual.shape != expected.shape:
            return f"{name}: shape is {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        error = relative_error(actual, expected)
        if error > TOLERANCE:
            return f"{name}: relative error {error:.1e}"
    return ""


def check_variant(variant: str, folder: Path) -> tuple[Counter[str], list[str]]:
    """Check one variant of every architecture.

    Returns:
        Counts of "equal", "refused", "not accepted" and "wrong"; and the wrong ones.
    """
    counts: Counter[str] = Counter()
    wrong = []
    for name in architectures(variant):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of timm, about arguments
            built = build_small(name, VARIANTS[variant])
        if built is None:
            counts["not accepted"] += 1
            continue
        result = verdict(*built, folder)
        if result in ("equal", "refused"):
            counts[result] += 1
            continue
        counts["wrong"] += 1
        wrong.append(f"{name}: {result}")
    return counts, wrong

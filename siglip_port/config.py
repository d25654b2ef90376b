"""The shape of a SigLIP vision tower.

Names, defaults, rules, and how transformers' `config.json` spells them.

The defaults are those of transformers' `SiglipVisionConfig`, i.e. google/siglip-base-patch16-224.
They matter beyond convenience: published `config.json` files leave out every value that equals the
default (that of google/siglip-base-patch16-224 holds nothing but `patch_size`), so a missing key
*means* the default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeGuard

HIDDEN_ACTS = ("gelu_pytorch_tanh", "gelu")
"""The activations a SigLIP MLP may name.

GELU's tanh form (all Google checkpoints), or the exact (erf) form.
"""

INTERPOLATIONS = ("hf", "timm", "naflex", "big_vision", "navit")
"""The rules by which positions can be fitted to other grids of patches.

Computed in `siglip_port.patches`.
"""

_NAVIT = {"pooling_head": False, "interpolation": "navit"}
_SMOL = {**_NAVIT, "patch_size": 32}
_IDEFICS3 = {**_SMOL, "embed_dim": 1152, "num_attention_heads": 16}
MODEL_TYPES: dict[str, dict[str, Any]] = {
    "siglip": {},
    "siglip_vision_model": {},
    "siglip2": {"naflex": True, "image_size": 256},
    "siglip2_vision_model": {"naflex": True, "image_size": 256},
    "idefics2": _SMOL,
    "idefics2_vision": _SMOL,
    "idefics3": _IDEFICS3,
    "idefics3_vision": _IDEFICS3,
    "smolvlm": _IDEFICS3,
    "smolvlm_vision": _IDEFICS3,
    "minicpmv_vision": _NAVIT,
    "phi4_multimodal_vision": {
        "embed_dim": 1152,
        "image_size": 448,
        "patch_size": 14,
        "num_attention_heads": 16,
        "num_encoder_blocks": 27,
        "mlp_hidden_dim": 4304,
        "interpolation": "navit",
    },
    "janus_vision_model": {
        "embed_dim": 1024,
        "image_size": 384,
        "num_attention_heads": 16,
        "num_encoder_blocks": 24,
        "mlp_hidden_dim": 4096,
        "hidden_act": "gelu",
        "pooling_head": False,
    },
}
"""The `model_type`s of a configuration that describe a SigLIP tower, with the defaults in which they differ."""

# The `model_type` of models whose published files hold no other for their tower, or one that says
# too little.
_TOWER_OF = {
    "paligemma": "siglip_vision_model",
    "gemma3": "siglip_vision_model",
    "idefics2": "idefics2_vision",
    "idefics3": "idefics3_vision",
    "smolvlm": "smolvlm_vision",
    "phi4_multimodal": "phi4_multimodal_vision",
    "phi4mm": "phi4_multimodal_vision",
    "lfm2_vl": "siglip2_vision_model",
    "lfm2-vl": "siglip2_vision_model",
    "janus": "janus_vision_model",
    "deepseek_vl": "siglip_vision_model",
}

_MINICPM = ("minicpmv", "minicpmo")

_REFUSED = {
    "minicpmv4_6": "its tower merges tokens between its blocks",
    "minicpmv4_6_vision": "its tower merges tokens between its blocks",
    "youtu_vl": "its tower has rotary positions and windows of attention",
    "bagel": "its configuration does not tell whether its positions are learned or rotary",
    "phi3_v": "its tower is CLIP's, not SigLIP's",
    "clip": "CLIP is another model",
    "clip_vision_model": "CLIP is another model",
}

# Our field <- transformers' key.
_HF_KEYS = {
    "num_channels": "num_channels",
    "embed_dim": "hidden_size",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_attention_heads": "num_attention_heads",
    "attention_dropout": "attention_dropout",
    "num_encoder_blocks": "num_hidden_layers",
    "mlp_hidden_dim": "intermediate_size",
    "layer_norm_eps": "layer_norm_eps",
    "hidden_act": "hidden_act",
    "pooling_head": "vision_use_head",
}


class UnknownModelError(ValueError):
    """A configuration without a vision part is of a kind of model that is unknown here."""


@dataclass(frozen=True)
class SigLipVisionConfig:
    """Everything that determines the tower's architecture. Immutable, and checked when it is made.

    Attributes:
        num_channels: channels C of a picture.
        embed_dim: width D of a token.
        image_size: height and width of a picture, in pixels. Pictures are square.
        patch_size: height and width of a patch, in pixels. What is left at the right and lower edge
            of a picture that is not a multiple of it is ignored, as in siglip-so400m-patch14-384
            (27 x 27 patches).
        num_attention_heads: heads H of every attention; divides `embed_dim`.
        attention_dropout: probability with which an attention weight is dropped, in training only.
        num_encoder_blocks: number of blocks L.
        mlp_hidden_dim: width of the MLPs' hidden layer.
        layer_norm_eps: the epsilon of all LayerNorms.
        hidden_act: the MLPs' activation, one of `HIDDEN_ACTS`.
        pooling_head: whether the model has the attention pooling head.
        mean_pooling: whether `pool` is the mean of the tokens instead, as in timm's `gap` towers.
        naflex: whether the tower was trained on pictures of any shape, as SigLIP 2's NaFlex ones
            were. `image_size` then tells the grid of its positions.
        interpolation: the rule by which positions are fitted to other grids, one of
            `INTERPOLATIONS`; None for no other grids, except in a NaFlex tower, which has its own.

    Raises:
        ValueError: a value has the wrong type or makes no sense.
    """

    num_channels: int = 3
    embed_dim: int = 768
    image_size: int = 224
    patch_size: int = 16
    num_attention_heads: int = 12
    attention_dropout: float = 0.0
    num_encoder_blocks: int = 12
    mlp_hidden_dim: int = 3072
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"
    pooling_head: bool = False
    mean_pooling: bool = False
    naflex: bool = False
    interpolation: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and not (_is_int(value) and value > 0):
                raise ValueError(f"{field.name} must be a positive integer, got {value!r}")
            if field.type == "float" and not _is_number(value):
                raise ValueError(f"{field.name} must be a number, got {value!r}")
            if field.type == "bool" and not isinstance(value, bool):
                raise ValueError(f"{field.name} must be True or False, got {value!r}")
        if self.embed_dim % self.num_attention_heads:
            raise ValueError(
                f"embed_dim must be divisible by num_attention_heads, got {self.embed_dim} and "
                f"{self.num_attention_heads}"
            )
        if self.patch_size > self.image_size:
            raise ValueError(
                f"patch_size must not exceed image_size, got {self.patch_size} and "
                f"{self.image_size}"
            )
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout must lie in [0, 1), got {self.attention_dropout}")
        if not 0 < self.layer_norm_eps < 1:
            raise ValueError(f"layer_norm_eps must lie between 0 and 1, got {self.layer_norm_eps}")
        if self.hidden_act not in HIDDEN_ACTS:
            raise ValueError(
                f"hidden_act must be one of {', '.join(HIDDEN_ACTS)}, got {self.hidden_act!r}"
            )
        if self.mean_pooling and self.pooling_head:
            raise ValueError("mean_pooling and pooling_head exclude each other, got both")
        if self.interpolation is not None and self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"interpolation must be None or one of {', '.join(INTERPOLATIONS)}, got "
                f"{self.interpolation!r}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head, D / H."""
        return self.embed_dim // self.num_attention_heads

    @property
    def grid_size(self) -> int:
        """Patches along one side of a picture."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Number of patches N of a picture, which is also the number of tokens."""
        return self.grid_size**2

    @property
    def resize_rule(self) -> str | None:
        """The rule by which positions are fitted to other grids.

        None where other grids are refused.
        """
        return self.interpolation or ("naflex" if self.naflex else None)

    @classmethod
    def from_hf(cls, hf_config: Mapping[str, Any]) -> SigLipVisionConfig:
        """Reads the contents of a transformers `config.json`.

        Args:
            hf_config: the parsed file: of a model that holds a SigLIP tower (which is described
                under `vision_config`), or of the tower alone (flat). A missing key takes its
                default; keys that do not describe the vision tower are ignored.

        Raises:
            ValueError: it describes another kind of model, or a value makes no sense.
            UnknownModelError: it describes another kind of model, and none that is known to hold
                another tower.
        """
        if not isinstance(hf_config, Mapping):
            raise ValueError(f"a configuration must be an object, got {hf_config!r}")
        refuse(hf_config)
        if "vision_config" not in hf_config:  # a model around a vision-language model, as ColPali's
            parts = {k: v for k, v in hf_config.items() if isinstance(v, Mapping)}
            inner = {k: v for k, v in parts.items() if isinstance(v.get("vision_config"), Mapping)}
            if len(inner) > 1:
                raise ValueError(
                    f"there must be one vision_config, got one each in {', '.join(inner)}"
                )
            hf_config = next(iter(inner.values()), hf_config)
        vision = hf_config.get("vision_config")
        if vision is not None and not isinstance(vision, Mapping):
            raise ValueError(f"vision_config must be an object, got {vision!r}")
        if vision is None:  # Phi-4's own files leave out all that their code knows.
            vision = {} if hf_config.get("model_type") == "phi4mm" else hf_config
        kind = _model_type(hf_config, vision)
        defaults = MODEL_TYPES[kind]
        values = {ours: vision[theirs] for ours, theirs in _HF_KEYS.items() if theirs in vision}
        for name in ("image_size", "patch_size"):
            if name in values:
                values[name] = _square(name, values[name])
        if defaults.get("naflex"):
            patch_size = values.get("patch_size", cls.patch_size)
            values["image_size"] = _side(vision.get("num_patches", 256)) * (
                patch_size if _is_int(patch_size) else 1
            )
        if kind == "janus_vision_model":
            values["mlp_hidden_dim"] = _janus_mlp(
                values.get("embed_dim", 1024), vision.get("mlp_ratio", 4.0)
            )
        if vision.get("mean_pooling") is True:
            values |= {"mean_pooling": True, "pooling_head": False}
        if hf_config.get("model_type") in _MINICPM and hf_config.get(
            "drop_vision_last_layer", True
        ):
            blocks = values.get("num_encoder_blocks", cls.num_encoder_blocks)
            values["num_encoder_blocks"] = blocks - 1 if _is_int(blocks) else blocks
        return cls(**{"pooling_head": True, **defaults, **values})

    def to_hf(self) -> dict[str, Any]:
        """Returns the complete flat `config.json` of the same tower as transformers' `Siglip(2)VisionModel`.

        The one thing that it cannot say is `interpolation`, which transformers leaves to the
        caller.
        """
        values = {theirs: getattr(self, ours) for ours, theirs in _HF_KEYS.items()}
        values |= {"mean_pooling": True} if self.mean_pooling else {}
        if not self.naflex:
            return {
                "architectures": ["SiglipVisionModel"],
                "model_type": "siglip_vision_model",
                **values,
            }
        del values["image_size"]
        values["num_patches"] = self.num_patches
        return {
            "architectures": ["Siglip2VisionModel"],
            "model_type": "siglip2_vision_model",
            **values,
        }


def refuse(hf_config: Mapping[str, Any]) -> None:
    """Refuses models by name whose tower is not SigLIP's, whatever they call it.

    Raises:
        ValueError: it is one of them.
    """
    vision = hf_config.get("vision_config")
    for part in (hf_config, vision if isinstance(vision, Mapping) else {}):
        if isinstance(kind := part.get("model_type"), str) and kind in _REFUSED:
            raise ValueError(f"model_type {kind!r} is refused: {_REFUSED[kind]}")


def _model_type(hf_config: Mapping[str, Any], vision: Mapping[str, Any]) -> str:
    """Finds what kind of tower it is, from the vision part where it tells, else from the whole."""
    whole, part = hf_config.get("model_type"), vision.get("model_type")
    found = _TOWER_OF.get(str(whole), whole) if part is None else part
    found = "siglip_vision_model" if found is None else found
    if (
        whole in _MINICPM
        and vision is not hf_config
        and found in (whole, "siglip", "siglip_vision_model")
    ):
        return "minicpmv_vision"
    if not isinstance(found, str) or found not in MODEL_TYPES:
        message = f"model_type must be one of {', '.join(MODEL_TYPES)}, got {found!r}"
        raise UnknownModelError(message) if vision is hf_config else ValueError(message)
    return found


def _side(num_patches: object) -> int:
    """The side of the square grid that the positions of a NaFlex tower form."""
    if not _is_int(num_patches) or num_patches < 1 or math.isqrt(num_patches) ** 2 != num_patches:
        raise ValueError(
            f"num_patches must be the number of patches of a square grid, got {num_patches!r}"
        )
    return math.isqrt(num_patches)


def _janus_mlp(embed_dim: object, mlp_ratio: object) -> int:
    if (
        not _is_int(embed_dim)
        or embed_dim > 10**9
        or not _is_number(mlp_ratio)
        or not 0 < mlp_ratio < 1000
    ):
        raise ValueError(
            f"mlp_ratio must be a number above 0, got {mlp_ratio!r} for a width of {embed_dim!r}"
        )
    return int(embed_dim * mlp_ratio)


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, float) or _is_int(value)


def _square(name: str, size: object) -> object:
    """The reference also allows a pair (height, width); this tower needs the two to be equal."""
    if not isinstance(size, (list, tuple)):
        return size
    if len(size) == 2 and size[0] == size[1]:
        return size[0]
    raise ValueError(f"{name} must be one number or two equal ones, got {size!r}")

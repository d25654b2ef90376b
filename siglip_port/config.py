"""Configuration of the SigLIP vision encoder.

Defaults are those of google/siglip-base-patch16-224, as in transformers' `SiglipVisionConfig`.
`siglip_port.checkpoint.hf_config` converts from and to `config.json`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeGuard, TypeVar

T = TypeVar("T")

HIDDEN_ACTS = ("gelu_pytorch_tanh", "gelu")
"""Supported MLP activations: GELU's tanh approximation (all Google checkpoints) or exact (erf)."""

INTERPOLATIONS = ("hf", "timm", "naflex", "big_vision", "navit", "minicpm", "vila", "crop")
"""How position embeddings are resized for other grids: see `siglip_port.patches`."""


def name_unknown_fields(cls: type[T]) -> type[T]:
    """Let the constructor of a configuration name the field that a key of transformers stands for.

    Args:
        cls: Dataclass with the fields of `siglip_port.checkpoint.hf_config.HF_KEYS`.
    """
    constructor = cls.__init__

    @functools.wraps(constructor)
    def checked_init(self: T, *args: Any, **values: Any) -> None:  # noqa: ANN401 (the fields' own)
        for name in values:
            if name not in cls.__annotations__:
                raise TypeError(describe_unknown_field(name))
        constructor(self, *args, **values)

    type.__setattr__(cls, "__init__", checked_init)
    return cls


def describe_unknown_field(name: str) -> str:
    """Describe a keyword argument that is no field of `SigLipVisionConfig`."""
    from siglip_port.checkpoint.hf_config import HF_KEYS

    for field, key in HF_KEYS.items():
        if name == key:
            return f"SigLipVisionConfig has no field {name}; use {field}="
    return (
        f"SigLipVisionConfig has no field {name}; to read a config.json of transformers, use "
        "SigLipVisionConfig.from_hf"
    )


@name_unknown_fields
@dataclass(frozen=True)
class SigLipVisionConfig:
    """Architecture of a SigLIP vision encoder; immutable and validated on creation.

    Attributes:
        num_channels: Image channels C.
        embed_dim: Token width D.
        image_size: Height and width S of an image, in pixels.
        patch_size: Height and width P of a patch, in pixels. Pixels right of and below the last
            whole patch are ignored, as in siglip-so400m-patch14-384 (27 x 27 patches).
        num_attention_heads: Attention heads H; must divide `embed_dim`.
        attention_dropout: Dropout probability of attention weights, in training only.
        num_encoder_blocks: Number of transformer blocks L.
        mlp_hidden_dim: Width of the MLP's hidden layer.
        layer_norm_eps: Epsilon of every LayerNorm.
        hidden_act: MLP activation, one of `HIDDEN_ACTS`.
        pooling_head: Whether the model has an attention pooling head.
        mean_pooling: Whether `pool` averages tokens instead, as in timm's `gap` models.
        naflex: Whether the model was trained on images of any aspect ratio (SigLIP 2 NaFlex).
            `image_size` then gives the grid of the position embeddings.
        interpolation: How position embeddings are resized for other image sizes, one of
            `INTERPOLATIONS`. None accepts `image_size` only, or uses "naflex" in a NaFlex model.

    Raises:
        ValueError: A value has the wrong type or is out of range.
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
            if field.type == "int" and not (is_int(value) and value > 0):
                raise ValueError(f"{field.name} must be a positive integer, got {value!r}")
            if field.type == "float" and not is_number(value):
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
            raise ValueError("mean_pooling and pooling_head are mutually exclusive, got both")
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
        """Patches per side of an image, S // P."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches (and tokens) N of an image, (S // P)^2."""
        return self.grid_size**2

    @property
    def has_pooled_output(self) -> bool:
        """Whether the model has an image embedding: from the pooling head or mean pooling."""
        return self.pooling_head or self.mean_pooling

    @property
    def resize_rule(self) -> str | None:
        """Interpolation of position embeddings; None if the model accepts `image_size` only."""
        if self.interpolation is None and self.naflex:
            return "naflex"
        return self.interpolation

    @classmethod
    def from_hf(cls, hf_config: Mapping[str, Any]) -> SigLipVisionConfig:
        """Build a configuration from a transformers `config.json`.

        Args:
            hf_config: The parsed file, with the encoder under `vision_config` or at the top level.
                Missing keys take their defaults; keys of other components are ignored.

        Raises:
            ValueError: The file describes another kind of model, or a value is out of range.
        """
        from siglip_port.checkpoint.hf_config import config_from_hf

        return config_from_hf(hf_config)

    def to_hf(self) -> dict[str, Any]:
        """Return the complete `config.json` of transformers' `Siglip(2)VisionModel`.

        `interpolation` is lost: transformers has no such key.
        """
        from siglip_port.checkpoint.hf_config import config_to_hf

        return config_to_hf(self)


def is_int(value: object) -> TypeGuard[int]:
    """Return whether a value is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is an int or float and not a bool."""
    return isinstance(value, float) or is_int(value)

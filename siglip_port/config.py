"""The shape of a SigLIP vision tower: names, defaults, rules, and how `config.json` spells them.

The defaults are those of transformers' `SiglipVisionConfig`, i.e. google/siglip-base-patch16-224. They matter
beyond convenience: published `config.json` files leave out every value that equals the default (that of
google/siglip-base-patch16-224 holds nothing but `patch_size`), so a missing key *means* the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

HIDDEN_ACTS = ("gelu_pytorch_tanh", "gelu")
"""The activations a SigLIP MLP may name: GELU's tanh form (all Google checkpoints), or the exact (erf) form."""

MODEL_TYPES = ("siglip", "siglip_vision_model")
"""The `model_type` of the configurations that describe this tower."""

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


@dataclass(frozen=True)
class SigLipVisionConfig:
    """Everything that determines the tower's architecture. Immutable, and checked when it is made.

    Attributes:
        num_channels: channels C of a picture.
        embed_dim: width D of a token.
        image_size: height and width of a picture, in pixels. Pictures are square.
        patch_size: height and width of a patch, in pixels. What is left at the right and lower edge of a
            picture that is not a multiple of it is ignored, as in siglip-so400m-patch14-384 (27 x 27 patches).
        num_attention_heads: heads H of every attention; divides `embed_dim`.
        attention_dropout: probability with which an attention weight is dropped, in training only.
        num_encoder_blocks: number of blocks L.
        mlp_hidden_dim: width of the MLPs' hidden layer.
        layer_norm_eps: the epsilon of all LayerNorms.
        hidden_act: the MLPs' activation, one of `HIDDEN_ACTS`.
        pooling_head: whether the model has the attention pooling head.

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

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and not (_is_int(value) and value > 0):
                raise ValueError(f"{field.name} must be a positive integer, got {value!r}")
            if field.type == "float" and not _is_number(value):
                raise ValueError(f"{field.name} must be a number, got {value!r}")
        if not isinstance(self.pooling_head, bool):
            raise ValueError(f"pooling_head must be True or False, got {self.pooling_head!r}")
        if self.embed_dim % self.num_attention_heads:
            raise ValueError(
                f"embed_dim must be divisible by num_attention_heads, got {self.embed_dim} and "
                f"{self.num_attention_heads}"
            )
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size must not exceed image_size, got {self.patch_size} and {self.image_size}")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout must lie in [0, 1), got {self.attention_dropout}")
        if not 0 < self.layer_norm_eps < 1:
            raise ValueError(f"layer_norm_eps must lie between 0 and 1, got {self.layer_norm_eps}")
        if self.hidden_act not in HIDDEN_ACTS:
            raise ValueError(f"hidden_act must be one of {', '.join(HIDDEN_ACTS)}, got {self.hidden_act!r}")

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

    @classmethod
    def from_hf(cls, hf_config: Mapping[str, Any]) -> SigLipVisionConfig:
        """Reads the contents of a transformers `config.json`.

        Args:
            hf_config: the parsed file: of a `SiglipModel` or `SiglipForImageClassification` (the vision part is
                nested under `vision_config`), or of a `SiglipVisionModel` (flat). A missing key takes its
                default; keys that do not describe the vision tower are ignored.

        Raises:
            ValueError: it describes another kind of model, or a value makes no sense.
        """
        vision = hf_config.get("vision_config")
        if vision is not None and not isinstance(vision, Mapping):
            raise ValueError(f"vision_config must be an object, got {vision!r}")
        for part in (hf_config, vision or {}):
            if part.get("model_type", MODEL_TYPES[0]) not in MODEL_TYPES:
                raise ValueError(f"model_type must be one of {', '.join(MODEL_TYPES)}, got {part['model_type']!r}")
        vision = hf_config if vision is None else vision
        values = {ours: vision[theirs] for ours, theirs in _HF_KEYS.items() if theirs in vision}
        for name in ("image_size", "patch_size"):
            if name in values:
                values[name] = _square(name, values[name])
        return cls(**{"pooling_head": True, **values})

    def to_hf(self) -> dict[str, Any]:
        """Returns the complete flat `config.json` of the same tower as a transformers `SiglipVisionModel`."""
        values = {theirs: getattr(self, ours) for ours, theirs in _HF_KEYS.items()}
        return {"architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model", **values}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, float) or _is_int(value)


def _square(name: str, size: object) -> object:
    """The reference also allows a pair (height, width); this tower needs the two to be equal."""
    if not isinstance(size, (list, tuple)):
        return size
    if len(size) == 2 and size[0] == size[1]:
        return size[0]
    raise ValueError(f"{name} must be one number or two equal ones, got {size!r}")

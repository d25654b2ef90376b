"""The architecture of a SigLIP vision encoder: names, defaults and rules.

The defaults are those of google/siglip-base-patch16-224, as in transformers' `SiglipVisionConfig`.
How `config.json` spells them: `siglip_port.checkpoint.hf_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeGuard

HIDDEN_ACTS = ("gelu_pytorch_tanh", "gelu")
"""The activations a SigLIP MLP may name: GELU's tanh form (all Google checkpoints), or the exact
(erf) form."""

INTERPOLATIONS = ("hf", "timm", "naflex", "big_vision", "navit")
"""The rules by which positions are fitted to other grids of patches: `siglip_port.patches`."""


@dataclass(frozen=True)
class SigLipVisionConfig:
    """Everything that determines the architecture. Immutable, and checked when it is made.

    Attributes:
        num_channels: channels C of a image.
        embed_dim: width D of a token.
        image_size: height and width of a image, in pixels. Images are square.
        patch_size: height and width of a patch, in pixels. What is left at the right and lower edge
            of a image that is not a multiple of it is ignored, as in siglip-so400m-patch14-384
            (27 x 27 patches).
        num_attention_heads: heads H of every attention; divides `embed_dim`.
        attention_dropout: probability with which an attention weight is dropped, in training only.
        num_encoder_blocks: number of blocks L.
        mlp_hidden_dim: width of the MLPs' hidden layer.
        layer_norm_eps: the epsilon of all LayerNorms.
        hidden_act: the MLPs' activation, one of `HIDDEN_ACTS`.
        pooling_head: whether the model has the attention pooling head.
        mean_pooling: whether `pool` is the mean of the tokens instead, as in timm's `gap` models.
        naflex: whether the model was trained on images of any shape, as SigLIP 2's NaFlex ones
            were. `image_size` then tells the grid of its positions.
        interpolation: the rule by which positions are fitted to other grids, one of
            `INTERPOLATIONS`; None for no other grids, except in a NaFlex model, which has its own.

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
        """Patches along one side of an image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Number of patches N of an image, which is also the number of tokens."""
        return self.grid_size**2

    @property
    def has_pooled_output(self) -> bool:
        """Whether the model makes one vector of an image: by its pooling head, or as a mean."""
        return self.pooling_head or self.mean_pooling

    @property
    def resize_rule(self) -> str | None:
        """The rule by which positions are fitted to other grids; None where those are refused."""
        if self.interpolation is None and self.naflex:
            return "naflex"
        return self.interpolation

    @classmethod
    def from_hf(cls, hf_config: Mapping[str, Any]) -> SigLipVisionConfig:
        """Read the contents of a transformers `config.json`.

        Args:
            hf_config: the parsed file: of a model that holds a SigLIP vision encoder (which is
                described under `vision_config`), or of the encoder alone (flat). A missing key
                takes its default; keys that do not describe the encoder are ignored.

        Raises:
            ValueError: it describes another kind of model, or a value makes no sense.
        """
        from siglip_port.checkpoint.hf_config import config_from_hf

        return config_from_hf(hf_config)

    def to_hf(self) -> dict[str, Any]:
        """Return the complete flat `config.json` of transformers' `Siglip(2)VisionModel`.

        The one thing that it cannot say is `interpolation`, which transformers leaves to the
        caller.
        """
        from siglip_port.checkpoint.hf_config import config_to_hf

        return config_to_hf(self)


def is_int(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a number, and no bool."""
    return isinstance(value, float) or is_int(value)

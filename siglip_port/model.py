"""SigLIP vision encoder, from the patch embedding to the pooling head.

Papers: SigLIP (arXiv 2303.15343), SigLIP 2 (arXiv 2502.14786).
Code: big_vision `models/vit.py`; the reference, transformers 5.23
`models/siglip/modeling_siglip.py` and, for NaFlex, `models/siglip2/modeling_siglip2.py`.

Shapes:
    B images, C channels, S x S pixels, P x P pixels per patch, N = (S // P)^2 patches (= tokens),
    D = embed_dim, H heads, L blocks

Images of different shapes are packed into one batch by `siglip_port.pack` (NaFlex):
`pixel_values` [B, N, P * P * C], `pixel_attention_mask` [B, N] and `spatial_shapes` [B, 2], where N
is the number of patches of the largest image.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, Unpack

import torch
import torch.nn.functional as F  # noqa: N812 (the name the field uses)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from siglip_port import patches, validation
from siglip_port.config import SigLipVisionConfig
from siglip_port.patches import ImageBatch, Mask, Shapes

if TYPE_CHECKING:  # files and images are imported by the methods that need them
    from siglip_port.checkpoint import LoadOptions, Preprocessing, Provenance
    from siglip_port.image_processing import Backend, ImageInput

# hidden_act -> function. SigLIP was trained with the tanh approximation; `gelu` is the exact one.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
}


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` with the same `repr` in every torch release (newer ones print `bias=True`)."""

    def extra_repr(self) -> str:
        """Format shape, eps and elementwise_affine."""
        affine = self.elementwise_affine
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={affine}"


class VisionEmbeddings(nn.Module):
    """Patch embedding plus learned position embeddings: [B, C, S, S] -> [B, N, D].

    Pixels right of and below the last whole patch are ignored. Other image sizes are supported with
    `config.resize_rule`, which interpolates the position embeddings.
    """

    def __init__(self, config: SigLipVisionConfig) -> None:
        super().__init__()
        self.config = config
        patch = config.patch_size
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.embed_dim, patch, stride=patch, padding="valid"
        )
        # `nn.Embedding(N, D)` would initialize itself, which is slow on `meta`: see `init_normal`.
        self.position_embedding = nn.Embedding.from_pretrained(
            torch.empty(config.num_patches, config.embed_dim), freeze=False
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize parameters as the reference does."""
        init_lecun_normal(self.patch_embedding)
        init_normal(self.position_embedding.weight, std=self.config.embed_dim**-0.5)

    def forward(self, pixel_values: Tensor, spatial_shapes: Shapes = None) -> Tensor:
        """Embed images [B, C, S, S] or packed patches [B, N, P * P * C]: -> [B, N, D]."""
        if spatial_shapes is not None:
            return self.embed_packed(pixel_values, spatial_shapes)
        validation.validate_images(pixel_values, self.config)
        grid = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        height, width = grid.shape[2:]  # grid: [B, D, h, w]
        return grid.flatten(2).transpose(1, 2) + self.positions(height, width)

    def embed_packed(self, pixel_values: Tensor, spatial_shapes: Shapes) -> Tensor:
        """Embed packed patches: [B, N, P * P * C] -> [B, N, D]."""
        shapes = patches.shape_pairs(spatial_shapes)
        validation.validate_packed_patches(pixel_values, shapes, spatial_shapes, self.config)
        kernel = self.patch_embedding.weight.permute(0, 2, 3, 1).flatten(1)  # [D, P * P * C]
        tokens = F.linear(pixel_values.to(kernel.dtype), kernel, self.patch_embedding.bias)
        positions = [self.padded_positions(h, w, tokens.shape[1]) for h, w in shapes]
        return tokens + torch.stack(positions)

    def positions(self, height: int, width: int) -> Tensor:
        """Return the position embeddings of a grid of patches: [height * width, D]."""
        table = self.position_embedding.weight
        if height == width == self.config.grid_size:
            return table
        assert self.config.resize_rule is not None  # validated before
        return patches.interpolate_positions(table, (height, width), self.config.resize_rule)

    def padded_positions(self, height: int, width: int, count: int) -> Tensor:
        """Pad positions with the image's first one, as the reference does: [count, D]."""
        positions = self.positions(height, width)
        padding = positions[:1].expand(count - height * width, -1)
        return torch.cat([positions, padding])


class MLP(nn.Module):
    """Two linear layers with an activation in between: [..., D] -> [..., D]."""

    def __init__(self, config: SigLipVisionConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.embed_dim, config.mlp_hidden_dim)
        self.fc2 = nn.Linear(config.mlp_hidden_dim, config.embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize parameters as the reference does."""
        for linear in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(linear.weight)
            init_normal(linear.bias, std=1e-6)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply both layers: [..., D] -> [..., D]."""
        return self.fc2(self.activation(self.fc1(hidden_states)))


class MultiheadAttention(nn.Module):
    """Multi-head scaled dot-product attention: self-attention, or cross-attention from a query.

    Args:
        config: Model configuration.
        dropout: Dropout of attention weights; None for `config.attention_dropout`.
    """

    def __init__(self, config: SigLipVisionConfig, *, dropout: float | None = None) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.dropout = config.attention_dropout if dropout is None else dropout
        self.k_proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.v_proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.q_proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.out_proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize parameters as the reference does."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, hidden_states: Tensor, query: Tensor | None = None, mask: Mask = None
    ) -> Tensor:
        """Attend from `query` [B, Q, D], or the tokens themselves, to tokens [B, N, D]: [B, Q, D].

        `mask` [B, 1, 1, N] is True for tokens to attend to; None attends to all.
        """
        if query is None:
            query = hidden_states
        q = self.split_heads(self.q_proj(query))  # [B, H, Q, D/H]
        k = self.split_heads(self.k_proj(hidden_states))  # [B, H, N, D/H]
        v = self.split_heads(self.v_proj(hidden_states))
        return self.out_proj(self.merge_heads(self.attend(q, k, v, mask)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """Attend per head: q [B, H, Q, D/H], k and v [B, H, N, D/H] -> [B, H, Q, D/H]."""
        dropout = self.dropout if self.training else 0.0
        scale = self.head_dim**-0.5
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale
        )

    def split_heads(self, x: Tensor) -> Tensor:
        """Split heads: [B, N, D] -> [B, H, N, D/H]."""
        return x.view(*x.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)

    def merge_heads(self, x: Tensor) -> Tensor:
        """Merge heads: [B, H, N, D/H] -> [B, N, D]."""
        return x.transpose(1, 2).flatten(2)


class EncoderBlock(nn.Module):
    """Pre-norm transformer block: [B, N, D] -> [B, N, D]."""

    def __init__(self, config: SigLipVisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.self_attn = MultiheadAttention(config)
        self.layer_norm2 = LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, hidden_states: Tensor, mask: Mask = None) -> Tensor:
        """Run the block: [B, N, D] -> [B, N, D]; mask [B, 1, 1, N] as in `MultiheadAttention`."""
        attended = self.self_attn(self.layer_norm1(hidden_states), mask=mask)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class SigLipEncoder(nn.Module):
    """Stack of L blocks, without a final LayerNorm: [B, N, D] -> [B, N, D].

    With `gradient_checkpointing`, blocks are recomputed in the backward pass instead of storing
    their activations.
    """

    def __init__(self, config: SigLipVisionConfig) -> None:
        super().__init__()
        blocks = [EncoderBlock(config) for _ in range(config.num_encoder_blocks)]
        self.encoder_blocks = nn.ModuleList(blocks)
        self.gradient_checkpointing = False
        self.checkpointing_kwargs: dict[str, Any] = {"use_reentrant": False}

    def forward(self, hidden_states: Tensor, mask: Mask = None) -> Tensor:
        """Run all blocks: [B, N, D] -> [B, N, D]; mask [B, 1, 1, N] as in `MultiheadAttention`."""
        for block in self.encoder_blocks:
            hidden_states = self.run_block(block, hidden_states, mask)
        return hidden_states

    def run_block(self, block: nn.Module, hidden_states: Tensor, mask: Mask) -> Tensor:
        """Run one block, checkpointed if enabled: [B, N, D] -> [B, N, D]."""
        if not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return block(hidden_states, mask)
        if self.checkpointing_kwargs["use_reentrant"] and not hidden_states.requires_grad:
            # Reentrant checkpointing computes no gradients at all unless an input requires one.
            hidden_states = hidden_states.detach().requires_grad_()
        return recompute(block, hidden_states, mask, **self.checkpointing_kwargs)


class SigLipVisionTransformer(nn.Module):
    """Embeddings, encoder and final LayerNorm: images [B, C, S, S] -> tokens [B, N, D]."""

    def __init__(self, config: SigLipVisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = SigLipEncoder(config)
        self.post_layernorm = LayerNorm(config.embed_dim, eps=config.layer_norm_eps)

    def forward(
        self, pixel_values: Tensor, pixel_attention_mask: Mask = None, spatial_shapes: Shapes = None
    ) -> Tensor:
        """Encode images [B, C, S, S] or packed patches [B, N, P * P * C] into tokens [B, N, D]."""
        hidden_states = self.embeddings(pixel_values, spatial_shapes)
        mask = patches.attention_mask(hidden_states, pixel_attention_mask, spatial_shapes)
        return self.post_layernorm(self.encoder(hidden_states, mask))


class PoolingHead(nn.Module):
    """Attention pooling with a learned probe: tokens [B, N, D] -> image embedding [B, D].

    `MAPHead` in big_vision, `SiglipMultiheadAttentionPoolingHead` in transformers. There is no
    residual around the attention and no dropout. Plain `nn.Linear`s replace the reference's
    `nn.MultiheadAttention`, so that quantization, sharding and LoRA work as in the blocks.
    """

    def __init__(self, config: SigLipVisionConfig) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, config.embed_dim))
        self.attention = MultiheadAttention(config, dropout=0.0)
        self.layernorm = LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize parameters as the reference does."""
        nn.init.xavier_uniform_(self.probe)
        for linear in (self.attention.q_proj, self.attention.k_proj, self.attention.v_proj):
            # The reference draws q, k, v as one [3D, D] matrix: sqrt(6 / 4D), not sqrt(6 / 2D).
            nn.init.xavier_uniform_(linear.weight, gain=math.sqrt(1 / 2))
        init_lecun_normal(self.attention.out_proj)

    def forward(self, tokens: Tensor, mask: Mask = None) -> Tensor:
        """Pool tokens: [B, N, D] -> [B, D]; mask [B, 1, 1, N] as in `MultiheadAttention`."""
        query = self.probe.expand(tokens.shape[0], -1, -1)
        pooled = self.attention(tokens, query=query, mask=mask)  # [B, 1, D]
        pooled = pooled + self.mlp(self.layernorm(pooled))
        return pooled.squeeze(1)


class SigLipVisionModel(nn.Module):
    """SigLIP vision encoder with an optional pooling head.

    Methods accept `pixel_values` as images [B, C, S, S] of any floating point dtype, normalized to
    [-1, 1] (mean 0.5, std 0.5); other sizes need `config.resize_rule`. They also accept packed
    patches, `model(**pack(images, patch_size))`; outputs at padded positions are then undefined.
    Outputs have the parameters' dtype. Unsupported input raises ValueError.

    Attributes:
        config: Architecture.
        provenance: Source of the weights; None for a freshly initialized model.
    """

    @torch.inference_mode(False)  # parameters made in inference mode could never be trained
    def __init__(self, config: SigLipVisionConfig) -> None:
        super().__init__()
        validation.validate_config(config)
        self.config = config
        self.provenance: Provenance | None = None
        self._preprocessing: Preprocessing | None = None
        self.transformer = SigLipVisionTransformer(config)
        self.pooling_head = PoolingHead(config) if config.pooling_head else None

    def forward(
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Mask = None,
        spatial_shapes: Shapes = None,
        **unsupported: object,
    ) -> Tensor:
        """Encode images [B, C, S, S] or packed patches [B, N, P * P * C] into tokens [B, N, D].

        The tokens have passed the final LayerNorm: `last_hidden_state` in transformers, whose other
        arguments raise TypeError with the method that replaces them.
        """
        validation.refuse_arguments(unsupported)
        return self.transformer(pixel_values, pixel_attention_mask, spatial_shapes)

    def pool(self, tokens: Tensor, pixel_attention_mask: Mask = None) -> Tensor:
        """Pool tokens [B, N, D] into image embeddings [B, D]: `pooler_output` in transformers.

        Embeddings are not L2-normalized, and SigLIP has no projection after them.
        """
        validation.validate_tokens(tokens, self.config)
        mask = patches.key_mask(tokens, pixel_attention_mask)
        if self.pooling_head is not None:
            return self.pooling_head(tokens.to(self.pooling_head.probe.dtype), mask)
        if self.config.mean_pooling:
            return patches.mean_of_tokens(tokens, mask)
        pooling = None if self.provenance is None else self.provenance.evidence.pooling
        raise ValueError(validation.explain_no_pooling(pooling))

    def embed(
        self,
        pixel_values: Tensor,
        normalize: bool = False,
        pixel_attention_mask: Mask = None,
        spatial_shapes: Shapes = None,
    ) -> Tensor:
        """Return image embeddings [B, D]: `forward`, then `pool`, L2-normalized if `normalize`."""
        tokens = self(pixel_values, pixel_attention_mask, spatial_shapes)
        mask = patches.attention_mask(tokens, pixel_attention_mask, spatial_shapes)
        if mask is not None:
            mask = mask[:, 0, 0]
        embeddings = self.pool(tokens, mask)
        return F.normalize(embeddings, dim=-1) if normalize else embeddings

    def embed_images(
        self,
        images: Sequence[ImageInput],
        *,
        batch_size: int = 32,
        normalize: bool = False,
        backend: Backend = "pil",
    ) -> Tensor:
        """Preprocess and embed image files or arrays: see `siglip_port.features.embed_images`."""
        from siglip_port import features

        return features.embed_images(self, images, batch_size, normalize, backend)

    def hidden_states(
        self,
        pixel_values: Tensor,
        layers: Sequence[int],
        pixel_attention_mask: Mask = None,
        spatial_shapes: Shapes = None,
        *,
        post_layernorm: bool = False,
        as_maps: bool = False,
    ) -> tuple[Tensor, ...]:
        """Return intermediate hidden states: see `siglip_port.features.hidden_states`."""
        from siglip_port import features

        batch = ImageBatch(pixel_values, pixel_attention_mask, spatial_shapes)
        return features.hidden_states(
            self, batch, layers, post_layernorm=post_layernorm, as_maps=as_maps
        )

    def attention_maps(
        self,
        pixel_values: Tensor,
        layers: Sequence[int],
        pixel_attention_mask: Mask = None,
        spatial_shapes: Shapes = None,
    ) -> tuple[Tensor, ...]:
        """Return attention weights of blocks: see `siglip_port.features.attention_maps`."""
        from siglip_port import features

        batch = ImageBatch(pixel_values, pixel_attention_mask, spatial_shapes)
        return features.attention_maps(self, batch, layers)

    def pooling_attention(self, tokens: Tensor, pixel_attention_mask: Mask = None) -> Tensor:
        """Return attention weights of the pooling head: see `features.pooling_attention`."""
        from siglip_port import features

        return features.pooling_attention(self, tokens, pixel_attention_mask)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute blocks in the backward pass to save memory, as in transformers.

        Only the defaults of `every_n_layers` and `offload`, which its Trainer passes, are accepted.
        """
        validation.validate_checkpointing(every_n_layers, offload)
        kwargs = activation_checkpointing_kwargs or {}
        self.transformer.encoder.checkpointing_kwargs = {"use_reentrant": False, **kwargs}
        self.transformer.encoder.gradient_checkpointing = True

    def activation_checkpointing_disable(self) -> None:
        """Store activations of blocks again."""
        self.transformer.encoder.gradient_checkpointing = False

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Do as `activation_checkpointing_enable`, under its name in older transformers."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, every_n_layers, offload)

    gradient_checkpointing_disable = activation_checkpointing_disable

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward pass; peft reads this."""
        return self.transformer.encoder.gradient_checkpointing

    def get_input_embeddings(self) -> nn.Conv2d:
        """Return the patch embedding, as transformers' `SiglipVisionModel` does."""
        return self.transformer.embeddings.patch_embedding

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.transformer.post_layernorm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return self.transformer.post_layernorm.weight.dtype

    @property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing of images, and how it is known; of a new model, that of SigLIP."""
        if self._preprocessing is None:
            from siglip_port.checkpoint import Preprocessing, default_preprocessor_config

            config = default_preprocessor_config(self.config)
            self._preprocessing = Preprocessing(config, "stated", "a new model", "model")
        return self._preprocessing

    @preprocessing.setter
    def preprocessing(self, value: Preprocessing) -> None:
        self._preprocessing = value

    @property
    def preprocessor_config(self) -> dict[str, Any]:
        """Preprocessing configuration, which `save_hf` writes as `preprocessor_config.json`."""
        return self.preprocessing.config

    @preprocessor_config.setter
    def preprocessor_config(self, value: dict[str, Any]) -> None:
        from siglip_port.checkpoint import Preprocessing

        self._preprocessing = Preprocessing(value, "stated", "set by the program", "model")

    @classmethod
    def from_hf(cls, source: str | os.PathLike[str], **options: Unpack[LoadOptions]) -> Self:
        """Load a checkpoint strictly: see `siglip_port.checkpoint.load_model` for the options."""
        from siglip_port.checkpoint.pretrained import load_model, validate_option_names

        validate_option_names(options)
        return load_model(cls, source, **options)

    def save_hf(self, folder: str | os.PathLike[str]) -> None:
        """Save in transformers format: see `siglip_port.checkpoint.save_hf`."""
        from siglip_port.checkpoint import save_hf

        save_hf(self, folder)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], **options: Unpack[LoadOptions]
    ) -> Self:
        """Do as `from_hf`, under its name in transformers."""
        return cls.from_hf(source, **options)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Do as `save_hf`, under its name in transformers."""
        self.save_hf(folder)

    def save_timm(self, folder: str | os.PathLike[str]) -> None:
        """Save in timm format: see `siglip_port.checkpoint.save_timm`."""
        from siglip_port.checkpoint import save_timm

        save_timm(self, folder)


def init_normal(tensor: Tensor, std: float) -> None:
    """Fill with N(0, std^2). Skips `meta` tensors, for which torch would import its compiler."""
    if not tensor.is_meta:
        nn.init.normal_(tensor, std=std)


def init_lecun_normal(module: nn.Conv2d | nn.Linear) -> None:
    """Initialize as Flax does by default: truncated normal of variance 1 / fan_in, zero bias.

    0.8796 is the standard deviation of a unit normal truncated at 2 standard deviations. The
    reference truncates at the value 2 instead, yet divides by that factor; so does the port.
    """
    fan_in = module.weight[0].numel()
    nn.init.trunc_normal_(module.weight, std=math.sqrt(1 / fan_in) / 0.87962566103423978)
    assert module.bias is not None
    nn.init.zeros_(module.bias)

"""The SigLIP vision tower, leaf to root, in the order in which a pixel flows.

Sources: SigLIP (Zhai et al. 2023, arXiv 2303.15343) and SigLIP 2 (Tschannen et al. 2025, arXiv
    2502.14786); the
original, big_vision `models/vit.py`; and the references that this port equals, transformers 5.23
`models/siglip/modeling_siglip.py` and, for NaFlex, `models/siglip2/modeling_siglip2.py`.

Shapes: B pictures, C channels, S x S pixels, P x P pixels a patch, N = (S // P)^2 patches = tokens,
    D = embed_dim,
H heads of width D / H, L blocks, M = mlp_hidden_dim. Pictures of several shapes come as packed
patches (NaFlex):
`pixel_values` [B, N, P * P * C], `pixel_attention_mask` [B, N] and `spatial_shapes` [B, 2], as
`siglip_port.patches.pack` and transformers' `Siglip2ImageProcessor` make them; N is then that of
the largest.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812 (the name the field uses)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from siglip_port.checkpoint import layouts as key_map
from siglip_port.checkpoint import preprocessor_config as processors
from siglip_port.checkpoint import reader as checkpoints
from siglip_port.checkpoint import registry as architectures
from siglip_port.checkpoint.formats import DTYPES
from siglip_port.checkpoint.reader import Checkpoint, CheckpointError, Provenance
from siglip_port.config import SigLipVisionConfig
from siglip_port.hub.repository import find_source
from siglip_port.patches import positions

if TYPE_CHECKING:  # Pillow takes a while, and only pictures need it
    from siglip_port.image_processing import Backend, Picture

_Model = TypeVar("_Model", bound="SigLipVisionModel")

# hidden_act -> the function. SigLIP was trained with the tanh form; `gelu` names the exact one.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
}


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, printed the same by every release.

    Newer ones add `bias=True` to the module tree.
    """

    def extra_repr(self) -> str:
        """Returns shape, eps and whether there are learned parameters."""
        return (
            f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"
        )


Shapes = Tensor | Sequence[tuple[int, int]]
"""Patches downwards and across of B pictures, (h, w).

A tensor [B, 2] or pairs of ints, with which nothing waits for
the device and `torch.compile` sees constants."""

_GRIDS_KEPT = 64  # fitted positions in the cache


class VisionEmbeddings(nn.Module):
    """Cuts pictures into patches, projects each to a token, and adds the learned position embedding.

    [B, C, S, S] -> [B, N, D]. Pixels beyond the last whole patch, at the right and lower edge, are
    ignored. With a rule to fit positions to other grids (`config.resize_rule`), also [B, C, height,
    width]; and packed patches.

    Raises:
        ValueError: in `forward`, where the input is not a floating point tensor of a shape that can
            be taken.
    """

    def __init__(self, config: SigLipVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv2d(
            config.num_channels,
            config.embed_dim,
            kernel_size=config.patch_size,
            stride=config.patch_size,
            padding="valid",
        )
        # As `nn.Embedding(N, D)`, without torch's own initialisation: see `_normal_`.
        self.position_embedding = nn.Embedding.from_pretrained(
            torch.empty(config.num_patches, config.embed_dim), freeze=False
        )
        self._fitted: dict[tuple[int, int], Tensor] = {}
        self._fitted_from: tuple[Tensor, tuple[object, ...]] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws fresh parameters as the reference does."""
        _lecun_normal_(self.patch_embedding)
        _normal_(self.position_embedding.weight, std=self.config.embed_dim**-0.5)

    def forward(self, pixel_values: Tensor, spatial_shapes: Shapes | None = None) -> Tensor:
        """[B, C, S, S] -> [B, N, D], in the dtype of the parameters.

        Packed patches with `spatial_shapes`.
        """
        if spatial_shapes is not None:
            return self._packed(pixel_values, spatial_shapes)
        self._check(pixel_values)
        patches = self.patch_embedding(
            pixel_values.to(self.patch_embedding.weight.dtype)
        )  # [B, D, h, w]
        return patches.flatten(2).transpose(1, 2) + self.positions(
            patches.shape[2], patches.shape[3]
        )

    def positions(self, height: int, width: int) -> Tensor:
        """The position embeddings of a grid of patches, [height * width, D].

        Fitted, if it is not the tower's own grid.

        In `eval()` mode and without gradients, what has been fitted is kept for the next time.
        Nothing tells when weights are written to through `.data`: call `train()` and `eval()` after
        that. Fused optimizers do so too; for them, a pass with gradients forgets what was kept, and
        while gradients are pending, nothing is kept.
        """
        weight, rule = self.position_embedding.weight, self.config.resize_rule
        tracked, pending = torch.is_grad_enabled(), weight.grad is not None  # a step may follow
        if tracked and self._fitted:
            self._fitted, self._fitted_from = {}, None
        if height == width == self.config.grid_size:
            return weight
        assert rule is not None
        if (
            tracked
            or pending
            or self.training
            or torch.compiler.is_compiling()
            or weight.is_inference()
        ):
            return positions(weight, (height, width), rule)
        # The table is kept too: as long as it is, no other one can lie at its address.
        made_of = (weight.data_ptr(), weight._version, weight.dtype, weight.device)
        if self._fitted_from is None or self._fitted_from[1] != made_of:
            self._fitted, self._fitted_from = {}, (weight.detach(), made_of)
        kept = self._fitted  # another thread may put another in its place
        fitted = kept.get((height, width))
        if fitted is None:
            fitted = positions(weight, (height, width), rule)
            if len(kept) >= _GRIDS_KEPT:
                kept.clear()
            kept[height, width] = fitted
        return fitted

    def train(self, mode: bool = True) -> Self:
        """Sets the mode, and forgets fitted positions."""
        self._fitted, self._fitted_from = {}, None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: all but the fitted positions."""
        return {**self.__dict__, "_fitted": {}, "_fitted_from": None}

    def _packed(self, patches: Tensor, spatial_shapes: Shapes) -> Tensor:
        """[B, N, P * P * C] -> [B, N, D].

        The padding gets the picture's first position, as in the reference.
        """
        weight, number = (
            self.patch_embedding.weight,
            patches.shape[1] if isinstance(patches, Tensor) else 0,
        )
        shapes = self._check_packed(patches, spatial_shapes)
        rows = []
        for height, width in shapes:
            own = self.positions(height, width)
            rows.append(torch.cat([own, own[:1].expand(number - height * width, -1)]))
        flat = weight.permute(0, 2, 3, 1).flatten(1)  # the channel fastest
        return F.linear(patches.to(weight.dtype), flat, self.patch_embedding.bias) + torch.stack(
            rows
        )

    def _check(self, pixel_values: Tensor) -> None:
        c, size, patch = self.config.num_channels, self.config.image_size, self.config.patch_size
        rule = self.config.resize_rule
        shape = (
            f"[B, {c}, {size}, {size}]"
            if rule is None
            else f"[B, {c}, height, width], both at least {patch}"
        )
        expected = f"pixel_values must be a floating point tensor of shape {shape}"
        if not isinstance(pixel_values, Tensor):
            raise ValueError(f"{expected}, got a {type(pixel_values).__name__}")
        sides = pixel_values.shape[2:]
        fits = sides == (size, size) if rule is None else len(sides) == 2 and min(sides) >= patch
        if pixel_values.shape[1:2] != (c,) or not fits or not pixel_values.is_floating_point():
            remedy = "resize and normalise the pictures"
            if not pixel_values.is_floating_point():
                remedy = "convert them to floating point and normalise them to [-1, 1]"
            elif pixel_values.ndim == 4 and pixel_values.shape[-1] == c != pixel_values.shape[1]:
                remedy = "the channels come first: pixel_values.permute(0, 3, 1, 2)"
            elif pixel_values.ndim == 3:
                single = pixel_values.shape[0] == c and pixel_values.shape[1] > 1
                remedy = "packed patches come with their spatial_shapes"
                remedy = (
                    "a single picture needs a batch of one: pixel_values[None]"
                    if single
                    else remedy
                )
            elif rule is None and len(sides) == 2 and pixel_values.shape[1] == c:
                remedy += (
                    ", or let positions be fitted to them: SigLipVisionConfig(interpolation='hf')"
                )
            raise ValueError(
                f"{expected}, got {pixel_values.dtype} of shape {list(pixel_values.shape)}; "
                f"{remedy}"
            )

    def _check_packed(self, patches: Tensor, spatial_shapes: Shapes) -> list[tuple[int, int]]:
        width = self.config.patch_size**2 * self.config.num_channels
        expected = f"with spatial_shapes, pixel_values must be a floating point tensor of shape [B, N, {width}]"
        if not isinstance(patches, Tensor):
            raise ValueError(f"{expected}, got a {type(patches).__name__}")
        if patches.ndim != 3 or patches.shape[2] != width or not patches.is_floating_point():
            raise ValueError(f"{expected}, got {patches.dtype} of shape {list(patches.shape)}")
        shapes, number, grid = _pairs(spatial_shapes), patches.shape[1], self.config.grid_size
        if len(shapes) != len(patches) or not all(
            h > 0 and w > 0 and h * w <= number for h, w in shapes
        ):
            raise ValueError(
                f"spatial_shapes must be {len(patches)} pairs of patches downwards and across, "
                "together at most "
                f"{number}, got {spatial_shapes}"
            )
        if self.config.resize_rule is None and any(shape != (grid, grid) for shape in shapes):
            raise ValueError(
                f"this tower takes pictures of {grid} x {grid} patches only, got {list(shapes)}; "
                "let positions be "
                "fitted to others: SigLipVisionConfig(interpolation='naflex')"
            )
        return shapes


def _pairs(spatial_shapes: Shapes) -> list[tuple[int, int]]:
    """The shapes as numbers; none at all where they are no pairs of whole numbers."""
    rows: object = spatial_shapes.tolist() if hasattr(spatial_shapes, "tolist") else spatial_shapes
    rows = rows if isinstance(rows, (list, tuple)) else []
    pairs = [tuple(row) for row in rows if isinstance(row, (list, tuple)) and len(row) == 2]
    whole = len(pairs) == len(rows) and all(isinstance(n, int) for pair in pairs for n in pair)
    return [(pair[0], pair[1]) for pair in pairs] if whole else []


class MLP(nn.Module):
    """Two layers with an activation between them. [..., D] -> [..., D]."""

    def __init__(self, config: SigLipVisionConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.embed_dim, config.mlp_hidden_dim)
        self.fc2 = nn.Linear(config.mlp_hidden_dim, config.embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws fresh parameters as the reference does."""
        for linear in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(linear.weight)
            _normal_(linear.bias, std=1e-6)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.fc2(self.activation(self.fc1(hidden_states)))


class MultiheadAttention(nn.Module):
    """Scaled dot-product attention with H heads: of tokens to themselves, or of a query to tokens.

    Args:
        config: the tower's configuration.
        dropout: in training only, and instead of the configuration's.
    """

    def __init__(self, config: SigLipVisionConfig, *, dropout: float | None = None) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.dropout = config.attention_dropout if dropout is None else dropout
        self.k_proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.v_proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.q_proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.out_proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws fresh parameters as the reference does."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, hidden_states: Tensor, query: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Lets `query` attend to `hidden_states`.

        Args:
            hidden_states: [B, N, D], what keys and values are made of.
            query: [B, Q, D]; None for `hidden_states` itself.
            mask: [B, 1, 1, N], True where there is something to attend to; None for everywhere.

        Returns:
            [B, Q, D].
        """
        q = self._split_heads(
            self.q_proj(hidden_states if query is None else query)
        )  # [B, H, Q, D/H]
        k = self._split_heads(self.k_proj(hidden_states))  # [B, H, N, D/H]
        v = self._split_heads(self.v_proj(hidden_states))
        context = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.head_dim**-0.5,
        )
        return self.out_proj(context.transpose(1, 2).flatten(2))

    def attention_map(
        self, hidden_states: Tensor, query: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Returns how much each query attends to each token, [B, H, Q, N].

        Rows of sum 1, without dropout.
        """
        asking = hidden_states if query is None else query
        q, k = (self._split_heads(x) for x in (self.q_proj(asking), self.k_proj(hidden_states)))
        scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
        return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(dim=-1)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)


class EncoderBlock(nn.Module):
    """One pre-norm transformer block. [B, N, D] -> [B, N, D]."""

    def __init__(self, config: SigLipVisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.self_attn = MultiheadAttention(config)
        self.layer_norm2 = LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]. The mask is that of `MultiheadAttention`."""
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states), mask=mask)
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class SigLipEncoder(nn.Module):
    """All L blocks, one after the other. [B, N, D] -> [B, N, D], not normalised at the end.

    Attributes:
        gradient_checkpointing: whether to compute, in training, every block a second time on the
            way back, instead of keeping what it computed.
        checkpointing_kwargs: for `torch.utils.checkpoint.checkpoint`.
    """

    def __init__(self, config: SigLipVisionConfig) -> None:
        super().__init__()
        self.encoder_blocks = nn.ModuleList(
            EncoderBlock(config) for _ in range(config.num_encoder_blocks)
        )
        self.gradient_checkpointing = False
        self.checkpointing_kwargs: dict[str, Any] = {"use_reentrant": False}

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        for block in self.encoder_blocks:
            hidden_states = self._through(block, hidden_states, mask)
        return hidden_states

    def states(self, hidden_states: Tensor, mask: Tensor | None = None) -> Iterator[Tensor]:
        """Yields the L + 1 hidden states [B, N, D], the input first.

        A block runs only when its output is asked for.
        """
        yield hidden_states
        for block in self.encoder_blocks:
            hidden_states = self._through(block, hidden_states, mask)
            yield hidden_states

    def _through(self, block: nn.Module, hidden_states: Tensor, mask: Tensor | None) -> Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return recompute(block, hidden_states, mask, **self.checkpointing_kwargs)
        return block(hidden_states, mask)


class SigLipVisionTransformer(nn.Module):
    """From pictures to tokens. [B, C, S, S] -> [B, N, D]."""

    def __init__(self, config: SigLipVisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = SigLipEncoder(config)
        self.post_layernorm = LayerNorm(config.embed_dim, eps=config.layer_norm_eps)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Shapes | None = None,
    ) -> Tensor:
        """[B, C, S, S] -> [B, N, D]; or packed patches."""
        hidden_states = self.embeddings(pixel_values, spatial_shapes)
        mask = key_mask(hidden_states, pixel_attention_mask, spatial_shapes)
        return self.post_layernorm(self.encoder(hidden_states, mask))


def key_mask(
    tokens: Tensor, pixel_attention_mask: Tensor | None, spatial_shapes: Shapes | None
) -> Tensor | None:
    """Which tokens [B, N, D] are not padding, as attention takes it: [B, 1, 1, N], bool.

    None for pictures.

    Without a `pixel_attention_mask` [B, N], the shapes tell: what comes after a picture's last
    patch is padding.

    Raises:
        ValueError: there is a mask, but no shapes; or it has another shape.
    """
    if spatial_shapes is None:
        if pixel_attention_mask is not None:
            raise ValueError(
                "pixel_attention_mask goes with spatial_shapes, got the mask alone; pass both or "
                "neither"
            )
        return None
    if pixel_attention_mask is None:
        shapes = torch.as_tensor(_pairs(spatial_shapes), device=tokens.device)
        return (torch.arange(tokens.shape[1], device=shapes.device) < shapes.prod(1, keepdim=True))[
            :, None, None
        ]
    return _mask_of(tokens, pixel_attention_mask)


def _mask_of(tokens: Tensor, pixel_attention_mask: Tensor) -> Tensor:
    if not isinstance(pixel_attention_mask, Tensor):
        raise ValueError(
            f"pixel_attention_mask must be a tensor, got a {type(pixel_attention_mask).__name__}"
        )
    if pixel_attention_mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"pixel_attention_mask must have the shape {list(tokens.shape[:2])} of batch and "
            "patches, got "
            f"{list(pixel_attention_mask.shape)}"
        )
    return pixel_attention_mask.bool()[:, None, None]


class PoolingHead(nn.Module):
    """From tokens to one vector a picture: a learned probe attends to all of them.

    [B, N, D] -> [B, D].

    Called MAPHead in big_vision and SiglipMultiheadAttentionPoolingHead in the reference. There is
    no residual connection around its attention, and no attention dropout even in training. Built of
    plain `Linear`s, where the reference has an `nn.MultiheadAttention`, so that it quantises,
    shards and takes adapters like the blocks.
    """

    def __init__(self, config: SigLipVisionConfig) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, config.embed_dim))
        self.attention = MultiheadAttention(config, dropout=0.0)
        self.layernorm = LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws fresh parameters as the reference does."""
        nn.init.xavier_uniform_(self.probe)
        for linear in (self.attention.q_proj, self.attention.k_proj, self.attention.v_proj):
            # The reference draws the three as one [3D, D] matrix: sqrt(6 / 4D) instead of sqrt(6 /
            # 2D).
            nn.init.xavier_uniform_(linear.weight, gain=math.sqrt(1 / 2))
        _lecun_normal_(self.attention.out_proj)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, D]. The mask is that of `MultiheadAttention`."""
        pooled = self.attention(
            tokens, query=self.probe.expand(tokens.shape[0], -1, -1), mask=mask
        )  # [B, 1, D]
        pooled = pooled + self.mlp(self.layernorm(pooled))
        return pooled.squeeze(1)


class SigLipVisionModel(nn.Module):
    """The SigLIP vision tower, with its pooling head if `config.pooling_head`.

    ```python
    model = SigLipVisionModel.from_hf("google/siglip-base-patch16-224")
    tokens = model(pixel_values)        # [B, N, D]
    vectors = model.pool(tokens)        # [B, D]
    vectors = model.embed(pixel_values) # both in one call
    ```

    All methods that take `pixel_values` take pictures, [B, C, S, S]; or, with `spatial_shapes`,
    packed patches:
    `model(**pack(pictures, patch_size))`. What they compute for the padding of a batch means
    nothing.

    Attributes:
        config: the architecture.
        provenance: where the weights come from; None for a freshly initialised model.
        preprocessor_config: how pictures become `pixel_values`: what `save_hf` writes as
            `preprocessor_config.json`.
    """

    def __init__(self, config: SigLipVisionConfig) -> None:
        super().__init__()
        if not isinstance(config, SigLipVisionConfig):
            raise ValueError(
                f"config must be a SigLipVisionConfig, got a {type(config).__name__}; to load a "
                "checkpoint, use "
                "SigLipVisionModel.from_hf"
            )
        self.config = config
        self.provenance: Provenance | None = None
        self.preprocessor_config = processors.default(config)
        self.transformer = SigLipVisionTransformer(config)
        self.pooling_head = PoolingHead(config) if config.pooling_head else None

    def forward(
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Shapes | None = None,
    ) -> Tensor:
        """Turns pictures into tokens, after the last LayerNorm.

        Args:
            pixel_values: [B, C, S, S], of any floating point dtype, normalised with mean 0.5 and
                std 0.5; of any height and width where `config.resize_rule` says how positions are
                fitted to them; or packed patches, [B, N, P * P * C].
            pixel_attention_mask: [B, N], of packed patches: what is zero is not attended to. None
                for what `spatial_shapes` say.
            spatial_shapes: [B, 2], of packed patches: how many a picture has downwards and across.

        Returns:
            [B, N, D], in the dtype of the parameters.

        Raises:
            ValueError: the input has another shape, or is not of a floating point dtype.
        """
        return self.transformer(pixel_values, pixel_attention_mask, spatial_shapes)

    def pool(self, tokens: Tensor, pixel_attention_mask: Tensor | None = None) -> Tensor:
        """Turns the tokens of `forward` into one vector a picture: SigLIP's image embedding.

        Args:
            tokens: [B, N, D].
            pixel_attention_mask: [B, N], zero where a token is padding; None where none is.

        Returns:
            [B, D]. It is not of unit length; SigLIP has no further projection.

        Raises:
            ValueError: the model has no pooling head, or the tokens have another shape.
        """
        mask = self._check_tokens(tokens, pixel_attention_mask)
        if self.pooling_head is not None:
            return self.pooling_head(tokens.to(self.pooling_head.probe.dtype), mask)
        if not self.config.mean_pooling:
            raise ValueError(
                "this model has no pooling head, so it cannot make one vector of the tokens; load "
                "a checkpoint that "
                "has one, without pooling_head=False, or pool the tokens yourself, for example "
                "tokens.mean(dim=1)"
            )
        if mask is None:
            return tokens.mean(dim=1)
        counted = mask[:, 0, 0, :, None].to(torch.promote_types(tokens.dtype, torch.float32))
        return (tokens * (counted / counted.sum(dim=1, keepdim=True)).to(tokens.dtype)).sum(dim=1)

    def embed(
        self,
        pixel_values: Tensor,
        normalize: bool = False,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Shapes | None = None,
    ) -> Tensor:
        """Turns pictures into one vector each: `forward`, then `pool`.

        Args:
            pixel_values: like the last two, as for `forward`.
            normalize: whether to scale every vector to unit length, for cosine similarity.
            pixel_attention_mask: see `forward`.
            spatial_shapes: see `forward`.

        Returns:
            [B, D].

        Raises:
            ValueError: as for `forward` and `pool`.
        """
        tokens = self(pixel_values, pixel_attention_mask, spatial_shapes)
        mask = key_mask(tokens, pixel_attention_mask, spatial_shapes)
        pooled = self.pool(tokens, None if mask is None else mask[:, 0, 0])
        return F.normalize(pooled, dim=-1) if normalize else pooled

    @torch.inference_mode()
    def embed_images(
        self,
        pictures: Sequence[Picture],
        *,
        batch_size: int = 32,
        normalize: bool = False,
        backend: Backend = "pil",
    ) -> Tensor:
        """Turns pictures as they are into one vector each.

        `siglip_port.image_processing.ImageProcessor`, then `embed`.

        Args:
            pictures: paths, contents of files, pictures of Pillow's, or uint8 arrays or tensors;
                one or several.
            batch_size: how many at a time.
            normalize: whether to scale every vector to unit length.
            backend: what resizes: `pil`, or `torchvision`, which is an extra.

        Returns:
            [B, D], on the model's device.

        Raises:
            siglip_port.image_processing.ImageError: a picture cannot be read; the message says
                which.
            ValueError: as for `embed`, or `preprocessor_config` cannot be followed.
        """
        from siglip_port.image_processing import ImageProcessor, listed

        processor = ImageProcessor.from_config(self.preprocessor_config, backend)
        home, several = self.transformer.post_layernorm.weight, listed(pictures)
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number from 1 on, got {batch_size!r}")
        vectors = []
        for first in range(0, len(several), batch_size):
            pixels: Any = processor(several[first : first + batch_size])
            moved = {name: part.to(home.device) for name, part in pixels.items()}
            vectors.append(self.embed(**moved, normalize=normalize))
        return torch.cat(vectors) if vectors else home.new_zeros(0, self.config.embed_dim)

    def hidden_states(
        self,
        pixel_values: Tensor,
        layers: Sequence[int],
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Shapes | None = None,
        *,
        post_layernorm: bool = False,
        as_maps: bool = False,
    ) -> tuple[Tensor, ...]:
        """Returns what stands between the blocks.

        Blocks after the last that is asked for do not run.

        Args:
            pixel_values: like the two after `layers`, as for `forward`.
            layers: which, as transformers counts them: 0 is what enters the first block, i what
                leaves the i-th, so that L or -1 leaves the last, -2 the last but one.
            pixel_attention_mask: see `forward`.
            spatial_shapes: see `forward`.
            post_layernorm: whether to put each through the last LayerNorm. The tower's own tokens
                are those of -1 with it; `hidden_states` of transformers are without.
            as_maps: whether to return them as [B, D, h, w] instead of [B, N, D]; for pictures only,
                since packed ones have no shape in common.

        Returns:
            One tensor for each of `layers`, in their order.

        Raises:
            ValueError: there is no such layer; maps of packed patches are asked for; or as for
                `forward`.
        """
        if as_maps and spatial_shapes is not None:
            raise ValueError(
                "as_maps needs pictures of one shape, got packed patches; take the tokens, without "
                "padding"
            )
        wanted = self._layers(layers, self.config.num_encoder_blocks + 1)
        states, _ = self._states(pixel_values, pixel_attention_mask, spatial_shapes)
        found = {
            i: state
            for i, state in zip(range(max(wanted) + 1), states, strict=False)
            if i in wanted
        }
        if post_layernorm:
            found = {i: self.transformer.post_layernorm(state) for i, state in found.items()}
        if as_maps:
            grid = [side // self.config.patch_size for side in pixel_values.shape[2:]]
            found = {i: state.transpose(1, 2).unflatten(2, grid) for i, state in found.items()}
        return tuple(found[i] for i in wanted)

    def attention_maps(
        self,
        pixel_values: Tensor,
        layers: Sequence[int],
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Shapes | None = None,
    ) -> tuple[Tensor, ...]:
        """Returns how much each token attends to each other one, in chosen blocks.

        The others run as fast as ever.

        Args:
            pixel_values: like the two after `layers`, as for `forward`.
            layers: which blocks, from 0 to L - 1; -1 is the last.
            pixel_attention_mask: see `forward`.
            spatial_shapes: see `forward`.

        Returns:
            [B, H, N, N] for each of `layers`, in their order: every row sums to 1.

        Raises:
            ValueError: there is no such block; or as for `forward`.
        """
        wanted = self._layers(layers, self.config.num_encoder_blocks)
        states, mask = self._states(pixel_values, pixel_attention_mask, spatial_shapes)
        maps = {}
        for i, state in zip(range(max(wanted) + 1), states, strict=False):
            if i in wanted:
                block = self.transformer.encoder.encoder_blocks[i]
                assert isinstance(block, EncoderBlock)
                maps[i] = block.self_attn.attention_map(block.layer_norm1(state), mask=mask)
        return tuple(maps[i] for i in wanted)

    def pooling_attention(
        self, tokens: Tensor, pixel_attention_mask: Tensor | None = None
    ) -> Tensor:
        """Returns how much the pooling head's probe attends to each token.

        Args:
            tokens: [B, N, D], of `forward`.
            pixel_attention_mask: [B, N], as for `pool`.

        Returns:
            [B, H, N]: every row sums to 1.

        Raises:
            ValueError: as for `pool`.
        """
        mask = self._check_tokens(tokens, pixel_attention_mask)
        if self.pooling_head is None:
            raise ValueError(
                "this model has no pooling head, so nothing attends to the tokens; load one that "
                "has"
            )
        tokens = tokens.to(self.pooling_head.probe.dtype)
        probe = self.pooling_head.probe.expand(tokens.shape[0], -1, -1)
        return self.pooling_head.attention.attention_map(tokens, probe, mask)[:, :, 0]

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Trains with less memory and more time.

        Every block is computed a second time on the way back.

        Args:
            gradient_checkpointing_kwargs: for `torch.utils.checkpoint.checkpoint`, as transformers'
                method takes them.
        """
        self.transformer.encoder.gradient_checkpointing = True
        self.transformer.encoder.checkpointing_kwargs = {
            "use_reentrant": False,
            **(gradient_checkpointing_kwargs or {}),
        }

    def gradient_checkpointing_disable(self) -> None:
        """Undoes `gradient_checkpointing_enable`."""
        self.transformer.encoder.gradient_checkpointing = False

    def _states(
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None,
        spatial_shapes: Shapes | None,
    ) -> tuple[Iterator[Tensor], Tensor | None]:
        """All hidden states, computed one by one when they are asked for, and the mask."""
        hidden_states = self.transformer.embeddings(pixel_values, spatial_shapes)
        mask = key_mask(hidden_states, pixel_attention_mask, spatial_shapes)
        return self.transformer.encoder.states(hidden_states, mask), mask

    def _check_tokens(self, tokens: Tensor, pixel_attention_mask: Tensor | None) -> Tensor | None:
        """Checks what is to be pooled; returns the mask as attention takes it."""
        expected = (
            f"tokens must be a floating point tensor of shape [B, N, {self.config.embed_dim}]"
        )
        if not isinstance(tokens, Tensor):
            raise ValueError(f"{expected}, got a {type(tokens).__name__}")
        if (
            tokens.ndim != 3
            or tokens.shape[-1] != self.config.embed_dim
            or not tokens.is_floating_point()
        ):
            raise ValueError(f"{expected}, got {tokens.dtype} of shape {list(tokens.shape)}")
        return None if pixel_attention_mask is None else _mask_of(tokens, pixel_attention_mask)

    @staticmethod
    def _layers(layers: Sequence[int], count: int) -> list[int]:
        if (
            not isinstance(layers, Sequence)
            or not layers
            or not all(isinstance(i, int) for i in layers)
        ):
            raise ValueError(
                f"layers must be one or more whole numbers in a list or tuple, got {layers!r}"
            )
        if wrong := [i for i in layers if not -count <= i < count]:
            raise ValueError(f"layers must lie between {-count} and {count - 1}, got {wrong[0]}")
        return [i % count for i in layers]

    @classmethod
    def from_hf(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        pooling_head: bool | None = None,
        interpolation: str | None = None,
        layout: str | None = None,
        prefix: str | None = None,
        config: SigLipVisionConfig | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        vision_only: bool = True,
    ) -> Self:
        """Loads a checkpoint that holds a SigLIP tower.

        All of the tower, or an error that says what is wrong.

        Reads the layouts of transformers, timm, open_clip and big_vision, and of many
        vision-language models, in one file or in shards: see docs/checkpoints.md.
        `print(model.provenance)` tells what was recognised.

        Args:
            source: a Hub id, a folder, a `.safetensors` file with its configuration beside it, or
                an `.npz` file. What exists on this machine is taken as a path. Also
                `name@revision`, `hf://...`, `hf-hub:...`, and the address of a model's page on the
                Hub, or of one of its weights files.
            revision: branch, tag or commit of a Hub repository; of no meaning for a path.
            dtype: dtype of the parameters; None for that of the file.
            device: where to put the parameters; None for the CPU, where they are mapped from the
                file.
            pooling_head: None to keep the pooling head if the checkpoint has one, True to demand
                one, False to leave it out and unread.
            interpolation: the rule by which positions are fitted to pictures of other sizes, one of
                `siglip_port.config.INTERPOLATIONS`; None for the checkpoint's own, which most have
                not: then pictures of other sizes are refused.
            layout: the name of one of `siglip_port.checkpoint.layouts.LAYOUTS`; None to recognise
                it.
            prefix: what stands before the tower's names in the file, such as `vision_model.`; None
                to find it.
            config: the architecture, where the checkpoint does not tell it, or tells it wrongly.
            local_files_only: look into the Hub's local cache only, never ask the network.
            token: Hub token, True for the stored one, False for none.
            cache_dir: instead of the Hub's usual cache folder.
            vision_only: of weights on the Hub, fetch the tower alone, where that is less than the
                file; False for whole files, which other libraries find in the cache, too, and whose
                hash the Hub tells.

        Returns:
            The model in `eval()` mode.

        Raises:
            CheckpointError: the checkpoint cannot be found, or does not hold exactly one SigLIP
                tower.
            ValueError: `dtype`, `device`, `interpolation` or `layout` is none that there is.
        """
        if dtype is not None and dtype not in DTYPES.values():
            raise ValueError(
                f"dtype must be one of {', '.join(map(str, DTYPES.values()))}, got {dtype!r}"
            )
        try:
            if torch.empty(0, device=device).is_meta:
                raise ValueError("device must be one that holds values, got 'meta'")
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"device {device!r} cannot be used on this machine: {reason}"
            ) from error
        if config is not None and not isinstance(config, SigLipVisionConfig):
            raise ValueError(f"config must be a SigLipVisionConfig, got a {type(config).__name__}")
        if prefix is not None and not isinstance(prefix, str):
            raise ValueError(f"prefix must be a text, got {prefix!r}")
        if isinstance(token, str) and not re.fullmatch(r"[!-~]+", token):
            raise ValueError(
                "token must be the Hub token itself: it has characters, or is as short, as none "
                "can be"
            )
        replace(
            config or SigLipVisionConfig(), interpolation=interpolation
        )  # refuses a rule that does not exist
        files = find_source(
            source,
            revision=revision,
            local_files_only=local_files_only,
            token=token,
            cache_dir=cache_dir,
            vision_only=vision_only,
        )
        checkpoint = Checkpoint(
            files, pooling_head=pooling_head, layout=layout, prefix=prefix, config=config
        )
        rule = interpolation or checkpoint.config.interpolation
        model, shapes = on_meta(replace(checkpoint.config, interpolation=rule), files.title, cls)
        tensors, model.provenance = checkpoint.read(shapes, dtype=dtype, device=device)
        model.load_state_dict(tensors, strict=True, assign=True)
        model.preprocessor_config = checkpoint.processor
        return model.eval()

    def save_hf(self, folder: str | os.PathLike[str]) -> None:
        """Writes the model as a HuggingFace `SiglipVisionModel`, or `Siglip2VisionModel` if it is a NaFlex tower.

        Writes `model.safetensors`, a complete `config.json` and `preprocessor_config.json`. Tensors
        are named as on the Hub (prefix `vision_model.`), which old and new releases of transformers
        read.

        Args:
            folder: where to; made if it does not exist. The three files are replaced if they are
                there already.

        Raises:
            CheckpointError: the parameters are no longer those of the tower (wrapped, quantised,
                with adapters), or the folder cannot be written.
        """
        layout = key_map.HUGGINGFACE_NAFLEX if self.config.naflex else key_map.HUGGINGFACE
        documents = {
            checkpoints.CONFIG: self.config.to_hf(),
            processors.PREPROCESSOR: self.preprocessor_config,
        }
        self._save(folder, layout, key_map.PREFIX, documents)

    def save_timm(self, folder: str | os.PathLike[str]) -> None:
        """Writes the model as timm does: `model.safetensors` and timm's `config.json`.

        `timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=0)` loads it, with the
        activation of the tower. timm reads pictures its own way: it crops them, where transformers
        does not.

        Args:
            folder: where to; made if it does not exist. The two files are replaced if they are
                there already.

        Raises:
            CheckpointError: as for `save_hf`.
            ValueError: timm has no model of this architecture.
        """
        layout = key_map.TIMM_NAFLEX if self.config.naflex else key_map.TIMM
        documents = {
            checkpoints.CONFIG: architectures.timm_config(self.config, self.preprocessor_config)
        }
        self._save(folder, layout, "", documents)

    def _save(
        self,
        folder: str | os.PathLike[str],
        layout: key_map.Layout,
        prefix: str,
        documents: Mapping[str, Mapping[str, Any]],
    ) -> None:
        _, shapes = on_meta(self.config)
        origin = None if self.provenance is None else self.provenance.origin
        checkpoints.save(
            folder, layout, prefix, self.config, self.state_dict(), shapes, documents, origin
        )


def on_meta(
    config: SigLipVisionConfig,
    name: str = "the configuration",
    kind: type[_Model] = SigLipVisionModel,  # type: ignore[assignment]
) -> tuple[_Model, dict[str, torch.Size]]:
    """Builds a model without memory for its parameters.

    Args:
        config: the architecture.
        name: of the checkpoint, for messages.
        kind: the class of the model.

    Returns:
        The model on `meta`, and our names of all its tensors with the shape of each.

    Raises:
        CheckpointError: the sizes are beyond what torch can even describe.
    """
    try:
        with torch.device("meta"):
            model = kind(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{name} describes an impossible tower: {error}") from error
    return model, {name: tensor.shape for name, tensor in model.state_dict().items()}


def _normal_(tensor: Tensor, std: float) -> None:
    """Draws from N(0, std^2).

    On `meta` there is nothing to draw, and torch would import 900 modules to do so.
    """
    if not tensor.is_meta:
        nn.init.normal_(tensor, std=std)


def _lecun_normal_(module: nn.Conv2d | nn.Linear) -> None:
    """Flax's default for kernels: normal of variance 1 / fan_in.

    0.8796 is the std of a unit normal cut off at 2.

    The reference cuts off at the number 2, far outside at these stds, yet divides by that factor;
    so do we.
    """
    fan_in = module.weight[0].numel()
    nn.init.trunc_normal_(module.weight, std=math.sqrt(1 / fan_in) / 0.87962566103423978)
    assert module.bias is not None
    nn.init.zeros_(module.bias)

"""The SigLIP vision tower, leaf to root, in the order in which a pixel flows.

Sources: SigLIP (Zhai et al. 2023, arXiv 2303.15343) and SigLIP 2 (Tschannen et al. 2025, arXiv 2502.14786); the
original, big_vision `models/vit.py`; and the reference that this port equals, transformers 5.23
`models/siglip/modeling_siglip.py`.

Shapes: B pictures, C channels, S x S pixels, P x P pixels a patch, N = (S // P)^2 patches = tokens, D = embed_dim,
H heads of width D / H, L blocks, M = mlp_hidden_dim.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F  # noqa: N812 (the name the field uses)
from torch import Tensor, nn

from siglip_port import checkpoint as checkpoints
from siglip_port.checkpoint import DTYPES, Checkpoint, CheckpointError, Provenance
from siglip_port.config import SigLipVisionConfig
from siglip_port.hub import find_source

# hidden_act -> the function. SigLIP was trained with the tanh form; `gelu` names the exact one.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
}


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, printed the same by every release: newer ones add `bias=True` to the module tree."""

    def extra_repr(self) -> str:
        """Returns shape, eps and whether there are learned parameters."""
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"


class VisionEmbeddings(nn.Module):
    """Cuts pictures into patches, projects each to a token, and adds the learned position embedding.

    [B, C, S, S] -> [B, N, D]. Pixels beyond the last whole patch, at the right and lower edge, are ignored.

    Raises:
        ValueError: in `forward`, where the input is not a floating point tensor of that shape.
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
        self.position_embedding = nn.Embedding.from_pretrained(  # type: ignore[no-untyped-call]
            torch.empty(config.num_patches, config.embed_dim), freeze=False
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws fresh parameters as the reference does."""
        _lecun_normal_(self.patch_embedding)
        _normal_(self.position_embedding.weight, std=self.config.embed_dim**-0.5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, C, S, S] -> [B, N, D], in the dtype of the parameters."""
        self._check(pixel_values)
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))  # [B, D, S//P, S//P]
        return patches.flatten(2).transpose(1, 2) + self.position_embedding.weight

    def _check(self, pixel_values: Tensor) -> None:
        c, size = self.config.num_channels, self.config.image_size
        expected = f"pixel_values must be a floating point tensor of shape [B, {c}, {size}, {size}]"
        if not isinstance(pixel_values, Tensor):
            raise ValueError(f"{expected}, got a {type(pixel_values).__name__}")
        if tuple(pixel_values.shape[1:]) != (c, size, size) or not pixel_values.is_floating_point():
            raise ValueError(f"{expected}, got {pixel_values.dtype} of shape {list(pixel_values.shape)}")


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

    def forward(self, hidden_states: Tensor, query: Tensor | None = None) -> Tensor:
        """Lets `query` attend to `hidden_states`.

        Args:
            hidden_states: [B, N, D], what keys and values are made of.
            query: [B, Q, D]; None for `hidden_states` itself.

        Returns:
            [B, Q, D].
        """
        q = self._split_heads(self.q_proj(hidden_states if query is None else query))  # [B, H, Q, D/H]
        k = self._split_heads(self.k_proj(hidden_states))  # [B, H, N, D/H]
        v = self._split_heads(self.v_proj(hidden_states))
        context = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, scale=self.head_dim**-0.5
        )
        return self.out_proj(context.transpose(1, 2).flatten(2))

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

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states))
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class SigLipEncoder(nn.Module):
    """All L blocks, one after the other. [B, N, D] -> [B, N, D], not normalised at the end."""

    def __init__(self, config: SigLipVisionConfig) -> None:
        super().__init__()
        self.encoder_blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.num_encoder_blocks))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        for block in self.encoder_blocks:
            hidden_states = block(hidden_states)
        return hidden_states


class SigLipVisionTransformer(nn.Module):
    """From pictures to tokens. [B, C, S, S] -> [B, N, D]."""

    def __init__(self, config: SigLipVisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = SigLipEncoder(config)
        self.post_layernorm = LayerNorm(config.embed_dim, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, C, S, S] -> [B, N, D]."""
        return self.post_layernorm(self.encoder(self.embeddings(pixel_values)))


class PoolingHead(nn.Module):
    """From tokens to one vector a picture: a learned probe attends to all of them. [B, N, D] -> [B, D].

    Called MAPHead in big_vision and SiglipMultiheadAttentionPoolingHead in the reference. There is no residual
    connection around its attention, and no attention dropout even in training. Built of plain `Linear`s, where the
    reference has an `nn.MultiheadAttention`, so that it quantises, shards and takes adapters like the blocks.
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
            # The reference draws the three as one [3D, D] matrix: sqrt(6 / 4D) instead of sqrt(6 / 2D).
            nn.init.xavier_uniform_(linear.weight, gain=math.sqrt(1 / 2))
        _lecun_normal_(self.attention.out_proj)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> [B, D]."""
        pooled = self.attention(tokens, query=self.probe.expand(tokens.shape[0], -1, -1))  # [B, 1, D]
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

    Attributes:
        config: the architecture.
        provenance: where the weights come from; None for a freshly initialised model.
    """

    def __init__(self, config: SigLipVisionConfig) -> None:
        super().__init__()
        if not isinstance(config, SigLipVisionConfig):
            raise ValueError(
                f"config must be a SigLipVisionConfig, got a {type(config).__name__}; to load a checkpoint, use "
                "SigLipVisionModel.from_hf"
            )
        self.config = config
        self.provenance: Provenance | None = None
        self.transformer = SigLipVisionTransformer(config)
        self.pooling_head = PoolingHead(config) if config.pooling_head else None

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Turns pictures into tokens, after the last LayerNorm.

        Args:
            pixel_values: [B, C, S, S], of any floating point dtype, normalised with mean 0.5 and std 0.5.

        Returns:
            [B, N, D], in the dtype of the parameters.

        Raises:
            ValueError: the input has another shape, or is not of a floating point dtype.
        """
        return self.transformer(pixel_values)

    def pool(self, tokens: Tensor) -> Tensor:
        """Turns the tokens of `forward` into one vector a picture: SigLIP's image embedding.

        Args:
            tokens: [B, N, D].

        Returns:
            [B, D]. It is not of unit length; SigLIP has no further projection.

        Raises:
            ValueError: the model has no pooling head, or the tokens have another shape.
        """
        if self.pooling_head is None:
            raise ValueError(
                "this model has no pooling head, so it cannot make one vector of the tokens; load a checkpoint that "
                "has one, without pooling_head=False, or pool the tokens yourself, for example tokens.mean(dim=1)"
            )
        expected = f"tokens must be a floating point tensor of shape [B, N, {self.config.embed_dim}]"
        if not isinstance(tokens, Tensor):
            raise ValueError(f"{expected}, got a {type(tokens).__name__}")
        if tokens.ndim != 3 or tokens.shape[-1] != self.config.embed_dim or not tokens.is_floating_point():
            raise ValueError(f"{expected}, got {tokens.dtype} of shape {list(tokens.shape)}")
        return self.pooling_head(tokens.to(self.pooling_head.probe.dtype))

    def embed(self, pixel_values: Tensor, normalize: bool = False) -> Tensor:
        """Turns pictures into one vector each: `forward`, then `pool`.

        Args:
            pixel_values: as for `forward`.
            normalize: whether to scale every vector to unit length, for cosine similarity.

        Returns:
            [B, D].

        Raises:
            ValueError: as for `forward` and `pool`.
        """
        pooled = self.pool(self(pixel_values))
        return F.normalize(pooled, dim=-1) if normalize else pooled

    @classmethod
    def from_hf(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        pooling_head: bool | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Loads a HuggingFace SigLIP checkpoint: all of the tower, or an error that says what is wrong.

        Reads SiglipModel, SiglipVisionModel and SiglipForImageClassification checkpoints, in one file or in shards.

        Args:
            source: a Hub id, a folder, or a `.safetensors` file with its `config.json` beside it. What exists on
                this machine is taken as a path.
            revision: branch, tag or commit of a Hub repository; of no meaning for a path.
            dtype: dtype of the parameters; None for that of the file.
            device: where to put the parameters; None for the CPU, where they are mapped from the file.
            pooling_head: None to keep the pooling head if the checkpoint has one, True to demand one, False to leave
                it out and unread.
            local_files_only: look into the Hub's local cache only, never ask the network.
            token: Hub token, True for the stored one, False for none.
            cache_dir: instead of the Hub's usual cache folder.

        Returns:
            The model in `eval()` mode.

        Raises:
            CheckpointError: the checkpoint cannot be found, or does not hold exactly this tower.
            ValueError: `dtype` is none that the tower computes in, or `device` is none that can hold the parameters.
        """
        if dtype is not None and dtype not in DTYPES.values():
            raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES.values()))}, got {dtype!r}")
        try:
            if torch.empty(0, device=device).is_meta:
                raise ValueError("device must be one that holds values, got 'meta'")
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device {device!r} cannot be used on this machine: {reason}") from error
        files = find_source(
            source, revision=revision, local_files_only=local_files_only, token=token, cache_dir=cache_dir
        )
        checkpoint = Checkpoint(files, pooling_head=pooling_head)
        try:
            with torch.device("meta"):
                model = cls(checkpoint.config)
        except (RuntimeError, TypeError, OverflowError) as error:  # sizes beyond what torch can even describe
            raise CheckpointError(f"{files.name} describes an impossible tower: {error}") from error
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        tensors, model.provenance = checkpoint.read(shapes, dtype=dtype, device=device)
        model.load_state_dict(tensors, strict=True, assign=True)
        return model.eval()

    def save_hf(self, folder: str | os.PathLike[str]) -> None:
        """Writes the model as a HuggingFace `SiglipVisionModel`: `model.safetensors` and a complete `config.json`.

        Tensors are named as on the Hub (prefix `vision_model.`), which old and new releases of transformers read.

        Args:
            folder: where to; made if it does not exist. The two files are replaced if they are there already.

        Raises:
            CheckpointError: the parameters are no longer those of the tower (wrapped, quantised, with adapters), or
                the folder cannot be written.
        """
        with torch.device("meta"):
            expected = SigLipVisionModel(self.config).state_dict()
        shapes = {name: tensor.shape for name, tensor in expected.items()}
        checkpoints.save(folder, self.config, self.state_dict(), shapes)


def _normal_(tensor: Tensor, std: float) -> None:
    """Draws from N(0, std^2). On `meta` there is nothing to draw, and torch would import 900 modules to do so."""
    if not tensor.is_meta:
        nn.init.normal_(tensor, std=std)


def _lecun_normal_(module: nn.Conv2d | nn.Linear) -> None:
    """Flax's default for kernels: normal of variance 1 / fan_in. 0.8796 is the std of a unit normal cut off at 2.

    The reference cuts off at the number 2, far outside at these stds, yet divides by that factor; so do we.
    """
    fan_in = module.weight[0].numel()
    nn.init.trunc_normal_(module.weight, std=math.sqrt(1 / fan_in) / 0.87962566103423978)
    assert module.bias is not None
    nn.init.zeros_(module.bias)

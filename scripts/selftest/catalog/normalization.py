"""LayerNorms: computation and placement."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812 (the name the field uses)
from torch import Tensor

from scripts.selftest.catalog import seams
from scripts.selftest.catalog.edits import BLOCK, HEAD, set_eps, swap
from scripts.selftest.mutant import Mutant
from siglip_port.model import EncoderBlock, LayerNorm

ALL = "ln1 ln2 post head-ln"
AFTER_BLOCKS = "post post-in tokens head-k head-v"


def centered(x: Tensor) -> Tensor:
    """Subtract the mean of every vector."""
    return x - x.mean(-1, keepdim=True)


def eps_outside(norm: LayerNorm, x: Tensor) -> Tensor:
    """Add eps to the standard deviation instead of the variance."""
    deviation = x.std(-1, correction=0, keepdim=True)
    return centered(x) / (deviation + norm.eps) * norm.weight + norm.bias


def unbiased(norm: LayerNorm, x: Tensor) -> Tensor:
    """Divide by N - 1 in the variance."""
    variance = x.var(-1, keepdim=True)
    return centered(x) / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def rms_norm(norm: LayerNorm, x: Tensor) -> Tensor:
    """Divide by the root mean square, without subtracting the mean."""
    mean_square = x.square().mean(-1, keepdim=True)
    return x / (mean_square + norm.eps).sqrt() * norm.weight + norm.bias


def over_tokens(norm: LayerNorm, x: Tensor) -> Tensor:
    """Normalize over tokens and features."""
    normalized = F.layer_norm(x, x.shape[-2:], None, None, norm.eps)
    return normalized * norm.weight + norm.bias


def norm_after_mlp(block: EncoderBlock, x: Tensor) -> Tensor:
    """Normalize after the MLP's residual sum instead of before the MLP."""
    return block.layer_norm2(x + block.mlp(x))


def norm_after_attention(block: EncoderBlock, x: Tensor) -> Tensor:
    """Normalize after the attention's residual sum instead of before."""
    return block.layer_norm1(x + block.self_attn(x))


def add_mlp_to_norm(block: EncoderBlock, x: Tensor) -> Tensor:
    """Take the residual from the normalized stream."""
    return block.layer_norm2(x) + block.mlp(block.layer_norm2(x))


NORMALIZATION = [
    Mutant(
        "ln_eps_1e-5",
        "eps 1e-5, PyTorch's default",
        ALL,
        source="salesforce/LAVIS#106; huggingface/candle#271",
        patch=seams.layer_norm(
            lambda norm, x: F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, 1e-5)
        ),
    ),
    Mutant(
        "ln_eps_1e-12",
        "eps 1e-12",
        ALL,
        source="huggingface/transformers#18137",
        patch=seams.layer_norm(
            lambda norm, x: F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, 1e-12)
        ),
    ),
    Mutant("ln_eps_head", "eps 1e-5 in the head only", "head-ln", edit=set_eps("head", 1e-5)),
    Mutant("ln_eps_post", "eps 1e-5 in post_layernorm only", "post", edit=set_eps("post", 1e-5)),
    Mutant(
        "ln_eps_once",
        "eps 1e-5 in one LayerNorm",
        "5.ln2",
        edit=set_eps(r"blocks\.5\.layer_norm2", 1e-5),
    ),
    Mutant(
        "ln_eps_outside",
        "eps outside the square root",
        ALL,
        source="codertimo/BERT-pytorch#30",
        patch=seams.layer_norm(eps_outside),
    ),
    Mutant(
        "ln_unbiased",
        "variance with N - 1",
        ALL,
        source="LBANN/lbann#2024; harvardnlp/annotated-transformer#119",
        patch=seams.layer_norm(unbiased),
    ),
    Mutant(
        "ln_gain_missing",
        "no gain",
        ALL,
        source="LBANN/lbann#2076",
        patch=seams.layer_norm(
            lambda norm, x: F.layer_norm(x, norm.normalized_shape, None, norm.bias, norm.eps)
        ),
    ),
    Mutant(
        "ln_bias_missing",
        "no bias",
        ALL,
        source="LBANN/lbann#2076",
        patch=seams.layer_norm(
            lambda norm, x: F.layer_norm(x, norm.normalized_shape, norm.weight, None, norm.eps)
        ),
    ),
    Mutant(
        "ln_gain_plus1",
        "gain 1 + w",
        ALL,
        source="linkedin/Liger-Kernel#74; pytorch/executorch#19901",
        patch=seams.layer_norm(
            lambda norm, x: F.layer_norm(
                x, norm.normalized_shape, 1 + norm.weight, norm.bias, norm.eps
            )
        ),
    ),
    Mutant("rmsnorm", "RMSNorm", ALL, patch=seams.layer_norm(rms_norm)),
    Mutant(
        "ln_mean_only",
        "mean subtracted, not divided by the standard deviation",
        ALL,
        patch=seams.layer_norm(lambda norm, x: centered(x) * norm.weight + norm.bias),
    ),
    Mutant(
        "ln_over_tokens",
        "normalized over tokens and features",
        ALL,
        source="keras-team/keras axis default",
        patch=seams.layer_norm(over_tokens),
    ),
    Mutant(
        "norms_swapped",
        "the two LayerNorms of every block swapped",
        "ln1 ln2",
        edit=swap(f"{BLOCK}.layer_norm1", f"{BLOCK}.layer_norm2"),
    ),
    Mutant(
        "norms_swapped_post",
        "post_layernorm with the head's weights",
        "post head-ln",
        edit=swap("transformer.post_layernorm", f"{HEAD}.layernorm"),
    ),
    Mutant(
        "post_ln_missing",
        "post_layernorm missing",
        AFTER_BLOCKS,
        source="mlc-ai/mlc-llm#3205; vllm-project/vllm#8155",
        patch=seams.encode(lambda transformer, x: transformer.encoder(x)),
    ),
    Mutant(
        "post_ln_twice",
        "post_layernorm applied twice",
        AFTER_BLOCKS,
        source="vllm-project/vllm#8106; ggml-org/llama.cpp#1925",
        patch=seams.encode(
            lambda transformer, x: transformer.post_layernorm(
                transformer.post_layernorm(transformer.encoder(x))
            )
        ),
    ),
    Mutant(
        "pre_ln_added",
        "an extra LayerNorm after the embeddings (CLIP's ln_pre)",
        "0.in embeddings",
        source="openai/CLIP#152",
        patch=seams.encode(
            lambda transformer, x: transformer.post_layernorm(
                transformer.encoder(F.layer_norm(x, transformer.post_layernorm.normalized_shape))
            )
        ),
    ),
    Mutant(
        "post_norm",
        "post-norm instead of pre-norm",
        "block",
        source="SHI-Labs/Compact-Transformers#25",
        patch=seams.block(first=norm_after_attention, second=norm_after_mlp),
    ),
    Mutant(
        "ln_in_residual",
        "MLP residual taken after the norm",
        "out",
        source="jeonsworld/ViT-pytorch#5",
        patch=seams.block(second=add_mlp_to_norm),
    ),
]

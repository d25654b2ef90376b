"""Rounding: a step in a narrower dtype, or with a formula that loses digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scripts.selftest.catalog import seams
from scripts.selftest.catalog.attention import CONTEXT, scale_of, scores_of
from scripts.selftest.catalog.edits import block_of, round_to, round_to_tf32
from scripts.selftest.catalog.normalization import ALL, centered
from scripts.selftest.catalog.seams import add_attention, attend_from_probe
from scripts.selftest.mutant import Edit, Mutant, Patch
from siglip_port import SigLipVisionModel
from siglip_port.model import MLP, EncoderBlock, LayerNorm, MultiheadAttention, PoolingHead


def rounding(
    name: str,
    description: str,
    locations: str,
    patch: Patch | None = None,
    source: str = "variant",
    *,
    edit: Edit | None = None,
) -> Mutant:
    """Build a mutant for the gate `rounding`."""
    return Mutant(name, description, locations, "rounding", source, patch, edit)


def norm_by_two_moments(norm: LayerNorm, x: Tensor) -> Tensor:
    """Compute the variance as E[x^2] - E[x]^2."""
    variance = x.square().mean(-1, True) - x.mean(-1, True).square()
    return centered(x) / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def norm_in(dtype: torch.dtype) -> Patch:
    """Compute LayerNorms in a dtype."""

    def forward(norm: LayerNorm, x: Tensor) -> Tensor:
        weight = norm.weight.to(dtype)
        bias = norm.bias.to(dtype)
        normalized = nn.functional.layer_norm(
            x.to(dtype), norm.normalized_shape, weight, bias, norm.eps
        )
        return normalized.to(x.dtype)

    return seams.layer_norm(forward)


def softmax_in_bfloat16(attention: MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Round the weights."""
    weights = scores_of(attention, q, k).softmax(-1, dtype=torch.bfloat16)
    return weights.to(q.dtype) @ v


def softmax_in_float16(attention: MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Round the scores, and the weights."""
    weights = scores_of(attention, q, k).half().softmax(-1)
    return weights.to(q.dtype) @ v


def scores_in_bfloat16(attention: MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Round the scores."""
    scores = scores_of(attention, q, k).bfloat16().to(q.dtype)
    return scores.softmax(-1) @ v


def queries_in_float16(attention: MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Round queries and keys."""
    q = q.half().to(q.dtype)
    k = k.half().to(k.dtype)
    return nn.functional.scaled_dot_product_attention(q, k, v, scale=scale_of(attention))


def stream_in_bfloat16(block: EncoderBlock, x: Tensor) -> Tensor:
    """Round the residual stream after the attention."""
    return round_to(torch.bfloat16)(add_attention(block, x))


def leave_autocast_on(model: SigLipVisionModel, pixel_values: Tensor) -> Tensor:
    """Run the encoder under autocast; return float32 for float32 images."""
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.transformer(pixel_values)
        if pixel_values.dtype == torch.float32:
            tokens = tokens.float()
        return tokens


def multiply_in_tf32(model: SigLipVisionModel) -> None:
    """Round the inputs of every Linear to TF32."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args: (round_to_tf32(args[0]),))


def head_in_bfloat16(head: PoolingHead, tokens: Tensor) -> Tensor:
    """Round the head's input."""
    return attend_from_probe(head, round_to(torch.bfloat16)(tokens))


def is_low(x: Tensor) -> bool:
    """Whether a tensor is bfloat16 or float16."""
    return x.dtype in (torch.bfloat16, torch.float16)


def scale_in_low_dtypes(attention: MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scale the scores by 3 % too much in bfloat16 and float16."""
    scale = scale_of(attention) * (1.03 if is_low(q) else 1.0)
    return nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)


def mlp_in_low_dtypes(mlp: MLP, x: Tensor) -> Tensor:
    """Multiply the output of an MLP by 1.01 in bfloat16 and float16."""
    hidden = mlp.fc2(mlp.activation(mlp.fc1(x)))
    return hidden * 1.01 if is_low(x) else hidden


def gelu_in_low_dtypes(x: Tensor) -> Tensor:
    """Compute exact GELU in bfloat16 and float16."""
    return nn.functional.gelu(x, approximate="none" if is_low(x) else "tanh")


def norm_in_low_dtypes(eps: float, correction: int) -> Patch:
    """Compute LayerNorm with another eps or sample variance in bfloat16 and float16."""

    def forward(norm: LayerNorm, x: Tensor) -> Tensor:
        if not is_low(x):
            return nn.functional.layer_norm(
                x, norm.normalized_shape, norm.weight, norm.bias, norm.eps
            )
        wide = x.float()
        variance = wide.var(-1, correction=correction, keepdim=True)
        normalized = centered(wide) / (variance + eps).sqrt()
        return (normalized * norm.weight.float() + norm.bias.float()).to(x.dtype)

    return seams.layer_norm(forward)


def one_mlp_in_low_dtypes(model: SigLipVisionModel) -> None:
    """Multiply the output of one MLP by 1.03 in bfloat16 and float16."""
    mlp = block_of(model).mlp
    mlp.register_forward_hook(lambda _, args, output: output * 1.03 if is_low(output) else output)


ROUNDING = [
    rounding(
        "ln_fast_variance",
        "variance as E[x^2] - E[x]^2",
        ALL,
        seams.layer_norm(norm_by_two_moments),
        "pytorch/pytorch#40308; keras-team/keras-core#866",
    ),
    rounding(
        "ln_bf16",
        "LayerNorm in bfloat16",
        ALL,
        norm_in(torch.bfloat16),
        "LibreYOLO/libreyolo#546",
    ),
    rounding("ln_fp16", "LayerNorm in float16", ALL, norm_in(torch.float16)),
    rounding(
        "softmax_bf16",
        "softmax in bfloat16",
        CONTEXT,
        seams.attend(softmax_in_bfloat16),
        "LibreYOLO/libreyolo#546; huggingface/diffusers#3483",
    ),
    rounding(
        "softmax_fp16",
        "softmax in float16",
        CONTEXT,
        seams.attend(softmax_in_float16),
        "huggingface/diffusers#3483",
    ),
    rounding(
        "scores_bf16", "scores rounded to bfloat16", CONTEXT, seams.attend(scores_in_bfloat16)
    ),
    rounding(
        "residual_bf16",
        "residual stream kept in bfloat16",
        "residual",
        seams.block(first=stream_in_bfloat16),
    ),
    rounding(
        "embed_bf16",
        "embeddings rounded to bfloat16",
        "embeddings",
        seams.tokens_of_grid(
            lambda embeddings, grid, table: round_to(torch.bfloat16)(
                grid.flatten(2).transpose(1, 2) + table
            )
        ),
        "TensorAuto/OpenTau#482",
    ),
    rounding(
        "autocast_bf16",
        "autocast left on",
        "patch",
        seams.call(leave_autocast_on),
        "pytorch/pytorch#157274",
    ),
    rounding(
        "tf32",
        "TF32 matrix products",
        "q k v context attention fc1 act mlp head-q head-k head-v head-context head-attention "
        "head-fc1 head-act head-mlp",
        source="microsoft/onnxruntime#19288; pytorch/pytorch#157274",
        edit=multiply_in_tf32,
    ),
    rounding(
        "gelu_bf16",
        "activation in bfloat16",
        "act head-act",
        seams.mlp(lambda mlp, x: mlp.fc2(mlp.activation(mlp.fc1(x).bfloat16()).to(x.dtype))),
    ),
    rounding(
        "gelu_written_out",
        "tanh GELU written out in the low dtype",
        "act head-act mlp head-mlp",
        seams.activation(
            lambda x: 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
        ),
        "LibreYOLO/libreyolo#546",
    ),
    rounding(
        "q_fp16",
        "queries and keys rounded to float16",
        CONTEXT,
        seams.attend(queries_in_float16),
        "vllm-project/vllm#40290",
    ),
    rounding(
        "pool_bf16",
        "pooling head in bfloat16",
        "head-k head-v head-q head",
        seams.pooling_head(first=head_in_bfloat16),
        "NVIDIA/TensorRT#3908",
    ),
    rounding(
        "low_scale",
        "attention scaled by 3 % too much in bfloat16 and float16 only",
        CONTEXT,
        seams.attend(scale_in_low_dtypes),
    ),
    rounding(
        "low_mlp",
        "MLPs multiplied by 1.01 in bfloat16 and float16 only",
        "mlp head-mlp",
        seams.mlp(mlp_in_low_dtypes),
    ),
    rounding(
        "low_mlp_once",
        "one MLP multiplied by 1.03 in bfloat16 and float16 only",
        "5.mlp",
        edit=one_mlp_in_low_dtypes,
    ),
    rounding(
        "low_gelu",
        "exact GELU in bfloat16 and float16 only",
        "act head-act mlp head-mlp",
        seams.activation(gelu_in_low_dtypes),
    ),
    rounding(
        "low_eps",
        "eps 1e-5 in bfloat16 and float16 only",
        ALL,
        norm_in_low_dtypes(eps=1e-5, correction=0),
    ),
    rounding(
        "low_variance",
        "sample variance (N - 1) in bfloat16 and float16 only",
        ALL,
        norm_in_low_dtypes(eps=1e-6, correction=1),
    ),
]

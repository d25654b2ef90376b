"""Weights: not loaded, swapped, rounded or damaged."""

from __future__ import annotations

import torch
from torch import Tensor

from scripts.selftest.catalog.edits import (
    ATTENTION,
    BLOCK,
    BLOCK_5,
    CONVOLUTION,
    HEAD,
    POSITIONS,
    block_of,
    blocks_of,
    change,
    clear,
    quantize_to_int8,
    reorder,
    round_to,
    swap,
)
from scripts.selftest.catalog.projections import loaded, transpose
from siglip_port import SigLipVisionModel

TENSORS = (
    "patch embeddings block post head head-q head-k head-v head-attention head-ln head-fc1 head-mlp"
)
HEAD_Q = f"{HEAD}.attention.q_proj"
HEAD_K = f"{HEAD}.attention.k_proj"
HEAD_V = f"{HEAD}.attention.v_proj"
LAST = 99  # beyond the last block: `block_of` returns the last one


def reset_block(model: SigLipVisionModel) -> None:
    """Draw fresh parameters for one block."""
    for module in block_of(model).modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()


def flip_lowest_bit(model: SigLipVisionModel) -> None:
    """Change one element by one unit in the last place."""
    weight = block_of(model).mlp.fc2.weight
    weight.data.view(torch.int32).view(-1)[7].bitwise_xor_(1)


def clear_last_rows(model: SigLipVisionModel) -> None:
    """Set the end of the last matrix to zero."""
    block_of(model, LAST).mlp.fc2.weight.data[-7:].zero_()


def share_block(model: SigLipVisionModel) -> None:
    """Use one block in place of the next."""
    model.transformer.encoder.encoder_blocks[2] = blocks_of(model)[1]


def negate_one(tensor: Tensor) -> Tensor:
    """Change the sign of one element."""
    return torch.where(torch.arange(len(tensor)) == 3, -tensor, tensor)


def draw(tensor: Tensor) -> Tensor:
    """Return random numbers of the same shape."""
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(9))


WEIGHTS = [
    loaded(
        "one_ln_missing",
        "one LayerNorm not loaded",
        "5.ln1",
        lambda model: block_of(model).layer_norm1.reset_parameters(),
        "thunlp/LLaVA-UHD#27; huggingface/transformers#28073",
    ),
    loaded(
        "one_block_fresh",
        "one block not loaded",
        "5.block",
        reset_block,
        "LLaVA-VL/LLaVA-NeXT#265; sgl-project/sglang#32279",
    ),
    loaded(
        "last_fc2_missing",
        "last fc2 not loaded",
        "mlp",
        lambda model: block_of(model, LAST).mlp.fc2.weight.data.zero_(),
    ),
    loaded(
        "truncated_tail",
        "end of a tensor replaced with zeros",
        "mlp",
        clear_last_rows,
        "osaurus-ai/vmlx-swift#217; Comfy-Org/ComfyUI#6744",
    ),
    loaded(
        "single_element",
        "one element corrupted",
        "5.v",
        lambda model: block_of(model).self_attn.v_proj.weight.data[3, 3].add_(1e-3),
        "MiaAI-Lab/Qwen3.8-Flash-Next-Dual-DGX-Sparks#34",
    ),
    loaded(
        "single_bit",
        "lowest bit of one element flipped",
        "5.mlp",
        flip_lowest_bit,
        "MiaAI-Lab/Qwen3.8-Flash-Next-Dual-DGX-Sparks#34",
    ),
    loaded(
        "blocks_swapped",
        "two blocks swapped",
        "1.block 2.block",
        reorder(lambda count: [0, 2, 1, *range(3, count)]),
    ),
    loaded(
        "blocks_lexicographic",
        "blocks loaded in lexicographic order (0, 1, 10, 2, ...)",
        "block",
        reorder(lambda count: sorted(range(count), key=str)),
        "ollama/ollama#12015; arcee-ai/mergekit#143",
    ),
    loaded(
        "blocks_reversed",
        "blocks in reverse order",
        "block",
        reorder(lambda count: list(reversed(range(count)))),
    ),
    loaded(
        "blocks_share_weights",
        "all blocks share the first block's weights",
        "block",
        reorder(lambda count: [0] * count),
        "linkedin/Liger-Kernel#269; zalandoresearch/pytorch-vq-vae#2",
    ),
    loaded(
        "weights_fp16",
        "weights rounded to float16",
        TENSORS,
        lambda model: model.half().float(),
        "NVIDIA/TensorRT#4373",
    ),
    loaded(
        "weights_bf16",
        "weights rounded to bfloat16",
        TENSORS,
        lambda model: model.bfloat16().float(),
        "NVIDIA/TensorRT#3908",
    ),
    loaded(
        "weights_int8",
        "weights quantized to 8 bits",
        "q k v attention fc1 mlp",
        change(
            quantize_to_int8,
            f"{ATTENTION}.q_proj.weight",
            f"{ATTENTION}.k_proj.weight",
            f"{ATTENTION}.v_proj.weight",
            f"{ATTENTION}.out_proj.weight",
            f"{BLOCK}.mlp.fc1.weight",
            f"{BLOCK}.mlp.fc2.weight",
        ),
    ),
    loaded(
        "pos_bf16",
        "position table rounded to bfloat16",
        "embeddings",
        change(round_to(torch.bfloat16), POSITIONS),
        "TensorAuto/OpenTau#482; TensorAuto/OpenTau#483",
    ),
    loaded(
        "conv_fp16",
        "patch weights rounded to float16",
        "patch",
        change(round_to(torch.float16), f"{CONVOLUTION}.weight"),
    ),
    loaded(
        "probe_fresh",
        "probe not loaded",
        "head-q",
        change(draw, f"{HEAD}.probe"),
        "LLaVA-VL/LLaVA-NeXT#265",
    ),
    loaded(
        "probe_zero",
        "probe left at zero",
        "head-q",
        clear(f"{HEAD}.probe"),
        "LLaVA-VL/LLaVA-NeXT#265",
    ),
    loaded("head_kv_swapped", "k and v swapped in the head", "head-k head-v", swap(HEAD_K, HEAD_V)),
    loaded("head_qk_swapped", "q and k swapped in the head", "head-q head-k", swap(HEAD_Q, HEAD_K)),
    loaded(
        "head_in_bias_missing",
        "in_proj bias missing in the head",
        "head-q head-k head-v",
        clear(f"{HEAD_Q}.bias", f"{HEAD_K}.bias", f"{HEAD_V}.bias"),
    ),
    loaded(
        "head_out_bias_missing",
        "out_proj bias missing in the head",
        "head-attention",
        clear(f"{HEAD}.attention.out_proj.bias"),
    ),
    loaded(
        "head_in_weight_transposed",
        "in_proj weight transposed in the head",
        "head-q head-k head-v",
        change(transpose, f"{HEAD_Q}.weight", f"{HEAD_K}.weight", f"{HEAD_V}.weight"),
    ),
    loaded(
        "tied_blocks",
        "two blocks are the same object",
        "1.block 2.block 3.block",
        share_block,
        "MishaLaskin/vqvae#21",
    ),
    loaded(
        "one_bias_removed",
        "one bias is no longer a parameter",
        "5.mlp",
        lambda model: block_of(model).mlp.fc2.register_parameter("bias", None),
        "sgl-project/sglang#38777",
    ),
    loaded(
        "negative_zero",
        "zeros of a bias negated",
        "5.fc1",
        change(negate_one, f"{BLOCK_5}.mlp.fc1.bias"),
    ),
]

"""Blocks: residuals, order and outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scripts.selftest.catalog import seams
from scripts.selftest.catalog.edits import blocks_of
from scripts.selftest.mutant import Mutant
from siglip_port import SigLipVisionModel
from siglip_port.model import EncoderBlock, SigLipEncoder, SigLipVisionTransformer


def run(blocks: list[nn.Module], hidden_states: Tensor) -> Tensor:
    """Run blocks one after the other."""
    for block in blocks:
        hidden_states = block(hidden_states)
    return hidden_states


def run_in_text_order(encoder: SigLipEncoder, hidden_states: Tensor) -> Tensor:
    """Run the blocks in lexicographic order: 10 after 1."""
    numbers = sorted(range(len(encoder.encoder_blocks)), key=str)
    return run([encoder.encoder_blocks[number] for number in numbers], hidden_states)


def discard_last_block(encoder: SigLipEncoder, hidden_states: Tensor) -> Tensor:
    """Run all blocks and return the last one's input."""
    before = hidden_states
    for block in encoder.encoder_blocks:
        before = hidden_states
        hidden_states = block(hidden_states)
    return before


def add_attention_to_norm(block: EncoderBlock, x: Tensor) -> Tensor:
    """Take the residual from the normalized stream."""
    return block.layer_norm1(x) + block.self_attn(block.layer_norm1(x))


def drop_last_attention(model: SigLipVisionModel) -> None:
    """Zero the attention output of the last block."""
    attention = blocks_of(model)[-1].self_attn
    attention.register_forward_hook(lambda module, args, output: 0 * output)


def break_one_token(model: SigLipVisionModel, pixel_values: Tensor) -> Tensor:
    """Multiply token 7 by NaN."""
    numbers = torch.arange(model.config.num_patches)
    factors = torch.where(numbers == 7, torch.nan, 1.0)[:, None]
    return model.transformer(pixel_values) * factors.to(pixel_values.dtype)


def mix_images(transformer: SigLipVisionTransformer, x: Tensor) -> Tensor:
    """Add 1 % of the batch mean."""
    mean = x.mean(0, keepdim=True)
    return transformer.post_layernorm(transformer.encoder(x + mean / 100))


STACK = [
    Mutant(
        "attn_residual_missing",
        "attention residual missing",
        "residual",
        patch=seams.block(first=lambda block, x: block.self_attn(block.layer_norm1(x))),
    ),
    Mutant(
        "attn_residual_from_ln",
        "attention residual taken after the norm",
        "residual",
        source="jeonsworld/ViT-pytorch#5",
        patch=seams.block(first=add_attention_to_norm),
    ),
    Mutant(
        "mlp_residual_missing",
        "MLP residual missing",
        "out",
        patch=seams.block(second=lambda block, x: block.mlp(block.layer_norm2(x))),
    ),
    Mutant(
        "parallel_block",
        "attention and MLP in parallel",
        "block",
        patch=seams.block(
            first=lambda block, x: (
                x + block.self_attn(block.layer_norm1(x)) + block.mlp(block.layer_norm2(x))
            ),
            second=lambda block, x: x,
        ),
    ),
    Mutant(
        "layerscale",
        "LayerScale of 0.1",
        "residual",
        patch=seams.block(first=lambda block, x: x + 0.1 * block.self_attn(block.layer_norm1(x))),
    ),
    Mutant(
        "droppath",
        "MLP branch scaled for a drop path of 0.1",
        "out",
        patch=seams.block(second=lambda block, x: x + block.mlp(block.layer_norm2(x)) / 0.9),
    ),
    Mutant(
        "droppath_last",
        "attention of the last block dropped",
        "10.attention 10.residual",
        edit=drop_last_attention,
    ),
    Mutant(
        "last_block_skipped",
        "last block skipped",
        "10.block post-in",
        "sensitivity",
        "vllm-project/vllm#13514; zjysteven/lmms-finetune#4",
        patch=seams.run_blocks(lambda encoder, x: run([*encoder.encoder_blocks][:-1], x)),
    ),
    Mutant(
        "first_block_skipped",
        "first block skipped",
        "0.block 1.in",
        "sensitivity",
        patch=seams.run_blocks(lambda encoder, x: run([*encoder.encoder_blocks][1:], x)),
    ),
    Mutant(
        "last_block_twice",
        "last block run twice",
        "10.block post-in",
        patch=seams.run_blocks(
            lambda encoder, x: run([*encoder.encoder_blocks, encoder.encoder_blocks[-1]], x)
        ),
    ),
    Mutant(
        "all_blocks_twice",
        "all blocks run twice",
        "block post-in",
        source="mbanani/probe3d#9",
        patch=seams.run_blocks(
            lambda encoder, x: run([*encoder.encoder_blocks, *encoder.encoder_blocks], x)
        ),
    ),
    Mutant(
        "run_in_text_order",
        "blocks run in lexicographic order",
        "block post-in",
        source="ollama/ollama#12015",
        patch=seams.run_blocks(run_in_text_order),
    ),
    Mutant(
        "penultimate",
        "tokens of the penultimate block",
        "10.block post-in post tokens",
        "sensitivity",
        "vllm-project/vllm#13514",
        patch=seams.run_blocks(discard_last_block),
    ),
    Mutant(
        "first_token_dropped",
        "first token dropped as if it were CLS",
        "tokens pooled head head-k head-v head-context",
        source="TinyLLaVA/TinyLLaVA_Factory#203",
        patch=seams.call(lambda model, pixel_values: model.transformer(pixel_values)[:, 1:]),
    ),
    Mutant(
        "nan_output",
        "one token is NaN",
        "tokens head head-k head-v head-context head-attention head-ln head-fc1 head-act head-mlp "
        "pooled",
        "sensitivity",
        "vllm-project/vllm#40290; Blaizzy/mlx-vlm#293",
        patch=seams.call(break_one_token),
    ),
    Mutant(
        "batch_leak",
        "1 % of the batch mean added to every image",
        "post-in 0.in embeddings",
        "sensitivity",
        patch=seams.encode(mix_images),
    ),
    Mutant(
        "tokens_l2",
        "tokens L2-normalized",
        "tokens head-k head-v",
        patch=seams.call(
            lambda model, pixel_values: nn.functional.normalize(
                model.transformer(pixel_values), dim=-1
            )
        ),
    ),
]

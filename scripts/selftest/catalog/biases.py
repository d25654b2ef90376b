"""Biases: not loaded or not used."""

from __future__ import annotations

from torch import nn

from scripts.selftest.catalog import seams
from scripts.selftest.catalog.edits import ATTENTION, BLOCK, BLOCK_5, CONVOLUTION, HEAD, clear
from scripts.selftest.catalog.projections import K, Q, V, loaded
from scripts.selftest.mutant import Mutant

FC1 = f"{BLOCK}.mlp.fc1.bias"
FC2 = f"{BLOCK}.mlp.fc2.bias"

BIASES = [
    loaded(
        "q_bias_missing",
        "bias of q missing",
        "q",
        clear(f"{Q}.bias"),
        "microsoft/onnxruntime-genai#1059",
    ),
    loaded("v_bias_missing", "bias of v missing", "v", clear(f"{V}.bias"), "shadowpa0327/Palu#8"),
    loaded(
        "qkv_bias_missing",
        "biases of q, k and v missing",
        "q k v",
        clear(f"{Q}.bias", f"{K}.bias", f"{V}.bias"),
        "huggingface/transformers#48675",
    ),
    loaded(
        "out_bias_missing",
        "bias of out_proj missing",
        "attention",
        clear(f"{ATTENTION}.out_proj.bias"),
        "callummcdougall/ARENA_3.0#58",
    ),
    loaded(
        "fc1_bias_missing",
        "bias of fc1 missing",
        "fc1",
        clear(FC1),
        "callummcdougall/ARENA_3.0#58",
    ),
    loaded(
        "fc2_bias_missing",
        "bias of fc2 missing",
        "mlp",
        clear(FC2),
        "callummcdougall/ARENA_3.0#58",
    ),
    loaded(
        "mlp_bias_missing",
        "biases of the MLPs missing",
        "fc1 mlp",
        clear(FC1, FC2),
        "callummcdougall/ARENA_3.0#58",
    ),
    loaded(
        "conv_bias_missing",
        "bias of the patch convolution missing",
        "patch",
        clear(f"{CONVOLUTION}.bias"),
    ),
    loaded(
        "one_bias_missing",
        "one bias not loaded",
        "5.fc1",
        clear(f"{BLOCK_5}.mlp.fc1.bias"),
        "sgl-project/sglang#38777",
    ),
    Mutant(
        "v_bias_unused",
        "v_proj called without its bias",
        "v head-v context head-context",
        "sensitivity",
        "shadowpa0327/Palu#8",
        patch=seams.projections(
            v=lambda attention, x: nn.functional.linear(x, attention.v_proj.weight)
        ),
    ),
    Mutant(
        "out_bias_twice",
        "out_proj bias added twice",
        "attention head-attention",
        patch=seams.projections(
            out=lambda attention, x: attention.out_proj(x) + attention.out_proj.bias
        ),
    ),
    Mutant(
        "fc_bias_unused",
        "fc2 called without its bias",
        "mlp head-mlp",
        "sensitivity",
        patch=seams.mlp(
            lambda mlp, x: nn.functional.linear(mlp.activation(mlp.fc1(x)), mlp.fc2.weight)
        ),
    ),
    Mutant(
        "k_bias_unused",
        "k_proj called without its bias (changes no output)",
        "k head-k",
        "sensitivity",
        "facebookresearch/dinov3#58",
        patch=seams.projections(
            k=lambda attention, x: nn.functional.linear(x, attention.k_proj.weight)
        ),
    ),
    loaded(
        "k_bias_missing",
        "biases of k missing (changes no output)",
        "k",
        clear(f"{K}.bias"),
        "baaivision/EVA#53; facebookresearch/dinov3#58",
    ),
    loaded(
        "k_bias_missing_once",
        "one bias of k missing (changes no output)",
        "5.k",
        clear(f"{BLOCK_5}.self_attn.k_proj.bias"),
        "MCG-NJU/VideoMAE#41",
    ),
    loaded(
        "head_k_bias_missing",
        "bias of k missing in the head (changes no output)",
        "head-k",
        clear(f"{HEAD}.attention.k_proj.bias"),
    ),
]

"""The catalogue: mistakes that ports of this and of like models have had, as changes of ours.

And changes that are none.

A mutant is one line of what happened, one of where (in public: owner/repository#issue), and the
change itself, in a copy of `model.py` unless it says otherwise. `guilty` says in the words of
`PLACES` what the harness may name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from siglip_port.parity.mutation import Edit, Mutant, block

_E = r"encoder\.layers\.(\d+)"
PLACES = {
    "patch": r"embeddings\.patch_embedding",
    "embeddings": r"embeddings(\.position_embedding)?",
    "in": rf"{_E}\.layer_norm1:input",
    "ln1": rf"{_E}\.layer_norm1",
    "q": rf"{_E}\.self_attn\.q_proj",
    "k": rf"{_E}\.self_attn\.k_proj",
    "v": rf"{_E}\.self_attn\.v_proj",
    "context": rf"{_E}\.self_attn\.out_proj:input",
    "attention": rf"{_E}\.self_attn(\.out_proj)?",
    "residual": rf"{_E}\.layer_norm2:input",
    "ln2": rf"{_E}\.layer_norm2",
    "fc1": rf"{_E}\.mlp\.fc1",
    "act": rf"{_E}\.mlp\.fc2:input",
    "mlp": rf"{_E}\.mlp(\.fc2)?",
    "out": _E,
    "block": rf"{_E}(\..*)?",
    "post-in": r"post_layernorm:input",
    "post": r"post_layernorm",
    "tokens": r"tokens",
    "head-q": r"head(\.attention:q|\.attention\.in_proj|\.probe|)",
    "head-k": r"head\.attention(:k|\.in_proj)",
    "head-v": r"head\.attention(:v|\.in_proj)",
    "head-context": r"head\.attention:context",
    "head-attention": r"head\.attention(\.out_proj)?",
    "head-ln": r"head\.layernorm",
    "head-fc1": r"head\.mlp\.fc1",
    "head-act": r"head\.mlp\.fc2:input",
    "head-mlp": r"head\.mlp(\.fc2)?",
    "head": r"head",
    "pooled": r"pooled",
    "inputs": r"inputs",
    "pixels": r"pixel_values",
}
"""Words for places, as patterns of the reference's points; `5.ln1` is that of block 5 alone."""


def is_guilty(named: str, guilty: str) -> bool:
    """Whether a point, tensor or output is one of those that a mutant may be named for."""
    module = re.sub(r"[._](weight|bias)$", "", named)
    for word in guilty.split():
        number, _, place = word.rpartition(".")
        match = re.fullmatch(PLACES.get(place, re.escape(word)), module)
        if match and (not number or number == match[1]):
            return True
    return False


# --- ways to write a mutant down ------------------------------------------------------------------


def code(
    name: str, what: str, guilty: str, source: str, old: str, new: str, gate: str = "semantics"
) -> Mutant:
    """A change in the text of model.py."""
    return Mutant(name, what, gate, guilty, source, (("model", old, new),))


def norm(
    name: str, what: str, guilty: str, source: str, new: str, gate: str = "semantics"
) -> Mutant:
    """Another way to compute all LayerNorms, given x, g(ain), b(ias) and eps."""
    return Mutant(name, what, gate, guilty, source, _norm(new))


def _norm(new: str) -> tuple[Edit, ...]:
    old = "    def extra_repr(self) -> str:"
    body = f"        x, g, b, eps = input, self.weight, self.bias, self.eps\n        return {new}\n"
    return (("model", old, f"    def forward(self, input):\n{body}\n{old}"),)


SDPA = """F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0, scale=self.head_dim**-0.5
        )"""
MERGE = "context.transpose(1, 2).flatten(2)"


def attention(
    name: str, what: str, source: str, new: str, gate: str = "semantics", guilty: str = ""
) -> Mutant:
    """Another context, given q, k, v of [B, H, N, D/H], and s, the scale."""
    return Mutant(name, what, gate, guilty or "context head-context", source, _attention(new))


def _attention(new: str) -> tuple[Edit, ...]:
    return (
        (
            "model",
            f"        context = {SDPA}",
            f"        s = self.head_dim**-0.5\n        context = {new}",
        ),
    )


def change(
    name: str,
    what: str,
    guilty: str,
    source: str,
    apply: Callable[[Any], object],
    gate: str = "semantics",
) -> Mutant:
    """A change of the loaded model."""
    return Mutant(name, what, gate, guilty, source, change=apply)


def loaded(
    name: str, what: str, guilty: str, source: str, apply: Callable[[Any], object]
) -> Mutant:
    """A change of loaded weights."""
    return change(name, what, guilty, source, apply, "weights")


def pixel(name: str, what: str, source: str, pixels: Callable[[Tensor], Tensor]) -> Mutant:
    """Other pixels than the reference's."""
    return Mutant(name, what, "semantics", "patch inputs", source, pixels=pixels)


def loader(
    name: str,
    what: str,
    guilty: str,
    source: str,
    file: str,
    old: str,
    new: str,
    gate: str = "semantics",
) -> Mutant:
    """A change in the text of another file of the port."""
    return Mutant(name, what, gate, guilty, source, ((file, old, new),))


def rewrite(tensor: nn.Parameter, values: Tensor) -> None:
    """Gives a parameter other values."""
    tensor.data = values.contiguous().clone()


def edit(*names: str) -> Callable[[Callable[[Tensor], Tensor]], Callable[[Any], None]]:
    """`edit(names)(f)` changes parameters by f; `{}` in a name stands for every block."""

    def of(f: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
        def apply(model: Any) -> None:  # noqa: ANN401
            for name, parameter in model.named_parameters():
                if any(re.fullmatch(re.escape(n).replace(r"\{\}", r"\d+"), name) for n in names):
                    rewrite(parameter, f(parameter.data))

        return apply

    return of


def swap(first: str, second: str) -> Callable[[Any], None]:
    """Swaps the tensors of two modules."""

    def apply(model: Any) -> None:  # noqa: ANN401
        one, other = model.get_submodule(first), model.get_submodule(second)
        for name, _ in list(one.named_parameters()):
            a, b = one.get_parameter(name), other.get_parameter(name)
            a.data, b.data = b.data, a.data

    return apply


def hook(path: str, f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any], None]:
    """Changes what a module returns: f(its first input, its output)."""

    def apply(model: Any) -> None:  # noqa: ANN401
        for name, part in model.named_modules():
            if re.fullmatch(re.escape(path).replace(r"\{\}", r"\d+"), name):
                part.register_forward_hook(lambda _, args, out: f(args[0], out))

    return apply


def activations(where: str, function: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    """Gives the MLPs whose path matches another activation."""

    def apply(model: Any) -> None:  # noqa: ANN401
        for name, part in model.named_modules():
            if name.endswith("mlp") and re.search(where, name):
                part.activation = function

    return apply


def eps(where: str, value: float) -> Callable[[Any], None]:
    """Gives the LayerNorms whose path matches another eps."""

    def apply(model: Any) -> None:  # noqa: ANN401
        for name, part in model.named_modules():
            if isinstance(part, nn.LayerNorm) and re.search(where, name):
                part.eps = value

    return apply


def order(pick: Callable[[int], list[int]]) -> Callable[[Any], None]:
    """Runs the blocks in another order; the modules keep their names, and their tensors move."""

    def apply(model: Any) -> None:  # noqa: ANN401
        blocks = model.transformer.encoder.encoder_blocks
        states = [{k: v.clone() for k, v in b.state_dict().items()} for b in blocks]
        for part, i in zip(blocks, pick(len(blocks)), strict=True):
            part.load_state_dict(states[i])

    return apply


def narrow(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Rounds to a dtype and back."""
    return lambda t: t.to(dtype).to(t.dtype)


def tf32(t: Tensor) -> Tensor:
    """Rounds to the 10 bits of TF32."""
    scale = torch.exp2(torch.frexp(t.double())[1].double() - 11)
    return ((t.double() / scale).round() * scale).to(t.dtype)


def int8(t: Tensor) -> Tensor:
    """Quantises to 8 bits, one scale a row, and back."""
    scale = t.abs().amax(dim=-1, keepdim=True) / 127
    return (t / scale).round() * scale


B = "transformer.encoder.encoder_blocks.{}"
B5 = "transformer.encoder.encoder_blocks.5"
A, EMB, HEAD = f"{B}.self_attn", "transformer.embeddings", "pooling_head"
TABLE = f"{EMB}.position_embedding.weight"
CONV = f"{EMB}.patch_embedding"
ACT = 'functools.partial(F.gelu, approximate="tanh")'
LNS = "ln1 ln2 post head-ln"
BLOCK_1 = (
    "hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states), mask=mask)"
)
BLOCK_2 = "return hidden_states + self.mlp(self.layer_norm2(hidden_states))"
POST = "return self.post_layernorm(self.encoder(hidden_states, mask))"
EMBED = (
    "return patches.flatten(2).transpose(1, 2) + self.positions(patches.shape[2], patches.shape[3])"
)
POOL_1 = "pooled = self.attention(tokens, query=self.probe.expand(tokens.shape[0], -1, -1), mask=mask)  # [B, 1, D]"
POOL_2 = "pooled = pooled + self.mlp(self.layernorm(pooled))"
LOOP = "for block in self.encoder_blocks:\n            hidden_states = self._through(block, hidden_states, mask)\n        return hidden_states"
HEAD_CALL = "return self.pooling_head(tokens.to(self.pooling_head.probe.dtype), mask)"
ENCODE = "return self.transformer(pixel_values, pixel_attention_mask, spatial_shapes)"
QPROJ = "self.q_proj(hidden_states if query is None else query)"

# fmt: off
ACTIVATION = [
    code("gelu_exact", "exact GELU for tanh GELU", "act head-act", "timm 1.0.31; kyutai-labs/pocket-tts#278", ACT, "F.gelu"),
    change("gelu_exact_encoder", "exact GELU in the blocks", "act", "nntrainer/nntrainer#3745", activations("blocks", F.gelu)),
    change("gelu_exact_head", "exact GELU in the head only", "head-act", "variant", activations("head", F.gelu)),
    change("gelu_exact_once", "exact GELU in one block", "5.act", "variant", activations(r"blocks\.5", F.gelu)),
    code("quick_gelu", "QuickGELU", "act head-act", "mlfoundations/open_clip#771", ACT, "lambda x: x * torch.sigmoid(1.702 * x)"),
    code("silu", "SiLU, the builder's default", "act head-act", "NVIDIA/TensorRT-Model-Connect#720", ACT, "F.silu"),
    code("relu", "ReLU", "act head-act", "variant", ACT, "F.relu"),
    code("gelu_tanh_constant", "tanh GELU with 0.8 for sqrt(2/pi)", "act head-act", "variant", ACT,
         "lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3)))"),
    code("gelu_cubic_constant", "tanh GELU with 0.0447 for 0.044715", "act head-act", "variant", ACT,
         "lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.0447 * x**3)))"),
    code("activation_missing", "no activation", "act head-act", "variant", "self.fc2(self.activation(self.fc1(hidden_states)))",
         "self.fc2(self.fc1(hidden_states))"),
    code("activation_twice", "activation applied twice", "act head-act", "variant", "self.fc2(self.activation(self.fc1(hidden_states)))",
         "self.fc2(self.activation(self.activation(self.fc1(hidden_states))))"),
]

NORMALISATION = [
    norm("ln_eps_1e-5", "eps 1e-5, the framework's default", LNS, "salesforce/LAVIS#106; huggingface/candle#271",
         "F.layer_norm(x, self.normalized_shape, g, b, 1e-5)"),
    norm("ln_eps_1e-12", "eps 1e-12", LNS, "huggingface/transformers#18137", "F.layer_norm(x, self.normalized_shape, g, b, 1e-12)"),
    change("ln_eps_head", "eps 1e-5 in the head only", "head-ln", "variant", eps("head", 1e-5)),
    change("ln_eps_post", "eps 1e-5 in post_layernorm only", "post", "variant", eps("post", 1e-5)),
    change("ln_eps_once", "eps 1e-5 in one LayerNorm", "5.ln2", "variant", eps(r"blocks\.5\.layer_norm2", 1e-5)),
    norm("ln_eps_outside", "eps outside the square root", LNS, "codertimo/BERT-pytorch#30",
         "(x - x.mean(-1, True)) / (x.std(-1, correction=0, keepdim=True) + eps) * g + b"),
    norm("ln_unbiased", "variance with N - 1", LNS, "LBANN/lbann#2024; harvardnlp/annotated-transformer#119",
         "(x - x.mean(-1, True)) / (x.var(-1, keepdim=True) + eps).sqrt() * g + b"),
    norm("ln_gain_missing", "no gain", LNS, "LBANN/lbann#2076", "F.layer_norm(x, self.normalized_shape, None, b, eps)"),
    norm("ln_bias_missing", "no bias", LNS, "LBANN/lbann#2076", "F.layer_norm(x, self.normalized_shape, g, None, eps)"),
    norm("ln_gain_plus1", "gain 1 + w", LNS, "linkedin/Liger-Kernel#74; pytorch/executorch#19901",
         "F.layer_norm(x, self.normalized_shape, 1 + g, b, eps)"),
    norm("rmsnorm", "RMSNorm", LNS, "variant", "x / (x.square().mean(-1, True) + eps).sqrt() * g + b"),
    norm("ln_mean_only", "mean taken out, not divided by the deviation", LNS, "variant", "(x - x.mean(-1, True)) * g + b"),
    norm("ln_over_tokens", "normalised over tokens and features together", LNS, "keras-team/keras axis default",
         "F.layer_norm(x, x.shape[-2:], None, None, eps) * g + b"),
    change("norms_swapped", "the two LayerNorms of every block swapped", "ln1 ln2", "variant",
           lambda m: [swap(f"transformer.encoder.encoder_blocks.{i}.layer_norm1", f"transformer.encoder.encoder_blocks.{i}.layer_norm2")(m)
                      for i in range(len(m.transformer.encoder.encoder_blocks))]),
    change("norms_swapped_post", "post_layernorm with the head's weights", "post head-ln", "variant",
           swap("transformer.post_layernorm", f"{HEAD}.layernorm")),
    code("post_ln_missing", "post_layernorm missing", "post post-in tokens head-k head-v", "mlc-ai/mlc-llm#3205; vllm-project/vllm#8155", POST,
         "return self.encoder(hidden_states)"),
    code("post_ln_twice", "post_layernorm applied twice", "post post-in tokens head-k head-v", "vllm-project/vllm#8106; ggml-org/llama.cpp#1925", POST,
         "return self.post_layernorm(self.post_layernorm(self.encoder(hidden_states)))"),
    code("pre_ln_added", "an extra LayerNorm after the embeddings (CLIP's ln_pre)", "0.in embeddings", "openai/CLIP#152", POST,
         "return self.post_layernorm(self.encoder(F.layer_norm(hidden_states, (pixel_values.shape[0] and self.post_layernorm.normalized_shape))))"),
    Mutant("post_norm", "post-norm for pre-norm", "semantics", "block", "SHI-Labs/Compact-Transformers#25",
           (("model", BLOCK_1, "hidden_states = self.layer_norm1(hidden_states + self.self_attn(hidden_states))"),
            ("model", BLOCK_2, "return self.layer_norm2(hidden_states + self.mlp(hidden_states))"))),
    code("ln_in_residual", "the MLP's residual taken after the norm", "out", "jeonsworld/ViT-pytorch#5", BLOCK_2,
         "return self.layer_norm2(hidden_states) + self.mlp(self.layer_norm2(hidden_states))"),
]

ATTENTION = [
    attention("scale_none", "not scaled", "huggingface/transformers#39043; ggml-org/llama.cpp#17516", "F.scaled_dot_product_attention(q, k, v, scale=1.0)"),
    attention("scale_sqrt_dim", "scaled by the width of all heads", "lucidrains/vit-pytorch#65; karpathy/ng-video-lecture#6",
              "F.scaled_dot_product_attention(q, k, v, scale=(self.num_heads * self.head_dim) ** -0.5)"),
    attention("scale_twice", "scaled twice", "variant", "F.scaled_dot_product_attention(q * s, k, v, scale=s)"),
    attention("scale_inverted", "multiplied by sqrt(head_dim)", "huggingface/transformers#39043", "F.scaled_dot_product_attention(q, k, v, scale=1 / s)"),
    attention("scale_num_heads", "scaled by the number of heads", "tenstorrent/tt-metal#56789", "F.scaled_dot_product_attention(q, k, v, scale=self.num_heads**-0.5)"),
    attention("scale_padded", "scaled for a padded head_dim", "intel/ipex-llm#12619; bytedance-iaas/sglang#485", "F.scaled_dot_product_attention(q, k, v, scale=32**-0.5)"),
    attention("scale_bf16", "the scale rounded to bfloat16", "variant", "F.scaled_dot_product_attention(q, k, v, scale=float(torch.tensor(s).bfloat16()))"),
    code("scale_head_none", "not scaled in the head only", "head-context", "LAION-AI/temporal-embedding-aggregation#23",
         "scale=self.head_dim**-0.5", "scale=self.head_dim**-0.5 if query is None else 1.0"),
    attention("softmax_dim", "softmax over the queries", "variant", "(q @ k.mT * s).softmax(-2) @ v"),
    attention("softmax_plus_one", "one added to the softmax's sum", "variant", "F.pad(q @ k.mT * s, (0, 1)).softmax(-1)[..., :-1] @ v"),
    attention("softmax_no_normalisation", "sigmoid for softmax", "variant", "(q @ k.mT * s).sigmoid() @ v"),
    attention("causal_mask", "causal mask", "microsoft/onnxruntime#25360; ggml-org/llama.cpp#23800", "F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=s)",
              guilty="context head-context"),
    attention("mask_last_token", "the last key masked", "Blaizzy/mlx-vlm#2266", "F.scaled_dot_product_attention(q, k[..., :-1, :], v[..., :-1, :], scale=s)"),
    attention("mask_first_token", "the first key dropped, as if it were CLS", "TinyLLaVA/TinyLLaVA_Factory#203", "F.scaled_dot_product_attention(q, k[..., 1:, :], v[..., 1:, :], scale=s)"),
    attention("window", "attention to near tokens only", "variant",
              "F.scaled_dot_product_attention(q, k, v, (torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])).abs() < 30, scale=s)", guilty="context head-context"),
    attention("attn_dropout", "attention dropout active at inference", "karpathy/nanoGPT#240; LAION-AI/CLIP_benchmark#73",
              "F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, scale=s)", "liveness", "context head-context tokens pooled inputs"),
    attention("head_interleave_split", "heads read as (width, head)", "lsdefine/attention-is-all-you-need-keras#36",
              "(lambda f: F.scaled_dot_product_attention(f(q), f(k), f(v), scale=s))(lambda t: t.transpose(1, 2).flatten(2).unflatten(-1, (-1, self.num_heads)).permute(0, 3, 1, 2))"),
    code("merge_missing_transpose", "heads merged without the transpose", "context head-context", "jsbaan/transformer-from-scratch#6; meta-pytorch/opacus#825",
         MERGE, "context.flatten(1).unflatten(1, (context.shape[2], -1))"),
    code("merge_interleaved", "heads merged as (width, head)", "context head-context", "variant", MERGE, "context.permute(0, 2, 3, 1).flatten(2)"),
    code("split_missing_transpose", "heads split without the transpose", "context head-context", "hyunwoongko/transformer#15",
         "x.view(*x.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)", "x.reshape(x.shape[0], self.num_heads, -1, self.head_dim)"),
    code("num_heads_wrong", "half as many heads", "context head-context", "huggingface/transformers#39089; salesforce/LAVIS#106",
         "self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim",
         "self.num_heads, self.head_dim = config.num_attention_heads // 2 or 1, config.embed_dim // (config.num_attention_heads // 2 or 1)"),
    code("one_head", "one head", "context head-context", "variant", "self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim",
         "self.num_heads, self.head_dim = 1, config.embed_dim"),
    attention("qk_swapped_in_scores", "scores of k against q", "variant", "F.scaled_dot_product_attention(k, q, v, scale=s) if q.shape == k.shape else F.scaled_dot_product_attention(q, k, v, scale=s)", guilty="context"),
    attention("value_is_key", "keys in place of the values", "huggingface/transformers#40257", "F.scaled_dot_product_attention(q, k, k, scale=s)"),
    attention("last_head_dropped", "the last head left out", "variant", "F.scaled_dot_product_attention(q, k, v, scale=s) * (torch.arange(self.num_heads)[:, None, None] < self.num_heads - 1)"),
    attention("scores_clipped", "scores clipped to 5", "variant", "(q @ k.mT * s).clamp(-5, 5).softmax(-1) @ v"),
    attention("relative_bias", "a bias on the diagonal of the scores", "variant",
              "F.scaled_dot_product_attention(q, k, v, torch.eye(q.shape[2], k.shape[2], dtype=q.dtype), scale=s)"),
    attention("rotary", "rotary position embedding in a tower without", "tenstorrent/tt-metal#32024",
              "(lambda r: F.scaled_dot_product_attention(r(q), r(k), v, scale=s))(lambda t: "
              "(lambda a, c, d: torch.cat([c * a.cos() - d * a.sin(), c * a.sin() + d * a.cos()], "
              "-1))"
              "(torch.arange(t.shape[2], dtype=t.dtype)[:, None] / 50, *t.chunk(2, -1)))", guilty="context head-context"),
    code("out_proj_missing", "out_proj not applied", "attention head-attention head-context", "variant", f"return self.out_proj({MERGE})", f"return {MERGE}"),
    code("query_from_values", "queries made by v_proj", "q head-q head-v context head-context v", "vllm-project/vllm#42803", QPROJ, "self.v_proj(hidden_states if query is None else query)"),
    code("qk_norm", "q and k normalised, as in newer towers", "context head-context", "variant", "        context = F.scaled", "        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)\n        context = F.scaled"),
]

PROJECTIONS = [
    loaded("qk_swapped", "q and k swapped", "q k", "vllm-project/vllm#42803", lambda m: [swap(f"{B}.self_attn.q_proj".format(i), f"{B}.self_attn.k_proj".format(i))(m) for i in range(len(m.transformer.encoder.encoder_blocks))]),
    loaded("kv_swapped", "k and v swapped", "k v", "huggingface/transformers#40257", lambda m: [swap(f"{B}.self_attn.k_proj".format(i), f"{B}.self_attn.v_proj".format(i))(m) for i in range(len(m.transformer.encoder.encoder_blocks))]),
    loaded("qv_swapped", "q and v swapped", "q v", "huggingface/transformers#40257", lambda m: [swap(f"{B}.self_attn.q_proj".format(i), f"{B}.self_attn.v_proj".format(i))(m) for i in range(len(m.transformer.encoder.encoder_blocks))]),
    loaded("kv_swapped_once", "k and v of one block swapped", "5.k 5.v", "variant", swap(f"{B5}.self_attn.k_proj", f"{B5}.self_attn.v_proj")),
    loaded("qkv_rotated", "q, k, v read as k, v, q", "q k v", "awslabs/slapo#46", lambda m: [(swap(f"{B}.self_attn.q_proj".format(i), f"{B}.self_attn.k_proj".format(i))(m), swap(f"{B}.self_attn.q_proj".format(i), f"{B}.self_attn.v_proj".format(i))(m)) for i in range(len(m.transformer.encoder.encoder_blocks))]),
    loaded("qkv_bias_swapped", "biases of k and v swapped", "k v", "variant", lambda m: [_swap_bias(block(m, i).self_attn.k_proj, block(m, i).self_attn.v_proj) for i in range(len(m.transformer.encoder.encoder_blocks))]),
    loaded("fused_qkv_interleaved", "fused qkv read as interleaved", "q k v", "awslabs/slapo#46; Oneflow-Inc/libai#146", lambda m: [_interleave(block(m, i).self_attn) for i in range(len(m.transformer.encoder.encoder_blocks))]),
    loaded("q_rope_permuted", "rope's permutation of q's rows", "q", "tenstorrent/tt-metal#32024", edit(f"{A}.q_proj.weight", f"{A}.q_proj.bias")(lambda t: _rope(t))),
    loaded("q_weight_transposed", "q's weight left transposed", "q", "vllm-project/vllm#44113; mindspore-lab/mindone#399", edit(f"{A}.q_proj.weight")(lambda t: t.T)),
    loaded("out_weight_transposed", "out_proj's weight left transposed", "attention", "vllm-project/vllm#44113", edit(f"{A}.out_proj.weight")(lambda t: t.T)),
    loaded("qkv_transposed", "q, k and v transposed", "q k v", "mindspore-lab/mindone#399", edit(f"{A}.q_proj.weight", f"{A}.k_proj.weight", f"{A}.v_proj.weight")(lambda t: t.T)),
]

BIASES = [
    loaded("q_bias_missing", "bias of q missing", "q", "microsoft/onnxruntime-genai#1059", edit(f"{A}.q_proj.bias")(torch.zeros_like)),
    loaded("v_bias_missing", "bias of v missing", "v", "shadowpa0327/Palu#8", edit(f"{A}.v_proj.bias")(torch.zeros_like)),
    loaded("qkv_bias_missing", "biases of q, k and v missing", "q k v", "huggingface/transformers#48675", edit(f"{A}.q_proj.bias", f"{A}.k_proj.bias", f"{A}.v_proj.bias")(torch.zeros_like)),
    loaded("out_bias_missing", "bias of out_proj missing", "attention", "callummcdougall/ARENA_3.0#58", edit(f"{A}.out_proj.bias")(torch.zeros_like)),
    loaded("fc1_bias_missing", "bias of fc1 missing", "fc1", "callummcdougall/ARENA_3.0#58", edit(f"{B}.mlp.fc1.bias")(torch.zeros_like)),
    loaded("fc2_bias_missing", "bias of fc2 missing", "mlp", "callummcdougall/ARENA_3.0#58", edit(f"{B}.mlp.fc2.bias")(torch.zeros_like)),
    loaded("mlp_bias_missing", "biases of the MLPs missing", "fc1 mlp", "callummcdougall/ARENA_3.0#58", edit(f"{B}.mlp.fc1.bias", f"{B}.mlp.fc2.bias")(torch.zeros_like)),
    loaded("conv_bias_missing", "bias of the patch convolution missing", "patch", "variant", edit(f"{CONV}.bias")(torch.zeros_like)),
    loaded("one_bias_missing", "one bias not loaded", "5.fc1", "sgl-project/sglang#38777", edit(f"{B5}.mlp.fc1.bias")(torch.zeros_like)),
    code("v_bias_unused", "v_proj called without its bias", "v head-v context head-context", "shadowpa0327/Palu#8", "self._split_heads(self.v_proj(hidden_states))", "self._split_heads(F.linear(hidden_states, self.v_proj.weight))", "liveness"),
    code("out_bias_twice", "out_proj's bias added twice", "attention head-attention", "variant", f"return self.out_proj({MERGE})", f"return self.out_proj({MERGE}) + self.out_proj.bias"),
    code("fc_bias_unused", "fc2 called without its bias", "mlp head-mlp", "variant", "self.fc2(self.activation(self.fc1(hidden_states)))", "F.linear(self.activation(self.fc1(hidden_states)), self.fc2.weight)", "liveness"),
    code("k_bias_unused", "k_proj called without its bias: no output can show it", "k head-k", "facebookresearch/dinov3#58", "self._split_heads(self.k_proj(hidden_states))", "self._split_heads(F.linear(hidden_states, self.k_proj.weight))", "liveness"),
    loaded("k_bias_missing", "biases of k missing: no output can show it", "k", "baaivision/EVA#53; facebookresearch/dinov3#58", edit(f"{A}.k_proj.bias")(torch.zeros_like)),
    loaded("k_bias_missing_once", "one bias of k missing: no output can show it", "5.k", "MCG-NJU/VideoMAE#41", edit(f"{B5}.self_attn.k_proj.bias")(torch.zeros_like)),
    loaded("head_k_bias_missing", "the head's bias of k missing: no output can show it", "head-k", "variant", edit(f"{HEAD}.attention.k_proj.bias")(torch.zeros_like)),
]

WEIGHTS = [
    loaded("one_ln_missing", "one LayerNorm not loaded", "5.ln1", "thunlp/LLaVA-UHD#27; huggingface/transformers#28073", lambda m: block(m).layer_norm1.reset_parameters()),
    loaded("one_block_fresh", "one block not loaded", "5.block", "LLaVA-VL/LLaVA-NeXT#265; sgl-project/sglang#32279", lambda m: [p.reset_parameters() for p in block(m).modules() if hasattr(p, "reset_parameters")]),
    loaded("last_fc2_missing", "the last fc2 not loaded", "mlp", "variant", lambda m: block(m, 99).mlp.fc2.weight.data.zero_()),
    loaded("truncated_tail", "the tail of a tensor reads as zeros", "mlp", "osaurus-ai/vmlx-swift#217; Comfy-Org/ComfyUI#6744", lambda m: block(m, 99).mlp.fc2.weight.data[-7:].zero_()),
    loaded("single_element", "one element corrupted", "5.v", "MiaAI-Lab/Qwen3.8-Flash-Next-Dual-DGX-Sparks#34", lambda m: block(m).self_attn.v_proj.weight.data[3, 3].add_(1e-3)),
    loaded("single_bit", "the lowest bit of one element flipped", "5.mlp", "MiaAI-Lab/Qwen3.8-Flash-Next-Dual-DGX-Sparks#34", lambda m: block(m).mlp.fc2.weight.data.view(torch.int32).view(-1)[7].bitwise_xor_(1)),
    loaded("blocks_swapped", "two blocks swapped", "1.block 2.block", "variant", order(lambda n: [0, 2, 1, *range(3, n)])),
    loaded("blocks_lexicographic", "blocks in text order (0, 1, 10, 2 ...)", "block", "ollama/ollama#12015; arcee-ai/mergekit#143", order(lambda n: sorted(range(n), key=str))),
    loaded("blocks_reversed", "blocks in reverse", "block", "variant", order(lambda n: list(range(n))[::-1])),
    loaded("blocks_share_weights", "all blocks share the first one's weights", "block", "linkedin/Liger-Kernel#269; zalandoresearch/pytorch-vq-vae#2", order(lambda n: [0] * n)),
    loaded("weights_fp16", "weights rounded to float16", "patch embeddings block post head head-q head-k head-v head-attention head-ln head-fc1 head-mlp", "NVIDIA/TensorRT#4373", lambda m: m.half().float()),
    loaded("weights_bf16", "weights rounded to bfloat16", "patch embeddings block post head head-q head-k head-v head-attention head-ln head-fc1 head-mlp", "NVIDIA/TensorRT#3908", lambda m: m.bfloat16().float()),
    loaded("weights_int8", "weights quantised to 8 bits", "q k v attention fc1 mlp", "variant", edit(*(f"{A}.{p}_proj.weight" for p in ("q", "k", "v", "out")), f"{B}.mlp.fc1.weight", f"{B}.mlp.fc2.weight")(int8)),
    loaded("pos_bf16", "position table rounded to bfloat16", "embeddings", "TensorAuto/OpenTau#482; TensorAuto/OpenTau#483", edit(TABLE)(narrow(torch.bfloat16))),
    loaded("conv_fp16", "patch weights rounded to float16", "patch", "variant", edit(f"{CONV}.weight")(narrow(torch.float16))),
    loaded("probe_fresh", "the probe not loaded", "head-q", "LLaVA-VL/LLaVA-NeXT#265", edit(f"{HEAD}.probe")(lambda t: torch.randn(t.shape, generator=torch.Generator().manual_seed(9)))),
    loaded("probe_zero", "the probe left at zero", "head-q", "LLaVA-VL/LLaVA-NeXT#265", edit(f"{HEAD}.probe")(torch.zeros_like)),
    loaded("head_kv_swapped", "k and v of the head swapped", "head-k head-v", "variant", swap(f"{HEAD}.attention.k_proj", f"{HEAD}.attention.v_proj")),
    loaded("head_qk_swapped", "q and k of the head swapped", "head-q head-k", "variant", swap(f"{HEAD}.attention.q_proj", f"{HEAD}.attention.k_proj")),
    loaded("head_in_bias_missing", "the head's in_proj bias missing", "head-q head-k head-v", "variant", edit(*(f"{HEAD}.attention.{p}_proj.bias" for p in "qkv"))(torch.zeros_like)),
    loaded("head_out_bias_missing", "the head's out_proj bias missing", "head-attention", "variant", edit(f"{HEAD}.attention.out_proj.bias")(torch.zeros_like)),
    loaded("head_in_weight_transposed", "the head's in_proj transposed", "head-q head-k head-v", "variant", edit(*(f"{HEAD}.attention.{p}_proj.weight" for p in "qkv"))(lambda t: t.T)),
    loaded("tied_blocks", "two blocks are one object", "1.block 2.block 3.block", "MishaLaskin/vqvae#21", lambda m: m.transformer.encoder.encoder_blocks.__setitem__(2, m.transformer.encoder.encoder_blocks[1])),
    loaded("one_bias_removed", "one bias no parameter any more", "5.mlp", "sgl-project/sglang#38777", lambda m: block(m).mlp.fc2.register_parameter("bias", None)),
    loaded("negative_zero", "the zeros of a bias change their sign", "5.fc1", "variant", edit(f"{B5}.mlp.fc1.bias")(lambda t: torch.where(torch.arange(len(t)) == 3, -t, t))),
]

PATCHES = [
    loaded("conv_transposed", "kernel transposed (x for y)", "patch", "variant", edit(f"{CONV}.weight")(lambda t: t.transpose(2, 3))),
    loaded("conv_bgr", "kernel channels reversed", "patch", "PaddlePaddle/PaddleClas#1312", edit(f"{CONV}.weight")(lambda t: t.flip(1))),
    loaded("conv_flipped", "kernel flipped", "patch", "variant", edit(f"{CONV}.weight")(lambda t: t.flip(2, 3))),
    loaded("patchify_chw_hwc", "kernel read as (h, w, channel)", "patch", "vllm-project/vllm-omni#6702; Blaizzy/mlx-vlm#1545", edit(f"{CONV}.weight")(lambda t: t.flatten(1).unflatten(1, (*t.shape[2:], t.shape[1])).permute(0, 3, 1, 2))),
    code("conv_same_pad", "pictures padded by one pixel at the top left", "patch", "variant", "self.patch_embedding(pixel_values.to(", "self.patch_embedding(F.pad(pixel_values, (1, -1, 1, -1)).to("),
    code("conv_stretched", "the whole picture squeezed into the patches", "patch inputs", "variant", "self.patch_embedding(pixel_values.to(", "self.patch_embedding(F.interpolate(pixel_values, size=self.config.grid_size * self.config.patch_size, mode='bilinear').to("),
    code("crop_centred", "the margin taken off both sides", "patch inputs", "variant", "self.patch_embedding(pixel_values.to(", "self.patch_embedding(pixel_values[..., self.config.image_size % self.config.patch_size // 2 :, self.config.image_size % self.config.patch_size // 2 :].to("),
    code("patch_order_columns", "patches in columns", "embeddings", "pytorch/torchtitan#4244", EMBED, "return patches.transpose(2, 3).flatten(2).transpose(1, 2) + self.position_embedding.weight"),
    code("patch_order_reversed", "patches in reverse", "embeddings", "variant", EMBED, "return patches.flatten(2).transpose(1, 2).flip(1) + self.position_embedding.weight"),
    code("flatten_no_transpose", "patches flattened without the transpose", "embeddings", "duoan/TorchCode#21", EMBED, "return patches.flatten(2).reshape(patches.shape[0], -1, patches.shape[1]) + self.position_embedding.weight"),
    loaded("pos_transposed", "position grid transposed (x for y)", "embeddings", "pytorch/torchtitan#4244", edit(TABLE)(lambda t: t.unflatten(0, (math.isqrt(len(t)), -1)).transpose(0, 1).flatten(0, 1))),
    loaded("pos_off_by_one", "positions off by one", "embeddings", "KempnerInstitute/KempnerForge#80; huggingface/transformers#33871", edit(TABLE)(lambda t: t.roll(1, 0))),
    code("pos_ids_zero", "every token at position 0", "embeddings", "huggingface/text-generation-inference#1064", EMBED, "return patches.flatten(2).transpose(1, 2) + self.position_embedding.weight[:1]"),
    code("pos_missing", "no position embedding", "embeddings", "clip-vil/CLIP-ViL#13", EMBED, "return patches.flatten(2).transpose(1, 2)", "liveness"),
    code("pos_twice", "position embedding added twice", "embeddings", "variant", EMBED, "return patches.flatten(2).transpose(1, 2) + 2 * self.position_embedding.weight"),
    loaded("pos_sincos", "a sine table for the learned one", "embeddings", "variant", edit(TABLE)(lambda t: torch.sin(torch.arange(t.numel()).reshape(t.shape) / 7))),
    code("pos_before_flatten", "positions of the wrong axis: (x, y) for (y, x)", "embeddings", "variant", EMBED, "return (patches + self.position_embedding.weight.unflatten(0, patches.shape[-2:]).permute(2, 1, 0)).flatten(2).transpose(1, 2)"),
    code("embed_scale", "embeddings multiplied by sqrt(D)", "embeddings", "variant", EMBED, "return (patches.flatten(2).transpose(1, 2) + self.position_embedding.weight) * self.config.embed_dim**0.5"),
    code("embed_dropout", "dropout after the embeddings", "embeddings 0.in pooled", "huggingface/pytorch-image-models#1978", EMBED, "return F.dropout(patches.flatten(2).transpose(1, 2) + self.position_embedding.weight, 0.05, True)", "liveness"),
]

STACK = [
    code("attn_residual_missing", "residual around the attention missing", "residual", "variant", BLOCK_1, "hidden_states = self.self_attn(self.layer_norm1(hidden_states))"),
    code("attn_residual_from_ln", "the attention's residual taken after the norm", "residual", "jeonsworld/ViT-pytorch#5", BLOCK_1, "hidden_states = self.layer_norm1(hidden_states) + self.self_attn(self.layer_norm1(hidden_states))"),
    code("mlp_residual_missing", "residual around the MLP missing", "out", "variant", BLOCK_2, "return self.mlp(self.layer_norm2(hidden_states))"),
    code("parallel_block", "attention and MLP in parallel", "block", "variant", f"{BLOCK_1}\n        {BLOCK_2}", "return hidden_states + self.self_attn(self.layer_norm1(hidden_states)) + self.mlp(self.layer_norm2(hidden_states))"),
    code("layerscale", "a LayerScale of 0.1", "residual", "variant", BLOCK_1, "hidden_states = hidden_states + 0.1 * self.self_attn(self.layer_norm1(hidden_states))"),
    code("droppath", "the MLP's branch scaled for a drop path of 0.1", "out", "variant", BLOCK_2, "return hidden_states + self.mlp(self.layer_norm2(hidden_states)) / 0.9"),
    change("droppath_last", "the last block's attention dropped", "10.attention 10.residual", "variant", lambda m: hook(f"{B}.self_attn".format(len(m.transformer.encoder.encoder_blocks) - 1), lambda x, y: 0 * y)(m)),
    code("last_block_skipped", "last block left out", "10.block post-in", "vllm-project/vllm#13514; zjysteven/lmms-finetune#4", LOOP, "for block in self.encoder_blocks[:-1]:\n            hidden_states = block(hidden_states)\n        return hidden_states", "liveness"),
    code("first_block_skipped", "first block left out", "0.block 1.in", "variant", LOOP, "for block in self.encoder_blocks[1:]:\n            hidden_states = block(hidden_states)\n        return hidden_states", "liveness"),
    code("last_block_twice", "last block run twice", "10.block post-in", "variant", LOOP, "for block in [*self.encoder_blocks, self.encoder_blocks[-1]]:\n            hidden_states = block(hidden_states)\n        return hidden_states"),
    code("all_blocks_twice", "all blocks run twice", "block post-in", "mbanani/probe3d#9", LOOP, "for block in [*self.encoder_blocks, *self.encoder_blocks]:\n            hidden_states = block(hidden_states)\n        return hidden_states"),
    code("run_in_text_order", "blocks run in text order", "block post-in", "ollama/ollama#12015", LOOP, "for i in sorted(range(len(self.encoder_blocks)), key=str):\n            hidden_states = self.encoder_blocks[i](hidden_states)\n        return hidden_states"),
    code("penultimate", "tokens of the last block but one", "10.block post-in post tokens", "vllm-project/vllm#13514", LOOP, "for block in self.encoder_blocks:\n            before, hidden_states = hidden_states, block(hidden_states)\n        return before", "liveness"),
    code("first_token_dropped", "the first token dropped, as if it were CLS", "tokens pooled head head-k head-v head-context", "TinyLLaVA/TinyLLaVA_Factory#203", ENCODE, "return self.transformer(pixel_values)[:, 1:]", "semantics"),
    code("nan_output", "one token not a number", "tokens head head-k head-v head-context head-attention head-ln head-fc1 head-act head-mlp pooled", "vllm-project/vllm#40290; Blaizzy/mlx-vlm#293", ENCODE, "return self.transformer(pixel_values) * torch.where(torch.arange(self.config.num_patches) == 7, torch.nan, 1.0)[:, None].to(pixel_values.dtype)", "liveness"),
    code("batch_leak", "a hundredth of the batch's mean in every picture", "post-in 0.in embeddings", "variant", POST, "x = hidden_states\n        return self.post_layernorm(self.encoder(x + x.mean(0, keepdim=True) / 100))", "liveness"),
    code("tokens_l2", "tokens scaled to unit length", "tokens head-k head-v", "variant", ENCODE, "return F.normalize(self.transformer(pixel_values), dim=-1)"),
]

POOLING = [
    code("mean_pool", "mean of the tokens for the head", "pooled block head head-q head-k head-v head-context head-attention head-ln head-fc1 head-act head-mlp", "vllm-project/semantic-router#1927", HEAD_CALL, "return tokens.mean(1)", "liveness"),
    code("mean_pool_tanh", "tanh of the mean", "pooled head head-q head-k head-v head-context head-attention head-ln head-fc1 head-act head-mlp", "vllm-project/semantic-router#1927", HEAD_CALL, "return tokens.mean(1).tanh()", "liveness"),
    code("first_token", "the first token as CLS", "inputs pooled head head-q head-k head-v head-context head-attention head-ln head-fc1 head-act head-mlp", "huggingface/transformers#34447", HEAD_CALL, "return tokens[:, 0]", "liveness"),
    code("probe_ln", "the probe normalised", "head-q", "variant", POOL_1, "pooled = self.attention(tokens, query=F.layer_norm(self.probe, self.probe.shape[-1:]).expand(tokens.shape[0], -1, -1))"),
    code("kv_ln", "tokens normalised again before k and v", "head-k head-v head-ln", "vllm-project/vllm#8106", POOL_1, "pooled = self.attention(self.layernorm(tokens), query=self.probe.expand(tokens.shape[0], -1, -1))"),
    code("batch_first_false", "the head attends over the batch", "head-ln head-q head-k head-v head-context head-attention head pooled", "om-ai-lab/OmDet#19; IBM/TabFormer#14", POOL_1,
         "pooled = self.attention(tokens.flatten(0, 1)[None], query=self.probe).expand(tokens.shape[0], -1, -1)", "liveness"),
    code("probe_residual", "residual around the head's attention", "head-attention head-ln head", "variant", POOL_1, "probe = self.probe.expand(tokens.shape[0], -1, -1)\n        pooled = probe + self.attention(tokens, query=probe)"),
    code("head_ln_missing", "the head's LayerNorm missing", "head-ln head-fc1", "variant", POOL_2, "pooled = pooled + self.mlp(pooled)", "liveness"),
    code("head_residual_missing", "the head's residual missing", "head", "variant", POOL_2, "pooled = self.mlp(self.layernorm(pooled))"),
    code("head_residual_from_ln", "the head's residual after the norm", "head", "variant", POOL_2, "pooled = self.layernorm(pooled)\n        pooled = pooled + self.mlp(pooled)"),
    code("head_mlp_skipped", "the head's MLP missing", "head head-ln head-fc1 head-act head-mlp", "variant", POOL_2, "", "liveness"),
    code("head_extra_ln", "a LayerNorm after the head", "head head-ln", "variant", "return pooled.squeeze(1)", "return self.layernorm(pooled).squeeze(1)"),
    code("head_on_pre_ln", "the head given tokens before post_layernorm", "head-k head-v", "vllm-project/vllm#8155", HEAD_CALL, "return self.pooling_head(tokens / tokens.std(-1, keepdim=True))"),
    code("pooled_l2", "pooled vector scaled to unit length", "pooled", "vllm-project/semantic-router#1927", HEAD_CALL, "return F.normalize(self.pooling_head(tokens), dim=-1)"),
    code("pooled_half", "pooled vector half as long", "pooled", "vllm-project/semantic-router#1927", HEAD_CALL, "return self.pooling_head(tokens) / 2"),
    code("embed_not_unit", "embed() never normalises", "pooled", "variant", "return F.normalize(pooled, dim=-1) if normalize else pooled", "return pooled", "interface"),
    code("embed_unit_over_batch", "embed() normalises over the pictures", "pooled", "variant", "return F.normalize(pooled, dim=-1) if normalize else pooled", "return F.normalize(pooled, dim=0) if normalize else pooled", "interface"),
    code("embed_of_mean", "embed() takes the mean of the tokens", "pooled", "vllm-project/semantic-router#1927", "pooled = self.pool(tokens, None if mask is None else mask[:, 0, 0])", "pooled = tokens.mean(1)", "interface"),
    code("pooled_squeezed", "squeeze without an axis: a batch of one loses it", "pooled", "variant", "return pooled.squeeze(1)", "return pooled.squeeze()", "liveness"),
    code("two_probes", "probe of another picture for every second one", "head-q", "variant", "query=self.probe.expand(tokens.shape[0], -1, -1)", "query=self.probe * (1 - 2 * (torch.arange(tokens.shape[0]) % 2))[:, None, None].to(tokens.dtype)", "semantics"),
]

ROUNDING = [
    norm("ln_fast_variance", "variance as E[x^2] - E[x]^2", LNS, "pytorch/pytorch#40308; keras-team/keras-core#866", "(x - x.mean(-1, True)) / (x.square().mean(-1, True) - x.mean(-1, True).square() + eps).sqrt() * g + b", "rounding"),
    norm("ln_bf16", "LayerNorm in bfloat16", LNS, "LibreYOLO/libreyolo#546", "F.layer_norm(x.bfloat16(), self.normalized_shape, g.bfloat16(), b.bfloat16(), eps).to(x.dtype)", "rounding"),
    norm("ln_fp16", "LayerNorm in float16", LNS, "variant", "F.layer_norm(x.half(), self.normalized_shape, g.half(), b.half(), eps).to(x.dtype)", "rounding"),
    attention("softmax_bf16", "softmax in bfloat16", "LibreYOLO/libreyolo#546; huggingface/diffusers#3483", "(q @ k.mT * s).softmax(-1, dtype=torch.bfloat16).to(q.dtype) @ v", "rounding"),
    attention("softmax_fp16", "softmax in float16", "huggingface/diffusers#3483", "(q @ k.mT * s).half().softmax(-1).to(q.dtype) @ v", "rounding"),
    attention("scores_bf16", "scores rounded to bfloat16", "variant", "(q @ k.mT * s).bfloat16().to(q.dtype).softmax(-1) @ v", "rounding"),
    code("residual_bf16", "residual stream kept in bfloat16", "residual", "variant", BLOCK_1, f"{BLOCK_1}\n        hidden_states = hidden_states.bfloat16().to(hidden_states.dtype)", "rounding"),
    code("embed_bf16", "embeddings rounded to bfloat16", "embeddings", "TensorAuto/OpenTau#482", EMBED, "return (patches.flatten(2).transpose(1, 2) + self.position_embedding.weight).bfloat16().to(patches.dtype)", "rounding"),
    code("autocast_bf16", "autocast left on", "patch", "pytorch/pytorch#157274", ENCODE, "\n        with torch.autocast('cpu', torch.bfloat16):\n            return self.transformer(pixel_values).float() if pixel_values.dtype == torch.float32 else self.transformer(pixel_values)", "rounding"),
    change("tf32", "TF32 products", "q k v context attention fc1 act mlp head-q head-k head-v head-context head-attention head-fc1 head-act head-mlp", "microsoft/onnxruntime#19288; pytorch/pytorch#157274", lambda m: [part.register_forward_pre_hook(lambda _, args: (tf32(args[0]),)) for part in m.modules() if isinstance(part, nn.Linear)], "rounding"),
    code("gelu_bf16", "activation in bfloat16", "act head-act", "variant", "self.fc2(self.activation(self.fc1(hidden_states)))", "self.fc2(self.activation(self.fc1(hidden_states).bfloat16()).to(hidden_states.dtype))", "rounding"),
    code("gelu_written_out", "tanh GELU written out in the low dtype", "act head-act mlp head-mlp", "LibreYOLO/libreyolo#546", ACT,
         "lambda x: 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))", "rounding"),
    attention("q_fp16", "queries and keys rounded to float16", "vllm-project/vllm#40290", "F.scaled_dot_product_attention(q.half().to(q.dtype), k.half().to(k.dtype), v, scale=s)", "rounding"),
    code("pool_bf16", "head run in bfloat16", "head-k head-v head-q head", "NVIDIA/TensorRT#3908", POOL_1, "tokens = tokens.bfloat16().to(tokens.dtype)\n        " + POOL_1, "rounding"),
]

PIXELS = [
    pixel("input_bgr", "BGR for RGB", "PaddlePaddle/PaddleClas#1312; Mikubill/sd-webui-controlnet#2735", lambda x: x.flip(1)),
    pixel("input_transposed", "x for y", "variant", lambda x: x.transpose(2, 3)),
    pixel("input_0_1", "not normalised", "vllm-project/semantic-router#1928; End2End-Diffusion/iREPA#8", lambda x: (x + 1) / 2),
    pixel("input_0_255", "not rescaled", "variant", lambda x: (x + 1) * 127.5),
    pixel("input_clip_mean_std", "CLIP's mean and std", "mlfoundations/open_clip#204; huggingface/transformers#38318", lambda x: _renormalise(x, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))),
    pixel("input_imagenet_mean_std", "ImageNet's mean and std", "huggingface/transformers#20995", lambda x: _renormalise(x, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
    pixel("input_normalised_twice", "normalised twice", "real-stanford/diffusion_policy#112", lambda x: (x - 0.5) / 0.5),
    pixel("input_256", "divided by 256 for 255", "variant", lambda x: (x + 1) * 255 / 256 - 1),
    pixel("input_bf16", "pixels cast to bfloat16", "TensorAuto/OpenTau#482", narrow(torch.bfloat16)),
    pixel("input_uint8", "pixels quantised to 8 bits", "variant", lambda x: ((x + 1) * 127.5).round() / 127.5 - 1),
    pixel("input_shifted", "shifted by one pixel", "variant", lambda x: x.roll((1, 1), (2, 3))),
    pixel("input_mirrored", "mirrored", "variant", lambda x: x.flip(3)),
    pixel("input_batch_reversed", "pictures in another order", "variant", lambda x: x.flip(0)),
]

LOADER = [
    loader("rows_qk_swapped", "the key map swaps q and k of the head", "head-q head-k", "variant", "key_map", '(("pooling_head.attention.q_proj.*",\n      "pooling_head.attention.k_proj.*",', '(("pooling_head.attention.k_proj.*",\n      "pooling_head.attention.q_proj.*",'),
    Mutant("rows_norms_swapped", "the key map swaps the LayerNorms", "semantics", "ln1 ln2 in residual q k v fc1", edits=(
        ("key_map", 'f"{_HF_BLOCK}.layer_norm1.*"', 'f"{_HF_BLOCK}.layer_norm2?*"'), ("key_map", 'f"{_HF_BLOCK}.layer_norm2.*"', 'f"{_HF_BLOCK}.layer_norm1.*"'),
        ("key_map", 'f"{_HF_BLOCK}.layer_norm2?*"', 'f"{_HF_BLOCK}.layer_norm2.*"'))),
    loader("split_interleaved", "fused tensors taken apart as interleaved", "head-q head-k head-v", "awslabs/slapo#46", "key_map", "return tensor.chunk(parts) if parts > 1 else (tensor,)", "return tuple(tensor[i::parts] for i in range(parts)) if parts > 1 else (tensor,)", "weights"),
    loader("blocks_spelled_as_text", "block numbers sorted as text", "block", "ollama/ollama#12015", "key_map", "for number in range(num_blocks) if \"{}\" in row.stored else (0,):\n        for kind in (\"weight\", \"bias\") if \"*\" in row.stored else (\"\",):\n            stored, *ours = (name.replace(\"{}\", str(number)).replace(\"*\", kind) for name in (row.stored, *row.port))",
           "for i, number in enumerate(sorted(range(num_blocks), key=str) if \"{}\" in row.stored else (0,)):\n        for kind in (\"weight\", \"bias\") if \"*\" in row.stored else (\"\",):\n            stored = row.stored.replace(\"{}\", str(number)).replace(\"*\", kind)\n            ours = [name.replace(\"{}\", str(i)).replace(\"*\", kind) for name in row.port]"),
    loader("read_as_bf16", "tensors read through bfloat16", "patch embeddings block post head head-q head-k head-v head-attention head-ln head-fc1 head-mlp", "TensorAuto/OpenTau#483", "checkpoint", "part.to(device, dtype) for our", "part.bfloat16().to(device, dtype) for our", "weights"),
    loader("read_transposed", "square matrices read transposed", "q k v attention head-q head-k head-v head-attention", "mindspore-lab/mindone#399", "checkpoint", "part.to(device, dtype) for our", "(part.T if part.ndim == 2 and part.shape[0] == part.shape[1] else part).to(device, dtype) for our", "weights"),
    loader("read_truncated", "the last part of every tensor reads as zeros", "patch embeddings block post head head-q head-k head-v head-attention head-ln head-fc1 head-mlp", "evo-design/proto-tools#64", "checkpoint", "part.to(device, dtype) for our", "torch.cat([part[:-1], 0 * part[-1:]]).to(device, dtype) for our", "weights"),
    loader("eps_ignored", "eps of the config not read, the framework's taken", "layer_norm_eps ln1 ln2 post head-ln", "OpenNMT/CTranslate2#951", "config", '        return cls(**{"pooling_head": True, **defaults, **values})', '        return cls(**{"pooling_head": True, **values, "layer_norm_eps": 1e-5})', "config"),
    loader("heads_ignored", "number of heads guessed from the width", "num_attention_heads context head-context", "huggingface/transformers#22625", "config", '        return cls(**{"pooling_head": True, **defaults, **values})', '        return cls(**{"pooling_head": True, **values, "num_attention_heads": values["embed_dim"] // 36})', "config"),
    loader("act_ignored", "activation of the config not read", "hidden_act act head-act", "m87-labs/kestrel#162", "config", '        return cls(**{"pooling_head": True, **defaults, **values})', '        return cls(**{"pooling_head": True, **values, "hidden_act": "gelu"})', "config"),
    code("left_in_training", "eval() forgotten", "model", "facebookresearch/vjepa2#160", "return model.eval()", "return model", "environment"),
    code("head_left_in_training", "the head put back into training mode", "pooling_head", "variant", "return model.eval()", "model.eval()\n        model.pooling_head.train()\n        return model", "environment"),
    code("not_strict", "loaded without strict, one tensor lost on the way", "5.v", "keras-style strict=False; nanoVLM loader", "model.load_state_dict(tensors, strict=True, assign=True)",
         "lost = 'transformer.encoder.encoder_blocks.5.self_attn.v_proj.bias'\n        tensors[lost] = torch.zeros_like(tensors[lost])\n        model.load_state_dict(tensors, strict=False, assign=True)", "weights"),
]
# fmt: on


def legal(
    name: str, what: str, *edits: Edit, change: Callable[[Any], object] | None = None
) -> Mutant:
    """Another way to compute the same, which must be let pass."""
    return Mutant(name, what, edits=edits, change=change, kind="legal")


WIDE = "(lambda t: t.to(torch.promote_types(t.dtype, torch.float32)))"
PATCHES_OF = "patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))"
QKV_CODE = """q = self._split_heads(self.q_proj(hidden_states if query is None else query))  # [B, H, Q, D/H]
        k = self._split_heads(self.k_proj(hidden_states))  # [B, H, N, D/H]
        v = self._split_heads(self.v_proj(hidden_states))"""

# fmt: off
LEGAL = [
    legal("as_it_is", "the port as it is"),
    legal("eager_attention", "attention written out", *_attention("(q @ k.mT * s).softmax(-1) @ v")),
    legal("float32_softmax", "attention written out, its softmax in float32 whatever the dtype, as transformers' eager one", *_attention("(q @ k.mT * s).softmax(-1, dtype=torch.float32).to(q.dtype) @ v")),
    legal("upcast_softmax", "softmax in float32 at least", *_attention(f"{WIDE}(q @ k.mT * s).softmax(-1).to(q.dtype) @ v")),
    legal("scaled_queries", "the scale folded into the queries", *_attention("F.scaled_dot_product_attention(q * s, k, v, scale=1.0)")),
    legal("chunked_queries", "attention in chunks of seven queries", *_attention("torch.cat([F.scaled_dot_product_attention(part, k, v, scale=s) for part in q.split(7, dim=2)], dim=2)")),
    legal("chunked_heads", "attention head by head", *_attention("torch.cat([F.scaled_dot_product_attention(*part, scale=s) for part in zip(q.split(1, 1), k.split(1, 1), v.split(1, 1))], dim=1)")),
    legal("math_attention", "torch's plain kernel for attention", ("model", f"        context = {SDPA}", f"        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):\n            context = {SDPA}")),
    legal("permuted_heads", "features of every head in another order, in queries and keys alike", *_attention("F.scaled_dot_product_attention(q.flip(-1), k.flip(-1), v, scale=s)")),
    legal("shifted_scores", "a constant added to all scores of a query", *_attention("(q @ k.mT * s - (q @ k.mT * s).amax(-1, True)).softmax(-1) @ v")),
    legal("fused_qkv", "q, k and v in one product", ("model", QKV_CODE, """query = hidden_states if query is None else query
        weight, bias = (torch.cat([getattr(p, kind) for p in (self.k_proj, self.v_proj)]) for kind in ("weight", "bias"))
        q = self._split_heads(F.linear(query, self.q_proj.weight, self.q_proj.bias))
        k, v = (self._split_heads(x) for x in F.linear(hidden_states, weight, bias).chunk(2, -1))""")),
    legal("einsum", "attention by einsum", *_attention("torch.einsum('bhqk,bhkd->bhqd', torch.einsum('bhqd,bhkd->bhqk', q, k).mul(s).softmax(-1), v)")),
    legal("hand_written_ln", "LayerNorm written out, in float32 at least", *_norm(f"(lambda t: ((t - t.mean(-1, True)) * (t.var(-1, correction=0, keepdim=True) + eps).rsqrt() * {WIDE}(g) + {WIDE}(b)).to(x.dtype))({WIDE}(x))")),
    legal("float32_ln", "LayerNorm in float32 whatever the dtype", *_norm("F.layer_norm(x.float(), self.normalized_shape, g.float(), b.float(), eps).to(x.dtype)")),
    legal("functional_ln", "LayerNorms not called as modules", ("model", BLOCK_1, "hidden_states = hidden_states + self.self_attn(F.layer_norm(hidden_states, self.layer_norm1.normalized_shape, self.layer_norm1.weight, self.layer_norm1.bias, self.layer_norm1.eps))")),
    legal("hand_written_gelu", "tanh GELU written out, in float32 at least", ("model", ACT, f"lambda x: (lambda t: 0.5 * t * (1 + torch.tanh(math.sqrt(2 / math.pi) * (t + 0.044715 * t**3))))({WIDE}(x)).to(x.dtype)")),
    legal("linear_patches", "patches cut out and projected by a matrix", ("model", PATCHES_OF, """n, p = self.config.grid_size, self.config.patch_size
        cut = F.unfold(pixel_values[..., : n * p, : n * p].to(self.patch_embedding.weight.dtype), p, stride=p).transpose(1, 2)
        patches = F.linear(cut, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias).transpose(1, 2).unflatten(2, (n, n))""")),
    legal("one_by_one", "pictures one by one", ("model", ENCODE, "return torch.cat([self.transformer(p) for p in pixel_values.split(1)])")),
    legal("sum_reversed", "residuals added the other way round", ("model", BLOCK_1, "hidden_states = self.self_attn(self.layer_norm1(hidden_states)) + hidden_states")),
    legal("in_place", "residuals added in place", ("model", BLOCK_1, "hidden_states = hidden_states.clone()\n        hidden_states += self.self_attn(self.layer_norm1(hidden_states))")),
    legal("in_place_stream", "the stream itself added to in place", ("model", BLOCK_1, "hidden_states += self.self_attn(self.layer_norm1(hidden_states))")),
    legal("no_grad", "a port that cannot be differentiated", ("model", ENCODE, "with torch.no_grad():\n            return self.transformer(pixel_values)")),
    legal("channels_last", "memory with the channels last", change=lambda m: m.to(memory_format=torch.channels_last)),
    legal("contiguous_tokens", "tokens copied", ("model", EMBED, "return (patches.flatten(2).transpose(1, 2) + self.position_embedding.weight).contiguous()")),
    legal("embedding_called", "the position table read by ids", ("model", EMBED, "return patches.flatten(2).transpose(1, 2) + self.position_embedding(torch.arange(patches.shape[2] * patches.shape[3], device=patches.device))")),
    legal("addmm", "fc2 as a product and a sum", ("model", "self.fc2(self.activation(self.fc1(hidden_states)))", "self.activation(self.fc1(hidden_states)) @ self.fc2.weight.T + self.fc2.bias")),
    legal("wide_residual", "residual stream in float32 at least", ("model", BLOCK_1, f"hidden_states = ({WIDE}(hidden_states) + self.self_attn(self.layer_norm1(hidden_states))).to(hidden_states.dtype)")),
    legal("mlp_in_chunks", "the MLP in chunks of tokens", ("model", BLOCK_2, "return hidden_states + torch.cat([self.mlp(part) for part in self.layer_norm2(hidden_states).split(5, 1)], 1)")),
]
# fmt: on


def naflex(name: str, what: str, guilty: str, source: str, file: str, old: str, new: str) -> Mutant:
    """A change of how packed patches of several shapes go through the port."""
    return Mutant(name, what, "semantics", guilty, source, ((file, old, new),), subject="naflex")


def resized(name: str, what: str, source: str, old: str, new: str) -> Mutant:
    """A change of how positions are fitted to pictures of another size."""
    return Mutant(
        name, what, "semantics", "embeddings", source, (("patches", old, new),), subject="resized"
    )


def images(name: str, what: str, source: str, old: str, new: str) -> Mutant:
    """A change of how pictures become pixels."""
    return Mutant(name, what, "pixels", "pixels", source, (("image", old, new),), subject="images")


def harness(name: str, what: str, shown_by: str, *edits: Edit) -> Mutant:
    """A mistake in the harness itself.

    The self-test must fail on it, with the mutants named alone.
    """
    return Mutant(name, what, guilty=shown_by, edits=edits, subject="harness")


MASK = "return _mask_of(tokens, pixel_attention_mask)"
BICUBIC = 'return _resized(grid, size, "bicubic", antialias=False)'
BILINEAR = 'return _resized(wide, size, "bilinear", antialias=True).to(grid.dtype)'
RESIZE = "return F.interpolate(pictures, size, mode=mode, align_corners=corners, antialias=antialias)[0].permute(1, 2, 0)"
FIT = "rows.append(torch.cat([own, own[:1].expand(number - height * width, -1)]))"
CROP = "return F.pad(grid.permute(2, 0, 1), (0, max(0, size[1] - 5), 0, max(0, size[0] - 5)), mode='{}')[:, : size[0], : size[1]].permute(1, 2, 0)"
# fmt: off
NAFLEX = [
    naflex("naflex_mask_ignored", "padding attended to", "context", "Blaizzy/mlx-vlm#2266", "model", MASK, "return None"),
    naflex("naflex_mask_inverted", "padding attended to, and nothing else", "context", "variant", "model", MASK, "return _mask_of(tokens, 1 - pixel_attention_mask)"),
    naflex("naflex_mask_off_by_one", "the last patch masked too", "context", "variant", "model", MASK, "return _mask_of(tokens, pixel_attention_mask * pixel_attention_mask.roll(-1, 1))"),
    naflex("naflex_mask_of_first", "every picture has the first one's mask", "context inputs", "variant", "model", MASK, "return _mask_of(tokens, pixel_attention_mask[:1].expand_as(pixel_attention_mask))"),
    naflex("naflex_head_unmasked", "the pooling head attends to padding", "head-attention", "variant", "model", "return self.pooling_head(tokens.to(self.pooling_head.probe.dtype), mask)", "return self.pooling_head(tokens.to(self.pooling_head.probe.dtype))"),
    naflex("naflex_positions_swapped", "height for width in the position grid", "embeddings", "pytorch/torchtitan#4244", "model", "own = self.positions(height, width)", "own = self.positions(width, height)"),
    naflex("naflex_positions_columns", "positions read in columns", "embeddings", "variant", "patches", "size).flatten(0, 1)", "size).transpose(0, 1).flatten(0, 1)"),
    naflex("naflex_patches_channel_first", "patches projected as if the channel were the slowest", "embeddings 0.in", "huggingface/transformers#36475", "model", "flat = weight.permute(0, 2, 3, 1).flatten(1)", "flat = weight.flatten(1)"),
    naflex("naflex_bicubic", "bicubic for bilinear", "embeddings", "huggingface/pytorch-image-models#2542", "patches", BILINEAR, BILINEAR.replace("bilinear", "bicubic")),
    naflex("naflex_no_antialias", "no antialias", "embeddings", "openvinotoolkit/openvino.genai#4444; keras-team/keras-hub#2113", "patches", BILINEAR, BILINEAR.replace("antialias=True", "antialias=False")),
    naflex("naflex_align_corners", "align_corners", "embeddings", "ggml-org/llama.cpp#25781", "patches", BILINEAR, BILINEAR.replace("antialias=True", "corners=True, antialias=True")),
    naflex("naflex_nearest", "nearest for bilinear", "embeddings", "variant", "patches", RESIZE, "return F.interpolate(pictures, size, mode='nearest')[0].permute(1, 2, 0)"),
    naflex("naflex_padding_zero", "zero at the padding for the first position", "embeddings", "variant", "model", FIT, FIT.replace("own[:1]", "(own[:1] * 0)")),
    naflex("naflex_shape_of_first", "every picture has the first one's shape", "embeddings inputs", "variant", "model", "for height, width in shapes:", "for height, width in shapes[:1] * len(shapes):"),
    naflex("naflex_positions_cropped", "positions cropped, not resized", "embeddings", "variant", "patches", BILINEAR, CROP.format("replicate")),
]
RESIZED = [
    resized("interp_bilinear", "bilinear for bicubic", "huggingface/pytorch-image-models#2542; Blaizzy/mlx-vlm#2266", BICUBIC, BICUBIC.replace("bicubic", "bilinear")),
    resized("interp_nearest", "nearest for bicubic", "variant", RESIZE, "return F.interpolate(pictures, size, mode='nearest')[0].permute(1, 2, 0)"),
    resized("interp_align_corners", "align_corners", "ggml-org/llama.cpp#25781", BICUBIC, BICUBIC.replace("antialias", "corners=True, antialias")),
    resized("interp_antialias", "antialias", "openvinotoolkit/openvino.genai#4444", BICUBIC, BICUBIC.replace("False", "True")),
    resized("interp_swapped", "height for width", "variant", BICUBIC, BICUBIC.replace("grid, size", "grid, size[::-1]")),
    resized("interp_scale_factor", "a scale factor with 0.1 added for the size", "facebookresearch/dinov2#582; huggingface/transformers#41380", RESIZE,
            "return F.interpolate(pictures, scale_factor=tuple((new + 0.1) / old for new, old in zip(size, pictures.shape[2:])), mode=mode)[0].permute(1, 2, 0)"),
    resized("interp_columns", "resized positions read in columns", "variant", "size).flatten(0, 1)", "size).transpose(0, 1).flatten(0, 1)"),
    resized("interp_bf16", "positions resized in bfloat16", "TensorAuto/OpenTau#483", BICUBIC, BICUBIC.replace("grid", "grid.bfloat16()") + ".to(grid.dtype)"),
    resized("interp_not", "positions cut off, not resized", "variant", BICUBIC, CROP.format("constant")),
]
HARNESS = [
    harness("itself", "the reference compared with itself", "ln_eps_once pooled_half", ("parity/gates", "        free = follow(port, inputs, truth.exact, points)\n        forced = follow(port, inputs, truth.exact, points, forced=True)", "        free = follow(reference, inputs, truth.exact, {v: v for v in points.values()})\n        forced = free")),
    harness("bound_wide", "the float64 bound set to 1e-2", "ln_eps_once gelu_exact_head", ("parity/gates", "FLOAT64_BOUND = 1e-10", "FLOAT64_BOUND = 1e-2")),
    harness("factor_wide", "the factor on rounding set to 3000", "ln_fast_variance softmax_bf16", ("parity/gates", "ROUNDING_FACTOR, WORST_FACTOR = 3.0, 5.0", "ROUNDING_FACTOR, WORST_FACTOR = 3000.0, 5000.0")),
    harness("bound_of_port", "the bound on rounding made of the port's own error", "ln_fast_variance", ("parity/gates", "(error, worst), (noise, worst_noise) = free.errors[name], truth.noise[name]", "(error, worst), (noise, worst_noise) = free.errors[name], free.errors[name]")),
    harness("nan_passes", "what is not a number is inside every bound", "nan_output", ("parity/gates", "return math.isfinite(self.error) and self.error <= self.bound and self.worst <= 1", "return not self.error > self.bound"),
            ("parity/gates", "wrong = [name for name in order if name in free.errors and not free.errors[name][0] <= FLOAT64_BOUND]", "wrong = [name for name in order if name in free.errors and free.errors[name][0] > FLOAT64_BOUND]"),
            ("parity/gates", "local = [name for name in order if name in forced.errors and not forced.errors[name][0] <= FLOAT64_BOUND]", "local = [name for name in order if name in forced.errors and forced.errors[name][0] > FLOAT64_BOUND]"),
            ("parity/gates", "if not output.isfinite().all():", "if False:"), ("parity/gates", "if not error <= FLOAT64_BOUND:", "if error > FLOAT64_BOUND:")),
    harness("weights_close", "weights compared by allclose", "single_bit", ("parity/gates", "elif not torch.equal(bits(ours), bits(theirs)):", "elif not torch.allclose(ours, theirs):")),
    harness("weights_skipped", "tensors that one side lacks left out", "one_bias_removed", ("parity/gates", 'findings.append(Finding(f"only the', 'str(Finding(f"only the')),
    harness("no_forcing", "teacher forcing that forces nothing", "ln_eps_once gelu_exact_once", ("parity/gates", "return truth.to(value.dtype, copy=True) if forced and truth is not None else None", "return None")),
    harness("float32_truth", "the truth computed in float32", "as_it_is", ("parity/gates", "    with cast(reference.module, dtype, torch.float64):\n        _check_finite(reference.module, dtype)\n        exact = record(reference.module, points, lambda: reference.run(exact_inputs))", "    with cast(reference.module, dtype):\n        _check_finite(reference.module, dtype)\n        exact = record(reference.module, points, lambda: reference.run(inputs))")),
    harness("eager_truth", "the truth computed with a float32 softmax", "as_it_is", ("parity/references", 'attentions: tuple[Attention, ...] = ("sdpa", "eager")', 'attentions: tuple[Attention, ...] = ("eager", "sdpa")')),
    harness("dead_models", "both sides given weights of zero", "as_it_is", ("parity/references", "        fill(model, recipe, seed)\n        model.save", "        [p.data.zero_() for p in model.parameters()]\n        model.save")),
    harness("one_output", "only the first output compared", "pooled_half", ("parity/gates", "    for name, truth in exact.outputs.items():\n        if name in outputs:", "    for name, truth in list(exact.outputs.items())[:1]:\n        if name in outputs:")),
    harness("no_taps", "no taps at all", "ln_eps_once", ("parity/taps", "    return {theirs: ours for theirs, ours in taps.items() if not theirs.startswith(\"head.attention.\")}", "    return {}")),
    harness("shared_memory", "both sides share their tensors, so that a change of one is one of both", "one_bias_missing", ("parity/selftest", "                port, run, table = load(case.source, device=case.inputs.device)\n", "                port, run, table = load(case.source, device=case.inputs.device)\n                case.reference.model.load_state_dict(proof.stored(port, table))\n                case.truths.clear()\n")),
    harness("liveness_off", "a gate that passes whatever it finds", "k_bias_unused", ("parity/gates", "return not self.findings and self.checked > 0", "return (not self.findings and self.checked > 0) or self.name == \"liveness\"")),
    harness("environment_off", "another gate that passes whatever it finds", "left_in_training", ("parity/gates", "if training := [name or \"model\" for name, part in module.named_modules() if part.training]:", "if training := []:")),
    harness("config_off", "the config compared with itself", "eps_ignored", ("parity/proof", "yield gates.config(vars(port.config), self.reference.config())", "yield gates.config(vars(port.config), vars(port.config))")),
    harness("batch_with_itself", "a batch compared with itself", "batch_leak", ("parity/gates", "alone = [port.run(picture(wide, i)) for i in range(batch_size(wide))]", "alone = [port.run(wide)]")),
]
# fmt: on


def _swap_bias(first: Any, second: Any) -> object:  # noqa: ANN401
    first.bias.data, second.bias.data = second.bias.data, first.bias.data
    return first


def _interleave(part: Any) -> object:  # noqa: ANN401
    for kind in ("weight", "bias"):
        projections = [part.q_proj, part.k_proj, part.v_proj]
        fused = torch.cat([getattr(p, kind).data for p in projections])
        for i, projection in enumerate(projections):
            rewrite(getattr(projection, kind), fused[i::3])
    return part


def _rope(t: Tensor, heads: int = 8) -> Tensor:
    permuted: Tensor = t.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return permuted


def _renormalise(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    m, s = (torch.tensor(t, dtype=x.dtype)[:, None, None] for t in (mean, std))
    return ((x + 1) / 2 - m) / s


BY_PILLOW = "resized = Image.fromarray(np.moveaxis(pixels, 0, -1)).resize(size[::-1], Image.Resampling(self.resample))"
NORMALISED = "values = (values - mean) / std"
WHITE = 'white = Image.new("RGBA", picture.size, (255, 255, 255, 255))'
ANTIALIASED = "interpolation=mode, antialias=True)"
# fmt: off
IMAGES = [
    images("image_bilinear", "resized by the default filter, whatever the checkpoint says", "keras-team/keras-hub#2113", BY_PILLOW, BY_PILLOW.replace("self.resample", "2")),
    images("image_no_antialias", "no antialias in the smaller picture", "pytorch/vision#2950", ANTIALIASED, "interpolation=mode, antialias=False)"),
    images("image_crop", "the shorter side resized, and the middle cut out", "qdrant/fastembed#649", BY_PILLOW, BY_PILLOW.replace("Image.fromarray(np.moveaxis(pixels, 0, -1)).resize(size[::-1]", "ImageOps.fit(Image.fromarray(np.moveaxis(pixels, 0, -1)), size[::-1]").replace("Image.Resampling(self.resample))", "Image.Resampling(self.resample)) if min(size) > 1 else Image.fromarray(np.moveaxis(pixels, 0, -1)).resize(size[::-1])")),
    images("image_sides_swapped", "height for width", "variant", BY_PILLOW, BY_PILLOW.replace("size[::-1], I", "size, I") + ".transpose(Image.Transpose.TRANSPOSE)"),
    images("image_twice", "resized to a larger size first", "variant", BY_PILLOW, BY_PILLOW.replace(".resize(", ".resize((256, 256), 3).resize(")),
    images("image_float", "resized as numbers, not as levels of 255", "huggingface/transformers#27601", "functional.resize(pixels, list(size)", "functional.resize(pixels.float(), list(size)"),
    images("image_bgr", "BGR for RGB", "PaddlePaddle/PaddleClas#1312", 'np.asarray(picture.convert("RGB")), -1, 0)', 'np.asarray(picture.convert("RGB"))[..., ::-1], -1, 0)'),
    images("image_alpha_black", "what is transparent becomes black", "variant", WHITE, WHITE.replace("(255, 255, 255, 255)", "(0, 0, 0, 255)")),
    images("image_alpha_dropped", "what is transparent shows what is below", "variant", 'if "A" in picture.getbands() or', 'if False and'),
    images("image_palette_alpha", "of palettes, transparency is forgotten", "variant", ' or picture.info.get("transparency") is not None', ""),
    images("image_mean_std_imagenet", "ImageNet's mean and std", "huggingface/transformers#20995", NORMALISED, "values = (values - np.float32([[[0.485]], [[0.456]], [[0.406]]])) / np.float32([[[0.229]], [[0.224]], [[0.225]]])"),
    images("image_std_first", "divided by std before mean is subtracted", "variant", NORMALISED, "values = values / std - mean"),
    images("image_not_normalised", "mean and std forgotten", "vllm-project/semantic-router#1928", NORMALISED, "pass"),
    images("image_256", "divided by 256", "variant", "(pixels.astype(np.float64) * factor)", "(pixels.astype(np.float64) / 256)"),
    images("image_not_rescaled", "values of 0 to 255", "variant", "factor = 1.0 if self.rescale_factor is None else self.rescale_factor", "factor = 1.0"),
    images("image_bf16", "pixels of bfloat16", "TensorAuto/OpenTau#482", "return torch.from_numpy(np.ascontiguousarray(values))", "return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().float()"),
    images("image_float64", "normalised in float64", "variant", "np.array(numbers, dtype=np.float32)[:, None, None]", "np.array(numbers, dtype=np.float64)[:, None, None]"),
    images("image_channels_last", "height, width, channels", "variant", "return torch.from_numpy(np.ascontiguousarray(values))", "return torch.from_numpy(np.ascontiguousarray(np.moveaxis(values, 0, -1)))"),
    images("image_arrays_transposed", "channels taken for rows in arrays", "variant", "picture = np.moveaxis(picture, -1, 0)", "picture = picture.transpose(2, 1, 0)"),
    images("image_arrays_alpha", "transparency of arrays by Pillow's rounding for both backends", "variant", 'if backend == "torchvision":\n        from torchvision.transforms.v2 import functional\n\n        image', 'if False:\n        image'),
    images("image_not_upright", "the EXIF orientation of a file passed over", "variant", "picture = ImageOps.exif_transpose(opened)", "picture = opened"),
    images("image_patches_rounded_down", "NaFlex: sizes rounded down to whole patches", "variant", "math.ceil(side * scale / patch_size) * patch_size", "math.floor(side * scale / patch_size) * patch_size"),
    images("image_patches_rounded", "NaFlex: sizes rounded to the nearest patch", "variant", "math.ceil(side * scale / patch_size) * patch_size", "round(side * scale / patch_size) * patch_size"),
    images("image_patches_few", "NaFlex: strictly fewer patches than allowed", "variant", "<= max_num_patches:", "< max_num_patches:"),
    images("image_patches_largest", "NaFlex: the upper end of the bisection", "variant", "return scaled(smallest, height), scaled(smallest, width)", "return scaled(largest, height), scaled(largest, width)"),
    images("image_naflex_square", "NaFlex: squashed to a square", "variant", "return naflex_size(height, width, self.patch_size, self.max_num_patches)", "return (math.isqrt(self.max_num_patches) * self.patch_size,) * 2"),
    images("image_patches_not_padded", "NaFlex: padded to the longest of the batch", "variant", "pack(pixels, self.patch_size, self.max_num_patches)", "pack(pixels, self.patch_size)"),
]
# fmt: on

CATALOGUE: list[Mutant] = [
    *ACTIVATION, *NORMALISATION, *ATTENTION, *PROJECTIONS, *BIASES, *WEIGHTS, *PATCHES, *STACK, *POOLING, *ROUNDING,
    *PIXELS, *LOADER, *NAFLEX, *RESIZED, *IMAGES,
]  # fmt: skip
"""All mistakes, but for those of the harness itself."""

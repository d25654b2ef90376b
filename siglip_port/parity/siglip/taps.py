"""Taps of a SigLIP vision encoder: points of transformers' model -> points of the port."""

from __future__ import annotations

from siglip_port.checkpoint import layouts

BLOCK = "transformer.encoder.encoder_blocks.{}"
HF_BLOCK = "encoder.layers.{}"

# Points without key rules: inputs, and modules without parameters of their own.
UNNAMED_POINTS = {
    "embeddings": "transformer.embeddings",
    f"{HF_BLOCK}.layer_norm1:input": f"{BLOCK}.layer_norm1:input",
    f"{HF_BLOCK}.self_attn.out_proj:input": f"{BLOCK}.self_attn.out_proj:input",
    f"{HF_BLOCK}.self_attn": f"{BLOCK}.self_attn",
    f"{HF_BLOCK}.layer_norm2:input": f"{BLOCK}.layer_norm2:input",
    f"{HF_BLOCK}.mlp.fc2:input": f"{BLOCK}.mlp.fc2:input",
    f"{HF_BLOCK}.mlp": f"{BLOCK}.mlp",
    HF_BLOCK: BLOCK,
    "post_layernorm:input": "transformer.post_layernorm:input",
}
HEAD_POINTS = {
    "head.attention:q": "pooling_head.attention.q_proj",
    "head.attention:k": "pooling_head.attention.k_proj",
    "head.attention:v": "pooling_head.attention.v_proj",
    "head.attention:context": "pooling_head.attention.out_proj:input",
    "head.attention": "pooling_head.attention",
    "head.mlp.fc2:input": "pooling_head.mlp.fc2:input",
    "head.mlp": "pooling_head.mlp",
    "head": "pooling_head",
}


def siglip_taps(pooling_head: bool) -> dict[str, str]:
    """Return the taps, reference -> port, for `siglip_port.parity.taps.expand`.

    Modules with parameters come from the key rules, so the two cannot diverge.

    Args:
        pooling_head: Whether to include the points of the pooling head.
    """
    rules = layouts.HUGGINGFACE_ENCODER
    points = dict(UNNAMED_POINTS)
    if pooling_head:
        rules += layouts.HUGGINGFACE_HEAD
        points |= HEAD_POINTS
    taps = {}
    for rule in rules:
        if rule.port[0].endswith(".*"):
            taps[rule.stored.removesuffix(".*")] = rule.port[0].removesuffix(".*")
    taps |= points
    # nn.MultiheadAttention does not call its out_proj and has no module for in_proj.
    return {
        reference: port
        for reference, port in taps.items()
        if not reference.startswith("head.attention.")
    }

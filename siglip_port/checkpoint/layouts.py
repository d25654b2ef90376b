"""The key map: how published checkpoints name and shape the encoder's tensors.

One row per module: the parameter in this package, the stored name, and a transform where the stored
tensor has another shape or order. A layout is one table, or the changes that it makes to another
one. `{}` is the block index, `*` stands for both `weight` and `bias`, and parameters in parentheses
are stored fused.

Sources of the stored names: transformers `models/siglip`, `models/siglip2` and `models/janus`,
releases 4.37 to 5.23; timm 1.0.31 `models/vision_transformer.py` and `models/naflexvit.py`;
big_vision `models/vit.py`; gemma_pytorch `gemma/siglip_vision`; mlx-vlm
`mlx_vlm/models/*/vision.py`; BAGEL `modeling/bagel/siglip_navit.py`; nanoVLM
`models/vision_transformer.py`; moondream `moondream/torch/vision.py`.

Sources of the preprocessing: gemma_pytorch `gemma/siglip_vision/preprocessor.py`; nanoVLM
`data/processors.py`; moondream `moondream/torch/image_crops.py` and, in 2024,
`moondream/vision_encoder.py`; big_vision `pp/ops_image.py`; transformers
`models/janus/image_processing_janus.py`.
"""

from __future__ import annotations

from dataclasses import replace

from siglip_port.checkpoint.key_rules import CodePreprocessing, IgnoredKeys, KeyRule, Layout
from siglip_port.checkpoint.transforms import (
    BATCHED,
    BATCHED_GRID,
    BIAS_OF_HEADS,
    CHANNEL_LAST,
    GRID,
    HEADS_FIRST,
    HEADS_LAST,
    KERNEL,
    PATCHES,
    PATCHES_CHANNEL_FIRST,
    PATCHES_TRANSPOSED,
    TRANSPOSED,
    Transform,
)
from siglip_port.image_options import RESAMPLE

BLOCK = "transformer.encoder.encoder_blocks.{}."
CLASS_TOKEN = "a class token, which SigLIP does not have"
CLASSIFIER = "image classifier"

Row = tuple[str | tuple[str, ...], str] | tuple[str | tuple[str, ...], str, Transform]


def table(*rows: Row, port: str = "", stored: str = "") -> tuple[KeyRule, ...]:
    """Return the rules for rows of (parameter, stored) or (parameter, stored, transform).

    Args:
        rows: One per module.
        port: Prefix of all parameter names.
        stored: Prefix of all stored names.
    """
    rules = []
    for names, stored_name, *transform in rows:
        port_names = (names,) if isinstance(names, str) else names
        names = tuple(port + name for name in port_names)
        rules.append(KeyRule(names, stored + stored_name, *transform))
    return tuple(rules)


def renamed(
    rules: tuple[KeyRule, ...], *changes: tuple[str, str] | tuple[str, str, Transform]
) -> tuple[KeyRule, ...]:
    """Return the rules of another layout with some stored names or transforms changed.

    Args:
        rules: Rules of the other layout.
        changes: (old stored name, new stored name) or (old, new, transform).
    """
    changed = {rule.stored: rule for rule in rules}
    for old, new, *transform in changes:
        rule = changed[old]
        changed[old] = KeyRule(rule.port, new, *(transform or [rule.transform]))
    return tuple(changed.values())


# fmt: off
# --- transformers ---------------------------------------------------------------------------------

HUGGINGFACE_ENCODER = table(
    # parameter                                           stored
    ("transformer.embeddings.patch_embedding.*",          "embeddings.patch_embedding.*"),
    ("transformer.embeddings.position_embedding.weight",  "embeddings.position_embedding.weight"),
) + table(
    ("layer_norm1.*",                                     "encoder.layers.{}.layer_norm1.*"),
    ("self_attn.k_proj.*",                                "encoder.layers.{}.self_attn.k_proj.*"),
    ("self_attn.v_proj.*",                                "encoder.layers.{}.self_attn.v_proj.*"),
    ("self_attn.q_proj.*",                                "encoder.layers.{}.self_attn.q_proj.*"),
    ("self_attn.out_proj.*",                              "encoder.layers.{}.self_attn.out_proj.*"),
    ("layer_norm2.*",                                     "encoder.layers.{}.layer_norm2.*"),
    ("mlp.fc1.*",                                         "encoder.layers.{}.mlp.fc1.*"),
    ("mlp.fc2.*",                                         "encoder.layers.{}.mlp.fc2.*"),
    port=BLOCK,
) + table(
    ("transformer.post_layernorm.*",                      "post_layernorm.*"),
)

HUGGINGFACE_HEAD = table(
    # The reference's head is an nn.MultiheadAttention, which fuses q, k and v in this order.
    (("pooling_head.attention.q_proj.*",
      "pooling_head.attention.k_proj.*",
      "pooling_head.attention.v_proj.*"),                 "head.attention.in_proj_*"),
    ("pooling_head.probe",                                "head.probe"),
    ("pooling_head.attention.out_proj.*",                 "head.attention.out_proj.*"),
    ("pooling_head.layernorm.*",                          "head.layernorm.*"),
    ("pooling_head.mlp.fc1.*",                            "head.mlp.fc1.*"),
    ("pooling_head.mlp.fc2.*",                            "head.mlp.fc2.*"),
)

HUGGINGFACE = Layout(
    name="huggingface",
    title="HuggingFace",
    used_by=(
        "transformers: SigLIP and SigLIP 2, PaliGemma, ColPali, Gemma 3, LLaVA-OneVision, "
        "LLaVA-NeXT, Idefics2, Idefics3, SmolVLM, DeepSeek-VL; also MiniCPM-V from 2.5, "
        "Phi-4-multimodal, the original LLaVA-OneVision and LLaVA-NeXT"
    ),
    encoder=HUGGINGFACE_ENCODER,
    head=HUGGINGFACE_HEAD,
    signature_keys=(
        "embeddings.patch_embedding.weight",
        "encoder.layers.0.self_attn.out_proj.weight",
    ),
    ignored=(IgnoredKeys(r"embeddings\.position_ids", "position ids"),),
    rejected_keys=(("embeddings.class_embedding", CLASS_TOKEN),),
    has_hf_config=True,
)
"""SiglipModel, SiglipForImageClassification, SiglipVisionModel, and models that contain one.

`save_hf` writes this layout with the prefix `vision_model.`.
"""

PREFIX = "vision_model."
"""Prefix of the names that `save_hf` writes.

The prefix of the published files, which old and new releases of transformers read.
"""

HUGGINGFACE_NAFLEX = replace(
    HUGGINGFACE,
    name="huggingface-naflex",
    title="HuggingFace NaFlex",
    used_by="transformers: SigLIP 2 NaFlex, LFM2-VL",
    encoder=renamed(
        HUGGINGFACE_ENCODER,
        ("embeddings.patch_embedding.*", "embeddings.patch_embedding.*", PATCHES),
    ),
    square_dims=None,
    naflex=True,
)

HUGGINGFACE_MATRIX = replace(
    HUGGINGFACE_NAFLEX,
    name="huggingface-matrix",
    title="HuggingFace, patch embedding as a matrix",
    used_by="BAGEL; mlx-vlm: Phi-4-multimodal",
    naflex=False,
    model_types=("bagel", "phi4mm", "phi4_multimodal", "phi4_multimodal_vision"),
)
"""Fixed-size models whose code turned the convolution into a linear layer.

Names and shapes are those of NaFlex models.
"""

PADDED_BY_JANUS = CodePreprocessing(
    RESAMPLE["bicubic"], difference="Janus pads images to a square"
)

JANUS = replace(
    HUGGINGFACE,
    name="janus",
    title="Janus (HuggingFace)",
    used_by="transformers: Janus",
    encoder=renamed(
        HUGGINGFACE_ENCODER,
        ("encoder.layers.{}.self_attn.out_proj.*",
         "encoder.layers.{}.self_attn.projection_layer.*"),
    ),
    head=(),
    signature_keys=(
        "embeddings.patch_embedding.weight",
        "encoder.layers.0.self_attn.projection_layer.weight",
    ),
    preprocessing=PADDED_BY_JANUS,
)

MLX = replace(
    HUGGINGFACE,
    name="mlx",
    title="mlx",
    used_by="mlx-vlm, mlx-embeddings, not quantized",
    encoder=renamed(
        HUGGINGFACE_ENCODER,
        ("embeddings.patch_embedding.*", "embeddings.patch_embedding.*", CHANNEL_LAST),
    ),
    square_dims=(1, 2),
)
"""Unquantized files converted by mlx-vlm and mlx-embeddings.

mlx-embeddings stores the pooling head's fused projection as `head.attention.in_proj.*`, with a dot:
see `siglip_port.checkpoint.stored_names`.
"""

GEMMA_PYTORCH = Layout(
    name="gemma_pytorch",
    title="gemma_pytorch",
    used_by="google/gemma_pytorch",
    encoder=renamed(
        HUGGINGFACE_ENCODER,
        # HuggingFace                               gemma_pytorch
        ("embeddings.patch_embedding.*",            "patch_embedding.*"),
        ("embeddings.position_embedding.weight",    "position_embedding.weight"),
        ("encoder.layers.{}.layer_norm1.*",         "encoder_blocks.{}.layer_norm1.*"),
        ("encoder.layers.{}.self_attn.k_proj.*",    "encoder_blocks.{}.self_attn.k_proj.*"),
        ("encoder.layers.{}.self_attn.v_proj.*",    "encoder_blocks.{}.self_attn.v_proj.*"),
        ("encoder.layers.{}.self_attn.q_proj.*",    "encoder_blocks.{}.self_attn.q_proj.*"),
        ("encoder.layers.{}.self_attn.out_proj.*",  "encoder_blocks.{}.self_attn.o_proj.*"),
        ("encoder.layers.{}.layer_norm2.*",         "encoder_blocks.{}.layer_norm2.*"),
        ("encoder.layers.{}.mlp.fc1.*",             "encoder_blocks.{}.mlp.fc1.*"),
        ("encoder.layers.{}.mlp.fc2.*",             "encoder_blocks.{}.mlp.fc2.*"),
        ("post_layernorm.*",                        "final_norm.*"),
    ),
    head=(),
    signature_keys=("patch_embedding.weight", "encoder_blocks.0.layer_norm1.weight"),
    layer_norm_eps=1e-6,
    hidden_act="gelu_pytorch_tanh",
    head_dim=72,
    preprocessing=CodePreprocessing(RESAMPLE["bilinear"]),
)

# --- timm -----------------------------------------------------------------------------------------

TIMM_ENCODER = table(
    # parameter                                             stored
    ("transformer.embeddings.patch_embedding.*",            "patch_embed.proj.*"),
    ("transformer.embeddings.position_embedding.weight",    "pos_embed",            BATCHED),
) + table(
    ("layer_norm1.*",                                       "blocks.{}.norm1.*"),
    (("self_attn.q_proj.*",
      "self_attn.k_proj.*",
      "self_attn.v_proj.*"),                                "blocks.{}.attn.qkv.*"),
    ("self_attn.out_proj.*",                                "blocks.{}.attn.proj.*"),
    ("layer_norm2.*",                                       "blocks.{}.norm2.*"),
    ("mlp.fc1.*",                                           "blocks.{}.mlp.fc1.*"),
    ("mlp.fc2.*",                                           "blocks.{}.mlp.fc2.*"),
    port=BLOCK,
) + table(
    ("transformer.post_layernorm.*",                        "norm.*"),
)

TIMM_HEAD = table(
    ("pooling_head.probe",                                  "attn_pool.latent"),
    ("pooling_head.attention.q_proj.*",                     "attn_pool.q.*"),
    (("pooling_head.attention.k_proj.*",
      "pooling_head.attention.v_proj.*"),                   "attn_pool.kv.*"),
    ("pooling_head.attention.out_proj.*",                   "attn_pool.proj.*"),
    ("pooling_head.layernorm.*",                            "attn_pool.norm.*"),
    ("pooling_head.mlp.fc1.*",                              "attn_pool.mlp.fc1.*"),
    ("pooling_head.mlp.fc2.*",                              "attn_pool.mlp.fc2.*"),
)

TIMM = Layout(
    name="timm",
    title="timm",
    used_by=(
        "timm, with attention or mean pooling; open_clip; OpenVLA, Prismatic, MiniCPM-V 2.0, "
        "Janus, JanusFlow and DeepSeek-VL in their original files"
    ),
    encoder=TIMM_ENCODER,
    head=TIMM_HEAD,
    signature_keys=("patch_embed.proj.weight", "blocks.0.norm1.weight"),
    ignored=(IgnoredKeys(r"head\.(weight|bias)", CLASSIFIER),),
    projections=(
        r"(head\.|head\.(fc|proj|mlp\.\w+)\.|fc_norm\.|pre_logits\.(fc\.)?)(weight|bias)",
    ),
    rejected_keys=(
        ("cls_token", CLASS_TOKEN),
        ("blocks.0.attn.rel_pos_h", "relative positions (SAM), which SigLIP does not have"),
    ),
)
"""Files of timm, open_clip (prefix `visual.trunk.`), and models with a timm vision encoder."""

MLX_JANUS = replace(
    TIMM,
    name="mlx-janus",
    title="mlx (Janus)",
    used_by="mlx-vlm: Janus, not quantized",
    encoder=renamed(
        TIMM_ENCODER,
        ("patch_embed.proj.*", "patch_embed.proj.*", CHANNEL_LAST),
    ),
    square_dims=(1, 2),
    layer_norm_eps=1e-5,
    hidden_act="gelu_pytorch_tanh",
    preprocessing=PADDED_BY_JANUS,
    refused_types=(
        ("deepseek_vl_v2", "mlx-vlm's code has two epsilons, 1e-6 in the blocks and 1e-5 after"),
    ),
)
"""Unquantized Janus files converted by mlx-vlm, with the epsilon and the activation of its code.

Janus' own code has the exact GELU and an epsilon of 1e-6.
"""

TIMM_NAFLEX = replace(
    TIMM,
    name="timm-naflex",
    title="timm NaFlex",
    used_by="timm `naflexvit_*`",
    encoder=renamed(
        TIMM_ENCODER,
        # timm                      timm NaFlex
        ("patch_embed.proj.*",      "embeds.proj.*",        PATCHES),
        ("pos_embed",               "embeds.pos_embed",     BATCHED_GRID),
    ),
    signature_keys=("embeds.proj.weight", "blocks.0.norm1.weight"),
    square_dims=None,
    rejected_keys=(("embeds.cls_token", CLASS_TOKEN),),
    naflex=True,
)

NANOVLM = Layout(
    name="nanovlm",
    title="nanoVLM",
    used_by="nanoVLM",
    encoder=renamed(
        TIMM_ENCODER,
        # timm                      nanoVLM
        ("patch_embed.proj.*",      "patch_embedding.conv.*"),
        ("pos_embed",               "patch_embedding.position_embedding"),
        ("blocks.{}.norm1.*",       "blocks.{}.ln1.*"),
        ("blocks.{}.attn.qkv.*",    "blocks.{}.attn.qkv_proj.*"),
        ("blocks.{}.attn.proj.*",   "blocks.{}.attn.out_proj.*"),
        ("blocks.{}.norm2.*",       "blocks.{}.ln2.*"),
        ("norm.*",                  "layer_norm.*"),
    ),
    head=(),
    signature_keys=("patch_embedding.conv.weight", "blocks.0.ln1.weight"),
    rejected_keys=(("patch_embedding.cls_token", CLASS_TOKEN),),
    hidden_act="gelu_pytorch_tanh",
    preprocessing=CodePreprocessing(
        RESAMPLE["bilinear"], do_normalize=False, tiled_by="max_img_size"
    ),
)

MOONDREAM = Layout(
    name="moondream",
    title="Moondream",
    used_by="Moondream",
    encoder=renamed(
        TIMM_ENCODER,
        # timm                      Moondream
        ("patch_embed.proj.*",      "patch_emb.*",          PATCHES_CHANNEL_FIRST),
        ("pos_embed",               "pos_emb"),
        ("blocks.{}.norm1.*",       "blocks.{}.ln1.*"),
        ("blocks.{}.norm2.*",       "blocks.{}.ln2.*"),
        ("norm.*",                  "post_ln.*"),
    ),
    head=(),
    signature_keys=("patch_emb.weight", "blocks.0.ln1.weight"),
    square_dims=None,
    ignored=(IgnoredKeys(r"proj_mlp\..+", "projector"),),
    layer_norm_eps=1e-5,
    hidden_act="gelu_pytorch_tanh",
    image_size=378,
    preprocessing=CodePreprocessing(RESAMPLE["lanczos"], only_for="the whole image, not its crops"),
)

MOONDREAM_OLD = replace(
    MOONDREAM,
    name="moondream-old",
    title="Moondream before 2025",
    used_by="Moondream 2 from May 2024",
    encoder=renamed(
        TIMM_ENCODER,
        ("patch_embed.proj.*", "patch_embed.linear.*", PATCHES_CHANNEL_FIRST),
    ),
    signature_keys=("patch_embed.linear.weight", "blocks.0.norm1.weight"),
    ignored=(),
    preprocessing=CodePreprocessing(
        RESAMPLE["bicubic"], only_for="releases and images that are not divided into tiles"
    ),
)

# --- big_vision -----------------------------------------------------------------------------------

BIG_VISION_ENCODER = table(
    # parameter                                           stored
    ("transformer.embeddings.patch_embedding.weight",     "embedding/kernel",   KERNEL),
    ("transformer.embeddings.patch_embedding.bias",       "embedding/bias"),
    ("transformer.embeddings.position_embedding.weight",  "pos_embedding",      BATCHED),
) + table(
    ("layer_norm1.weight",         "LayerNorm_0/scale"),
    ("layer_norm1.bias",           "LayerNorm_0/bias"),
    ("self_attn.q_proj.weight",    "MultiHeadDotProductAttention_0/query/kernel",  HEADS_LAST),
    ("self_attn.q_proj.bias",      "MultiHeadDotProductAttention_0/query/bias",    BIAS_OF_HEADS),
    ("self_attn.k_proj.weight",    "MultiHeadDotProductAttention_0/key/kernel",    HEADS_LAST),
    ("self_attn.k_proj.bias",      "MultiHeadDotProductAttention_0/key/bias",      BIAS_OF_HEADS),
    ("self_attn.v_proj.weight",    "MultiHeadDotProductAttention_0/value/kernel",  HEADS_LAST),
    ("self_attn.v_proj.bias",      "MultiHeadDotProductAttention_0/value/bias",    BIAS_OF_HEADS),
    ("self_attn.out_proj.weight",  "MultiHeadDotProductAttention_0/out/kernel",    HEADS_FIRST),
    ("self_attn.out_proj.bias",    "MultiHeadDotProductAttention_0/out/bias"),
    ("layer_norm2.weight",         "LayerNorm_1/scale"),
    ("layer_norm2.bias",           "LayerNorm_1/bias"),
    ("mlp.fc1.weight",             "MlpBlock_0/Dense_0/kernel",                    TRANSPOSED),
    ("mlp.fc1.bias",               "MlpBlock_0/Dense_0/bias"),
    ("mlp.fc2.weight",             "MlpBlock_0/Dense_1/kernel",                    TRANSPOSED),
    ("mlp.fc2.bias",               "MlpBlock_0/Dense_1/bias"),
    port=BLOCK, stored="Transformer/encoderblock_{}/",
) + table(
    ("transformer.post_layernorm.weight",                 "Transformer/encoder_norm/scale"),
    ("transformer.post_layernorm.bias",                   "Transformer/encoder_norm/bias"),
)

BIG_VISION_HEAD = table(
    ("probe",                      "probe"),
    ("attention.q_proj.weight",    "MultiHeadDotProductAttention_0/query/kernel",  HEADS_LAST),
    ("attention.q_proj.bias",      "MultiHeadDotProductAttention_0/query/bias",    BIAS_OF_HEADS),
    ("attention.k_proj.weight",    "MultiHeadDotProductAttention_0/key/kernel",    HEADS_LAST),
    ("attention.k_proj.bias",      "MultiHeadDotProductAttention_0/key/bias",      BIAS_OF_HEADS),
    ("attention.v_proj.weight",    "MultiHeadDotProductAttention_0/value/kernel",  HEADS_LAST),
    ("attention.v_proj.bias",      "MultiHeadDotProductAttention_0/value/bias",    BIAS_OF_HEADS),
    ("attention.out_proj.weight",  "MultiHeadDotProductAttention_0/out/kernel",    HEADS_FIRST),
    ("attention.out_proj.bias",    "MultiHeadDotProductAttention_0/out/bias"),
    ("layernorm.weight",           "LayerNorm_0/scale"),
    ("layernorm.bias",             "LayerNorm_0/bias"),
    ("mlp.fc1.weight",             "MlpBlock_0/Dense_0/kernel",                    TRANSPOSED),
    ("mlp.fc1.bias",               "MlpBlock_0/Dense_0/bias"),
    ("mlp.fc2.weight",             "MlpBlock_0/Dense_1/kernel",                    TRANSPOSED),
    ("mlp.fc2.bias",               "MlpBlock_0/Dense_1/bias"),
    port="pooling_head.", stored="MAPHead_0/",
)

BIG_VISION = Layout(
    name="big_vision",
    title="big_vision",
    used_by="big_vision (`.npz`)",
    encoder=BIG_VISION_ENCODER,
    head=BIG_VISION_HEAD,
    signature_keys=("embedding/kernel", "Transformer/encoderblock_0/LayerNorm_0/scale"),
    square_dims=(0, 1),
    ignored=(IgnoredKeys(r"head/(kernel|bias)", "projector"),),
    projections=(r"head/(kernel|bias)", r"pre_logits/(kernel|bias)"),
    rejected_keys=(("cls", CLASS_TOKEN),),
    layer_norm_eps=1e-6,
    hidden_act="gelu_pytorch_tanh",
    preprocessing=CodePreprocessing(
        RESAMPLE["bilinear"], difference="big_vision resizes without antialiasing"
    ),
)

BIG_VISION_NAFLEX = replace(
    BIG_VISION,
    name="big_vision-naflex",
    title="big_vision NaFlex",
    used_by="big_vision NaFlex (`.npz`)",
    encoder=renamed(
        BIG_VISION_ENCODER,
        ("embedding/kernel",    "embedding/kernel",     PATCHES_TRANSPOSED),
        ("pos_embedding",       "pos_embedding",        GRID),
    ),
    square_dims=None,
    naflex=True,
    preprocessing=CodePreprocessing(
        RESAMPLE["bilinear"], difference="big_vision truncates resized pixels instead of rounding"
    ),
)
# fmt: on


def scanned(layout: Layout) -> Layout:
    """Return the layout with the tensors of all blocks stacked, as flax's `scan` stores them.

    `Transformer/encoderblock_{}/...` becomes `Transformer/encoderblock/...`.
    """
    rules = []
    for rule in layout.encoder:
        stored = rule.stored.replace("encoderblock_{}", "encoderblock")
        rules.append(replace(rule, stored=stored))
    return replace(
        layout,
        name=f"{layout.name}-scanned",
        title=f"{layout.title}, blocks stacked",
        used_by=f"{layout.used_by} trained with `scan`; PaliGemma's `.npz`",
        encoder=tuple(rules),
        signature_keys=("embedding/kernel", "Transformer/encoderblock/LayerNorm_0/scale"),
    )


LAYOUTS = (
    HUGGINGFACE,
    HUGGINGFACE_NAFLEX,
    HUGGINGFACE_MATRIX,
    MLX,
    TIMM,
    TIMM_NAFLEX,
    MLX_JANUS,
    BIG_VISION,
    scanned(BIG_VISION),
    BIG_VISION_NAFLEX,
    scanned(BIG_VISION_NAFLEX),
    JANUS,
    GEMMA_PYTORCH,
    NANOVLM,
    MOONDREAM,
    MOONDREAM_OLD,
)
"""All supported layouts."""

"""Causes for which a checkpoint cannot be loaded, and what to do about each.

`CAUSES` is one list, the most specific cause first. Wherever loading fails because tensors are
missing, unexpected, of the wrong shape or of an unsupported dtype, or because no vision encoder is
recognized, the first cause that applies begins the message.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from siglip_port.checkpoint.formats import DTYPES, TensorInfo
from siglip_port.config import SigLipVisionConfig

if TYPE_CHECKING:
    from siglip_port.checkpoint.architecture import StoredSizes

Json = Mapping[str, Any]

LANGUAGE = re.compile(
    r"language_model|text_model|lm_head|embed_tokens|(?:^|[./])(?:text|txt|llm|audio\w*)[./]"
    r"|^(?:base_model\.model\.)?(?:model\.)?layers\.\d"
)
"""Names of language, text and audio models beside a vision encoder."""


@dataclass(frozen=True)
class Symptoms:
    """What is known about a checkpoint that cannot be loaded.

    Attributes:
        names: Names of the tensors in question: those under the encoder's prefix; all, if no
            encoder is recognized.
        tensors: Header entries of these tensors, as far as they were read.
        has_encoder: Whether an encoder is recognized.
        content: Contents of the configuration file; None if there is none.
        config: Architecture; None if it is unknown.
        sizes: Architecture by the shapes of the weights; None if they do not determine it.
        described_by: Source of the architecture, for messages.
        missing: Names of the encoder's tensors that are missing.
        unlisted: Missing tensors that a shard contains, but the index does not list there, and the
            shard.
        absent_files: Shards that do not exist or cannot be read.
        duplicates: Names that are stored more than once, and their names in the files.
    """

    names: Collection[str]
    tensors: Mapping[str, TensorInfo]
    has_encoder: bool = False
    content: Json | None = None
    config: SigLipVisionConfig | None = None
    sizes: StoredSizes | None = None
    described_by: str = "the architecture"
    missing: Collection[str] = ()
    unlisted: Mapping[str, str] = field(default_factory=dict)
    absent_files: Collection[str] = ()
    duplicates: Mapping[str, list[str]] = field(default_factory=dict)

    @cached_property
    def text(self) -> str:
        """All names, one per line."""
        return "\n".join(self.names)

    @cached_property
    def vision_names(self) -> list[str]:
        """The names in question, without those of language, text and audio models."""
        if self.has_encoder:
            return list(self.names)
        return [name for name in self.names if not LANGUAGE.search(name)]

    @cached_property
    def vision_text(self) -> str:
        """The names of `vision_names`, one per line."""
        return "\n".join(self.vision_names)

    def find(self, *patterns: str) -> str | None:
        """Return a vision name that contains the first pattern, if there is one for each."""
        return find_names(self.vision_text, patterns)

    def find_any(self, *patterns: str) -> str | None:
        """Return any name that contains the first pattern, if there is one for each."""
        return find_names(self.text, patterns)

    def has_only(self, pattern: str) -> bool:
        """Return whether there are names, and all of them contain a pattern."""
        expression = re.compile(pattern)
        return bool(self.names) and all(expression.search(name) for name in self.names)


def find_names(text: str, patterns: Collection[str]) -> str | None:
    """Return a line that contains the first pattern, if there is a line for each pattern."""
    lines = [re.search(rf"^.*(?:{pattern}).*$", text, re.MULTILINE) for pattern in patterns]
    matches = [line[0] for line in lines if line is not None]
    return matches[0] if len(matches) == len(patterns) else None


Cause = Callable[[Symptoms], str | None]
"""Returns why loading fails and what to do; None if that is not the cause."""


def diagnose(symptoms: Symptoms) -> str | None:
    """Return the most specific cause that applies, and what to do; None if none does."""
    for cause in CAUSES:
        sentence = cause(symptoms)
        if sentence is not None:
            return sentence
    return None


# --- adapters and wrappers ------------------------------------------------------------------------

ADAPTER = (
    r"lora_[AB]\b|lora_embedding_[AB]\b|lora_magnitude_vector|\.ia3_l\b|\.hada_[wt]|\.lokr_w"
    r"|\.oft_[rRsS]\b|\.vera_lambda|\.boft_|lora_(?:up|down)\."
)
"""Tensors of LoRA, DoRA, IA3, LoHa, LoKr, OFT and VeRA."""

MERGE = (
    "merge it with peft (PeftModel.from_pretrained(base model, adapter).merge_and_unload()), save "
    "the result with save_pretrained and load that"
)


def adapter_alone(symptoms: Symptoms) -> str | None:
    """Find a file of an adapter without the model."""
    example = symptoms.find_any(ADAPTER)
    is_alone = symptoms.has_only(rf"{ADAPTER}|modules_to_save|prompt_embeddings")
    if example is None or not is_alone:
        return None
    return (
        f"the weights are only an adapter (LoRA or similar, such as {example}), without the model "
        f"that it changes; {MERGE}"
    )


def prompts_alone(symptoms: Symptoms) -> str | None:
    """Find a file of prefix or prompt tuning."""
    if not symptoms.has_only(r"prompt_embeddings|prompt_encoder|prefix_encoder"):
        return None
    return (
        "the weights are only an adapter of learned prompts (prefix or prompt tuning), which "
        "cannot be merged into a vision encoder; load the base model"
    )


def unmerged_adapter(symptoms: Symptoms) -> str | None:
    """Find an encoder whose adapter is not merged."""
    example = symptoms.find(ADAPTER) or symptoms.find(r"\.base_layer\.|\.modules_to_save\.")
    if example is None:
        return None
    return (
        f"the weights contain an adapter that is not merged (LoRA or similar, such as {example}); "
        "call merge_and_unload() on the PEFT model, save the result with save_pretrained and load "
        "that"
    )


def tensors_stored_twice(symptoms: Symptoms) -> str | None:
    """Find tensors that differ only by the names of wrappers."""
    if not symptoms.duplicates:
        return None
    first, second = next(iter(symptoms.duplicates.values()))[:2]
    return (
        f"tensors are stored twice ({len(symptoms.duplicates)}), under names that differ only by "
        f"a wrapper ({first} and {second}), so which to load is ambiguous; save one of the models "
        "alone, for example model._orig_mod.state_dict() of a compiled model"
    )


# --- weights that were not gathered ---------------------------------------------------------------


def zero_shards(symptoms: Symptoms) -> str | None:
    """Find tensors without elements, as DeepSpeed leaves them."""
    empty = [name for name, info in symptoms.tensors.items() if 0 in info.shape]
    if not empty:
        return None
    shape = list(symptoms.tensors[empty[0]].shape)
    return (
        f"{len(empty)} tensors are empty (shape {shape}, such as {empty[0]}): the checkpoint was "
        "saved under DeepSpeed ZeRO-3 without gathering the weights; gather them with "
        "zero_to_fp32.py, which DeepSpeed puts into the checkpoint's folder, or save again with "
        '"stage3_gather_16bit_weights_on_model_save": true'
    )


def flat_shards(symptoms: Symptoms) -> str | None:
    """Find flattened parameters of FSDP."""
    example = symptoms.find(r"\b_?flat_param(?:_\d+)?\b|\._fpw_module\.")
    if example is None:
        return None
    return (
        f"the weights are flattened shards of FSDP ({example}); save again with a full state dict "
        "(StateDictType.FULL_STATE_DICT), or merge the shards with `accelerate merge-weights`"
    )


def no_tensors(symptoms: Symptoms) -> str | None:
    """Find a file without tensors."""
    if symptoms.names:
        return None
    return (
        "the weights file has no tensors (a model on the meta device, or an empty state dict, was "
        "saved); save the model again with its weights loaded"
    )


# --- quantization ---------------------------------------------------------------------------------

QUANTIZED = (
    (" by bitsandbytes, 4 bits", r"\.absmax$|\.quant_map$|\.quant_state\."),
    (" by bitsandbytes, 8 bits", r"\.SCB$|\.weight_format$"),
    (" by GPTQ or AWQ", r"\.qweight$|\.qzeros$"),
    (" by compressed-tensors", r"\.weight_packed$|\.weight_shape$"),
    (" by HQQ", r"\.W_q$"),
    (" by torchao or quanto", r"\.weight(?:\._data|\._scale|_qdata)|:_data$|\.int_data$"),
    (" by mlx", r"\.biases$"),
    (" to 8-bit floats", r"\.weight_scale(?:_inv|_2)?$|\.scale_weight$|\.input_scale$"),
    ("", r"\.scales$|\.zeros$|\.zero_point$"),
)
"""Method, and names of the tensors that it adds; empty if several methods use these names."""


def quantized(symptoms: Symptoms) -> str | None:
    """Find an encoder whose weights are quantized."""
    if not symptoms.has_encoder and symptoms.find(VISION) is None:
        return None  # a quantized language model; what it lacks is the better reason
    evidence = odd_dtypes(symptoms)
    by_method = ""
    for method, pattern in QUANTIZED:
        example = symptoms.find(pattern)
        if example is not None:
            by_method = method
            evidence.append(f"{example} is stored, too")
            break
    if not evidence:
        return None
    return (
        f"the vision encoder's weights are quantized{by_method} ({', '.join(evidence)}), which is "
        "not supported; load the checkpoint that was quantized, or dequantize it with the library "
        "that wrote it and save it in float16, bfloat16 or float32"
    )


def odd_dtypes(symptoms: Symptoms) -> list[str]:
    """Return one example for each dtype of the encoder's weights that is not supported."""
    examples: dict[str, str] = {}
    vision = set(symptoms.vision_names)
    for name, info in symptoms.tensors.items():
        if name in vision and info.dtype not in DTYPES and is_weight(name):
            examples.setdefault(info.dtype, f"{name} is {info.dtype}")
    return list(examples.values())


def is_weight(name: str) -> bool:
    """Return whether a tensor is a weight or bias, not a buffer of indices."""
    return not name.endswith(("position_ids", "num_batches_tracked", "n_averaged"))


# --- other models ---------------------------------------------------------------------------------

VISION = r"patch_emb|pos_emb|vision|visual|image|img|vit\b|vpm|embedding/kernel|blocks?\.\d"

OTHER_MODELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("CLIP", (r"pre_layrnorm\.", r"class_embedding")),
    ("CLIP (OpenAI, open_clip)", (r"transformer\.resblocks\.", r"class_embedding|ln_pre\.")),
    ("InternViT", (r"class_embedding", r"\.ls1$", r"\.attn\.qkv\.")),
    ("Qwen2-VL", (r"visual\.merger\.|\.merger\.(?:ln_q|mlp)", r"patch_embed\.proj")),
    ("SAM", (r"\.rel_pos_h$",)),
    ("DINOv2 or DINOv3", (r"layer_scale1\.lambda1|\.ls1\.gamma$", r"cls_token")),
    ("EVA", (r"\.q_bias$|inner_attn_ln|\.w12\.|freqs_cos", r"patch_embed")),
    ("Swin", (r"relative_position_bias_table",)),
    ("ConvNeXt", (r"\.conv_dw\.|\.dwconv\.|depthwise_conv|stages\.\d+\.layers\.\d+\.gamma",)),
    ("Pixtral", (r"patch_conv\.", r"attention_norm|ln_pre")),
    ("V-JEPA", (r"patch_embeddings\.proj\.", r"encoder\.layer\.0\.attention\.(?:query|key)\.")),
    (
        "ViT, I-JEPA or DINO of transformers",
        (r"patch_embeddings\.projection\.", r"attention\.attention\.query"),
    ),
    ("Perceiver or Flamingo", (r"perceiver|latents$", r"to_kv|to_q")),
    ("Keye-VL", (r"packing_position_embedding",)),
    ("AIMv2", (r"preprocessor\.patchifier|attention\.qkv\.weight", r"rms_norm|norm_1\.")),
    ("ResNet", (r"layer1\.0\.conv1\.", r"running_mean")),
    ("a ViT with a class token", (r"cls_token$|class_token$|cls$",)),
    ("a ViT with register tokens", (r"reg_token$|register_tokens$",)),
    ("a ViT with layer scale", (r"\.ls[12]\.gamma$|\.gamma_1$|layer_scale\d?\.",)),
    ("a ViT with normalized queries and keys", (r"attn\.[qk]_norm\.|self_attn\.[qk]_norm\.",)),
    ("a ViT with a LayerNorm before its blocks", (r"\bnorm_pre\.|\bpre_layernorm\.|ln_pre\.",)),
    ("a ViT with rotary positions", (r"rotary|\brope\b|freqs_cis|inv_freq",)),
)
"""Models by the names of their tensors: a name for every pattern. The first match counts."""


def other_model(symptoms: Symptoms) -> str | None:
    """Find the tensors of another architecture."""
    for model, patterns in OTHER_MODELS:
        example = symptoms.find(*patterns)
        if example is not None:
            return (
                f"the tensors are those of another architecture, {model} (such as {example}), "
                "which is not supported; use the library that defines it"
            )
    return video_model(symptoms)


def video_model(symptoms: Symptoms) -> str | None:
    """Find a patch embedding of video, with a dimension of time."""
    for name, info in symptoms.tensors.items():
        if len(info.shape) == VIDEO_DIMENSIONS and "patch_emb" in name:
            return (
                f"the patch embedding {name} has five dimensions, {list(info.shape)}, one of them "
                "time, as in Qwen2-VL and V-JEPA, which are not supported; use the library that "
                "defines the model"
            )
    return None


VIDEO_DIMENSIONS = 5


def norm_after_pooling(symptoms: Symptoms) -> str | None:
    """Find timm's models that normalize the mean instead of the tokens."""
    example = symptoms.find(r"\bfc_norm\.weight$")
    is_instead = any(re.search(r"\bnorm\.weight$", name) for name in symptoms.missing)
    if example is None or not is_instead:
        return None
    return (
        f"the model normalizes after its mean pooling ({example}), SigLIP before it, so it is "
        "another architecture; use timm"
    )


TEXT = r"token_embedding|text_model\.|embed_tokens|word_embeddings|lm_head|wte\.|wpe\."
PROJECTOR = r"projector|connector|aligner|resampler|merger"


def text_alone(symptoms: Symptoms) -> str | None:
    """Find a text encoder or a language model without a vision encoder."""
    if symptoms.find_any(r"patch_emb|embedding/kernel") is not None:
        return None
    kind = "a language model"
    if symptoms.find_any(r"token_embedding|text_model\.") is not None:
        kind = "a text encoder"
    elif symptoms.find_any(TEXT) is None or symptoms.find(VISION) is not None:
        return None
    return (
        f"the tensors are those of {kind}, without a vision encoder; load the checkpoint of the "
        "whole model, or the vision encoder that it was trained with"
    )


def projector_alone(symptoms: Symptoms) -> str | None:
    """Find a file with a projector only."""
    if not symptoms.has_only(PROJECTOR):
        return None
    return (
        "the tensors are those of a projector alone, without a vision encoder; load the checkpoint "
        "of the whole model, or the vision encoder that it was trained with"
    )


# --- incomplete files, other configurations -------------------------------------------------------


def absent_shards(symptoms: Symptoms) -> str | None:
    """Find shards that do not exist or cannot be read."""
    if not symptoms.absent_files:
        return None
    files = ", ".join(sorted(symptoms.absent_files))
    return f"shards are missing or damaged: {files}; copy or download these files again"


def outdated_index(symptoms: Symptoms) -> str | None:
    """Find missing tensors that a shard contains, but the index does not list there."""
    if not symptoms.unlisted:
        return None
    name = min(symptoms.unlisted)
    return (
        f"the index is not that of these shards: {symptoms.unlisted[name]} contains {name}, but "
        f"the index does not list it there ({len(symptoms.unlisted)} such tensors); take the index "
        "that was saved with the shards, or save the model again"
    )


CONFIG_FILE = "config.json"

SIZES = (
    ("embed_dim", "hidden_size"),
    ("num_encoder_blocks", "num_hidden_layers"),
    ("mlp_hidden_dim", "intermediate_size"),
    ("patch_size", "patch_size"),
    ("num_channels", "num_channels"),
)
"""Field of the architecture, and its key in config.json."""


def other_positions(symptoms: Symptoms) -> str | None:
    """Find a position embedding for another image size than the configuration's."""
    config, sizes = symptoms.config, symptoms.sizes
    if config is None or sizes is None or sizes.num_patches == config.num_patches:
        return None
    if any(getattr(config, name) != getattr(sizes, name) for name, _ in SIZES):
        return None
    side = round(sizes.num_patches**0.5)
    key = "num_patches" if config.naflex else "image_size"
    value = config.num_patches if config.naflex else config.image_size
    subject = (
        f"{symptoms.described_by} gives {key} {value} ({config.grid_size} x {config.grid_size} "
        f"patches), but the weights have {sizes.num_patches} positions"
    )
    if side**2 + 1 == sizes.num_patches:
        return f"{subject}, one more than a square number: a model with a class token, not SigLIP"
    if side**2 != sizes.num_patches:
        return f"{subject}, which is not a square number; only square grids are supported"
    right = sizes.num_patches if config.naflex else side * config.patch_size
    return (
        f"{subject} ({side} x {side}), so {key} was edited or belongs to another checkpoint; set "
        f"it back to {right}, and choose a rule that resizes the positions with interpolation= "
        "to use other image sizes"
    )


def other_sizes(symptoms: Symptoms) -> str | None:
    """Find a configuration of another model than the weights."""
    config, sizes = symptoms.config, symptoms.sizes
    if config is None or sizes is None:
        return None
    differences = []
    for name, key in SIZES:
        value, stored = getattr(config, name), getattr(sizes, name)
        if value != stored:
            label = key if symptoms.described_by == CONFIG_FILE else name
            differences.append(f"{label} is {value}, but {stored} in the weights")
    if not differences:
        return None
    incomplete = ""
    if sizes.num_encoder_blocks < config.num_encoder_blocks:
        incomplete = ", or copy the weights again if they are incomplete"
    return (
        f"{symptoms.described_by} is not that of these weights ({'; '.join(differences)}); correct "
        f"it, or take the one that was saved with the weights{incomplete}"
    )


CAUSES: tuple[Cause, ...] = (
    no_tensors,
    prompts_alone,
    adapter_alone,
    unmerged_adapter,
    zero_shards,
    flat_shards,
    quantized,
    norm_after_pooling,
    other_model,
    projector_alone,
    text_alone,
    tensors_stored_twice,
    absent_shards,
    outdated_index,
    other_positions,
    other_sizes,
)
"""All causes, the most specific first."""

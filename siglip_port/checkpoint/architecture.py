"""The architecture of a checkpoint: by transformers' `config.json`, or by what else tells it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from siglip_port.checkpoint.errors import CheckpointError
from siglip_port.checkpoint.hf_config import UnknownModelError, refuse_other_models
from siglip_port.checkpoint.key_rules import KeyRule, Layout
from siglip_port.checkpoint.layouts import BLOCK
from siglip_port.checkpoint.recognize import Match
from siglip_port.checkpoint.registry import PUBLISHED, config_of_name
from siglip_port.checkpoint.source import CONFIG
from siglip_port.checkpoint.transforms import PATCHES_TRANSPOSED, TRANSPOSED
from siglip_port.checkpoint.weight_files import WeightFiles
from siglip_port.config import SigLipVisionConfig, is_int

NOT_SIGLIP = (
    "this is not the configuration of a SigLIP vision encoder that can be loaded; if it is wrong, "
    "pass config="
)

Json = Mapping[str, Any]


@dataclass(frozen=True)
class StoredSizes:
    """What the shapes of the stored tensors tell, in the names of `SigLipVisionConfig`."""

    embed_dim: int
    num_patches: int
    patch_size: int
    num_channels: int
    mlp_hidden_dim: int
    num_encoder_blocks: int
    num_attention_heads: int | None = None


def read_architecture(files: WeightFiles, match: Match, content: Json | None) -> SigLipVisionConfig:
    """Read the architecture from transformers' configuration, or from shapes and what else tells.

    Args:
        files: the weights files.
        match: the layout they are in.
        content: of the configuration file; None where there is none.

    Raises:
        CheckpointError: it describes another model, or something remains unknown.
    """
    title = files.source.title
    refusal: UnknownModelError | None = None
    if match.layout.has_hf_config:
        if content is None:
            raise CheckpointError(
                f"{title} has no {CONFIG}, which says what the tensors mean; put the "
                "checkpoint's own beside "
                "the weights, or pass config="
            )
        try:
            return SigLipVisionConfig.from_hf(content)
        except UnknownModelError as error:
            refusal = error  # It may name its encoder, as the first LLaVAs' do.
        except ValueError as error:
            raise CheckpointError(f"{title}: {error}; {NOT_SIGLIP}") from error
    try:
        sizes = read_sizes(match.layout, files.shapes(match.prefix), match.prefix)
        return infer_architecture(match.layout, sizes, content or {})
    except ValueError as error:
        if refusal is not None:
            raise CheckpointError(f"{title}: {refusal}; {NOT_SIGLIP}") from error
        raise CheckpointError(f"{title} (layout: {match.title}): {error}") from error


# --- by shapes ------------------------------------------------------------------------------------


def read_sizes(
    layout: Layout, shapes: Mapping[str, tuple[int, ...]], prefix: str = ""
) -> StoredSizes:
    """Read from the shapes of the stored tensors what they tell of the architecture.

    Args:
        layout: of the tensors.
        shapes: of the tensors of the file; those of the embeddings and of the first block will do.
        prefix: what stands before the names.

    Raises:
        ValueError: a tensor that tells is missing, or of a shape that makes no sense.
    """
    patch_rule = rule_of(layout, "transformer.embeddings.patch_embedding.weight")
    position_rule = rule_of(layout, "transformer.embeddings.position_embedding.weight")
    query_rule = rule_of(layout, f"{BLOCK}self_attn.q_proj.weight")
    fc1_rule = rule_of(layout, f"{BLOCK}mlp.fc1.weight")
    patch = shape_of(patch_rule, shapes, prefix)
    fc1 = shape_of(fc1_rule, shapes, prefix)
    queries = shape_of(query_rule, shapes, prefix)
    positions = shape_of(position_rule, shapes, prefix)

    extra_dims = int(layout.is_stacked)  # of the blocks
    if not layout.fits(patch) or len(fc1) != 2 + extra_dims or len(positions) < 2:
        raise ValueError(f"its tensors have shapes that no {layout.title} encoder has")
    channels, patch_size = patch_sizes(layout, patch_rule, patch)
    embed_dim = positions[-1]
    num_heads = None
    if len(queries) == 3 + extra_dims:
        num_heads = queries[-2]
    elif layout.head_dim is not None:
        num_heads = embed_dim // layout.head_dim
    return StoredSizes(
        embed_dim=embed_dim,
        num_patches=math.prod(positions[:-1]),
        patch_size=patch_size,
        num_channels=channels,
        mlp_hidden_dim=fc1[-1] if fc1_rule.transform is TRANSPOSED else fc1[-2],
        num_encoder_blocks=fc1[0] if layout.is_stacked else count_blocks(fc1_rule, shapes, prefix),
        num_attention_heads=num_heads,
    )


def rule_of(layout: Layout, port: str) -> KeyRule:
    """Return the rule whose first tensor is ours of this name."""
    names = (port, port.replace(".weight", ".*"))
    return next(rule for rule in layout.encoder if rule.port[0] in names)


def shape_of(rule: KeyRule, shapes: Mapping[str, tuple[int, ...]], prefix: str) -> tuple[int, ...]:
    """Return the shape of the weight that a rule names, of the first block."""
    name = prefix + rule.stored.replace("{}", "0").replace("*", "weight")
    if name not in shapes:
        raise ValueError(f"{name} is missing, from which its size is told")
    return shapes[name]


def patch_sizes(layout: Layout, rule: KeyRule, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the number of channels, and the side of a patch, by the patch embedding's shape."""
    if layout.square_dims is not None:
        kernel = rule.transform.load(torch.empty(1).expand(shape), ())
        _, channels, patch_size, _ = kernel.shape
        return channels, patch_size
    # A matrix tells P * P * C; SigLIP's images have three channels.
    channels = 3
    values = shape[0] if rule.transform is PATCHES_TRANSPOSED else shape[1]
    patch_size = math.isqrt(values // channels)
    if patch_size == 0 or channels * patch_size**2 != values:
        raise ValueError(
            f"its patch embedding takes {values} values, which are no square of 3 channels"
        )
    return channels, patch_size


def count_blocks(rule: KeyRule, shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    """Return the number of blocks, by the highest one that holds the weight of a rule."""
    before, after = rule.stored.replace("*", "weight").split("{}")
    pattern = re.compile(rf"{re.escape(prefix + before)}(\d{{1,6}}){re.escape(after)}")
    matches = [pattern.fullmatch(name) for name in shapes]
    return max(int(match[1]) for match in matches if match) + 1


# --- by configurations of other kinds -------------------------------------------------------------


def infer_architecture(layout: Layout, sizes: StoredSizes, content: Json) -> SigLipVisionConfig:
    """Work out the architecture of a model whose files have no configuration of transformers' kind.

    What the shapes tell is taken from them. The number of heads, the activation, the epsilon and
    the size of an image in pixels are not in the shapes: they are taken from what the configuration
    says, from the name of a published model that it mentions, and from what the layout implies, in
    this order.

    Args:
        layout: of the weights.
        sizes: what their shapes tell.
        content: of the configuration file; empty where there is none.

    Raises:
        ValueError: something remains unknown, or several models are mentioned.
    """
    refuse_other_models(content)
    published = find_published(content)
    sections = vision_sections(content)
    num_heads = infer_heads(sizes, sections, published)
    hidden_act = infer_activation(layout, sections, published)
    if num_heads is None or hidden_act is None:
        values = {"the number of heads": num_heads, "the activation": hidden_act}
        unknown = [name for name, value in values.items() if value is None]
        raise ValueError(
            f"neither its configuration nor its shapes tell {' and '.join(unknown)}; put the "
            "checkpoint's own "
            "configuration beside the weights, or pass config=SigLipVisionConfig(...)"
        )
    if math.isqrt(sizes.num_patches) ** 2 != sizes.num_patches:
        raise ValueError(f"its {sizes.num_patches} positions form no square grid")
    implied = {"vit_ln_eps": layout.layer_norm_eps or SigLipVisionConfig.layer_norm_eps}
    return SigLipVisionConfig(
        num_channels=sizes.num_channels,
        embed_dim=sizes.embed_dim,
        image_size=infer_image_size(layout, sizes, sections, published),
        patch_size=sizes.patch_size,
        num_attention_heads=num_heads,
        num_encoder_blocks=sizes.num_encoder_blocks,
        mlp_hidden_dim=sizes.mlp_hidden_dim,
        layer_norm_eps=first_value([*sections, implied], "vit_ln_eps"),
        hidden_act=hidden_act,
        mean_pooling=infer_mean_pooling(sections, published),
        naflex=layout.naflex,
    )


def find_published(content: Json) -> SigLipVisionConfig | None:
    """Return the one published model that a configuration names; None where it names none.

    Raises:
        ValueError: it names several, which differ.
    """
    configs = {}
    for text in texts_in(content):
        config = config_of_name(text)
        if config is not None:
            configs[text] = replace(config, pooling_head=False)
    if len(set(configs.values())) > 1:
        raise ValueError(
            f"its configuration names several encoders ({', '.join(configs)}); pass config="
        )
    return next(iter(configs.values()), None)


def texts_in(content: object) -> Iterator[str]:
    """Yield all texts in a piece of JSON, however deep, but for the names of its values."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from texts_in(value)
    elif isinstance(content, list):
        for value in content:
            yield from texts_in(value)


def vision_sections(content: Json) -> list[Json]:
    """Return where timm, open_clip, Janus, nanoVLM and others describe the vision encoder."""
    paths = (
        ("model_args",),
        ("model_cfg", "vision_cfg"),
        ("vision_config", "params"),
        ("pretrained_cfg",),
        (),
    )
    sections = []
    for path in paths:
        section: object = content
        for key in path:
            section = section.get(key) if isinstance(section, Mapping) else None
        if isinstance(section, Mapping):
            sections.append(section)
    return sections


def first_value(sections: list[Json], *keys: str) -> Any:  # noqa: ANN401 (a value of JSON)
    """Return the first value of any of these keys, section by section; None where there is none."""
    for section in sections:
        for key in keys:
            if section.get(key) is not None:
                return section[key]
    return None


def infer_heads(
    sizes: StoredSizes, sections: list[Json], published: SigLipVisionConfig | None
) -> Any:  # noqa: ANN401 (a value of JSON, which SigLipVisionConfig checks)
    """Return the number of heads, as it is told."""
    num_heads = sizes.num_attention_heads or first_value(sections, "num_heads", "vit_n_heads")
    if num_heads is None and published is not None and published.embed_dim == sizes.embed_dim:
        return published.num_attention_heads
    return num_heads


def infer_activation(
    layout: Layout, sections: list[Json], published: SigLipVisionConfig | None
) -> str | None:
    """Return the activation in our words."""
    act = first_value(sections, "act_layer")
    if act is not None:
        return "gelu_pytorch_tanh" if act == "gelu_tanh" else str(act)
    if layout.hidden_act is not None:
        return layout.hidden_act
    return published.hidden_act if published is not None else None


def infer_mean_pooling(sections: list[Json], published: SigLipVisionConfig | None) -> bool:
    """Whether the mean of the tokens is the pooled vector."""
    pool = first_value(sections, "global_pool", "timm_pool")
    if pool is not None:
        return bool(pool == "avg")
    return published is not None and published.mean_pooling


def infer_image_size(
    layout: Layout,
    sizes: StoredSizes,
    sections: list[Json],
    published: SigLipVisionConfig | None,
) -> int:
    """Return the side of an image: the first that is told and has as many patches as are stored."""
    grid_size = math.isqrt(sizes.num_patches)
    if not layout.naflex:
        candidates = [*image_sizes(sections)]
        if published is not None:
            candidates.append(published.image_size)
        candidates += published_image_sizes(sizes)
        for image_size in candidates:
            if image_size // sizes.patch_size == grid_size:
                return image_size
    return grid_size * sizes.patch_size


def image_sizes(sections: list[Json]) -> Iterator[int]:
    """Yield the sizes of an image; of a list, the last, which is the width."""
    for section in sections:
        for key in ("img_size", "image_size", "vit_img_size", "input_size"):
            size = section.get(key)
            if isinstance(size, list) and size:
                size = size[-1]
            if is_int(size):
                yield size


def published_image_sizes(sizes: StoredSizes) -> Iterator[int]:
    """Yield the size of an image in the published models of this shape.

    That of 27 x 27 patches of 14 is 384, not 378.
    """
    for published in PUBLISHED:
        config = published.config
        shape = (config.embed_dim, config.patch_size, config.num_patches)
        if shape == (sizes.embed_dim, sizes.patch_size, sizes.num_patches):
            yield config.image_size

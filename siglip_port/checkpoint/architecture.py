"""The architecture of a checkpoint, from transformers' `config.json` or inferred from shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from siglip_port.checkpoint.errors import CheckpointError
from siglip_port.checkpoint.hf_config import UnknownModelError, refuse_other_models
from siglip_port.checkpoint.key_rules import KeyRule, Layout
from siglip_port.checkpoint.layouts import BLOCK, MOONDREAM_OLD
from siglip_port.checkpoint.recognize import Match
from siglip_port.checkpoint.registry import PUBLISHED, SIZES, config_of_name
from siglip_port.checkpoint.source import CONFIG, subfolder_advice
from siglip_port.checkpoint.transforms import PATCHES_TRANSPOSED, TRANSPOSED
from siglip_port.checkpoint.vision_keys import refuse_unknown_sections, section_at
from siglip_port.checkpoint.weight_files import WeightFiles
from siglip_port.config import SigLipVisionConfig, is_int

NOT_SIGLIP = (
    "the configuration does not describe a supported SigLIP vision encoder; if it is wrong, "
    "pass config="
)

Json = Mapping[str, Any]

BUILT_FROM = (("model_args",), ("model_cfg", "vision_cfg"))
"""Paths of the arguments from which timm and open_clip build the model."""

IMAGE_SIZE_KEYS = ("img_size", "image_size", "vit_img_size", "input_size", "crop_size")


@dataclass(frozen=True)
class StoredSizes:
    """Sizes that follow from the shapes of stored tensors, named as in `SigLipVisionConfig`."""

    embed_dim: int
    num_patches: int
    patch_size: int
    num_channels: int
    mlp_hidden_dim: int
    num_encoder_blocks: int
    num_attention_heads: int | None = None


class UnknownValuesError(ValueError):
    """Neither shapes nor a configuration give the number of heads or the activation."""


class Architecture(NamedTuple):
    """The architecture of a checkpoint.

    Attributes:
        config: The architecture, without the pooling that the tensors show.
        source: Where it comes from, and what was assumed, for `Evidence.architecture`.
    """

    config: SigLipVisionConfig
    source: str


def read_architecture(files: WeightFiles, match: Match, content: Json | None) -> Architecture:
    """Read the architecture from transformers' configuration, or infer it.

    Args:
        files: Weights files.
        match: Layout and prefix of the encoder.
        content: Contents of the configuration file; None if there is none.

    Raises:
        CheckpointError: The configuration describes another model, or a value is unknown.
    """
    title = files.source.title
    reason = f"{title} has no {CONFIG}"
    if match.layout.has_hf_config and content is not None:
        try:
            config = SigLipVisionConfig.from_hf(content)
            if content.get("model_type") == "bagel":
                config = without_last_block(config, files, match)
            return Architecture(config, CONFIG)
        except UnknownModelError as error:
            # It may name its encoder, as the first LLaVA releases do, or the shapes may be known.
            reason = f"{title}: {error}"
        except ValueError as error:
            raise CheckpointError(f"{title}: {error}; {NOT_SIGLIP}") from error
    try:
        sizes = read_sizes(match.layout, files.shapes(match.prefix), match.prefix)
        if match.layout is MOONDREAM_OLD:
            refuse_unknown_release(files, sizes)
        return infer_architecture(match.layout, sizes, content or {})
    except UnknownValuesError as error:
        if match.layout.has_hf_config:
            raise CheckpointError(
                f"{reason}, and the tensor shapes are not those of a published encoder; "
                f"put the encoder's {CONFIG} beside the weights, or pass config="
                + subfolder_advice(files.source)
            ) from error
        raise CheckpointError(f"{title} (layout: {match.title}): {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{title} (layout: {match.title}): {error}") from error


def without_last_block(
    config: SigLipVisionConfig, files: WeightFiles, match: Match
) -> SigLipVisionConfig:
    """Return the architecture of BAGEL, whose code removes the last block of its configuration.

    Its training code stores the configuration with or without it; the tensors decide.
    """
    sizes = read_sizes(match.layout, files.shapes(match.prefix), match.prefix)
    if sizes.num_encoder_blocks == config.num_encoder_blocks - 1:
        return replace(config, num_encoder_blocks=sizes.num_encoder_blocks)
    return config


def refuse_unknown_release(files: WeightFiles, sizes: StoredSizes) -> None:
    """Raise ValueError unless a Moondream file is known to have the approximate GELU.

    Releases until March 2024 had the exact one, with the same names. From May 2024 on, the
    projection takes tokens of two resolutions, so that its inputs are twice the encoder's width.
    """
    for name in files.file_of:
        if name.endswith("projection.mlp.fc1.weight"):
            info = files.tensor(name)
            if info is not None and info.shape[-1:] == (2 * sizes.embed_dim,):
                return
    raise ValueError(
        "Moondream releases before April 2024 have the exact GELU, and this file does not show its "
        "release (projection.mlp.fc1.weight of later ones has twice the encoder's width as "
        "inputs); pass config=SigLipVisionConfig(...) with its hidden_act"
    )


# --- from shapes ----------------------------------------------------------------------------------


def read_sizes(
    layout: Layout, shapes: Mapping[str, tuple[int, ...]], prefix: str = ""
) -> StoredSizes:
    """Derive sizes of the architecture from the shapes of stored tensors.

    Args:
        layout: Layout of the tensors.
        shapes: Shapes by name; the embeddings and the first block are sufficient.
        prefix: Prefix of the names.

    Raises:
        ValueError: A tensor is missing or has an impossible shape.
    """
    patch_rule = rule_of(layout, "transformer.embeddings.patch_embedding.weight")
    position_rule = rule_of(layout, "transformer.embeddings.position_embedding.weight")
    query_rule = rule_of(layout, f"{BLOCK}self_attn.q_proj.weight")
    fc1_rule = rule_of(layout, f"{BLOCK}mlp.fc1.weight")
    patch = shape_of(patch_rule, shapes, prefix)
    fc1 = shape_of(fc1_rule, shapes, prefix)
    queries = shape_of(query_rule, shapes, prefix)
    positions = shape_of(position_rule, shapes, prefix)

    extra_dims = int(layout.is_stacked)  # dimension of the blocks
    if not layout.fits(patch) or len(fc1) != 2 + extra_dims or len(positions) < 2:
        raise ValueError(f"tensor shapes are impossible in layout {layout.name!r}")
    grid = positions[:-1][-2:]
    if len(positions) > 2 and grid[0] not in (1, grid[1]):
        raise ValueError(f"grid of positions must be square, got {grid[0]} x {grid[1]}")
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
    """Return the rule whose first parameter has this name."""
    names = (port, port.replace(".weight", ".*"))
    return next(rule for rule in layout.encoder if rule.port[0] in names)


def shape_of(rule: KeyRule, shapes: Mapping[str, tuple[int, ...]], prefix: str) -> tuple[int, ...]:
    """Return the shape of the weight of a rule, in the first block."""
    name = prefix + rule.stored.replace("{}", "0").replace("*", "weight")
    if name not in shapes:
        raise ValueError(f"{name} is missing, so the architecture cannot be inferred")
    return shapes[name]


def patch_sizes(layout: Layout, rule: KeyRule, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the number of channels and the patch size, from the patch embedding's shape."""
    if layout.square_dims is not None:
        kernel = rule.transform.from_stored(torch.empty(1).expand(shape), ())
        _, channels, patch_size, _ = kernel.shape
        return channels, patch_size
    # A matrix gives only P * P * C; SigLIP's images have three channels.
    channels = 3
    values = shape[0] if rule.transform is PATCHES_TRANSPOSED else shape[1]
    patch_size = math.isqrt(values // channels)
    if patch_size == 0 or channels * patch_size**2 != values:
        raise ValueError(f"patch embedding has {values} inputs, expected 3 * patch_size ** 2")
    return channels, patch_size


def count_blocks(rule: KeyRule, shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    """Return the number of blocks, from the highest block index of a rule's weight."""
    before, after = rule.stored.replace("*", "weight").split("{}")
    pattern = re.compile(rf"{re.escape(prefix + before)}(\d{{1,6}}){re.escape(after)}")
    matches = [pattern.fullmatch(name) for name in shapes]
    return max(int(match[1]) for match in matches if match) + 1


# --- from other configuration files ---------------------------------------------------------------


def infer_architecture(layout: Layout, sizes: StoredSizes, content: Json) -> Architecture:
    """Infer the architecture of a model without a configuration file of transformers.

    Shapes determine most sizes, and in some layouts the number of heads. The other values come from
    the configuration file, from the layout, from the name of a published model in the
    configuration file, or from the published model of the same width, in this order.

    Args:
        layout: Layout of the weights.
        sizes: Sizes from the shapes.
        content: Contents of the configuration file; empty if there is none.

    Raises:
        ValueError: A value is unknown, or the configuration names several models or describes
            something that SigLIP does not have.
    """
    refuse_other_models(content)
    refuse_unknown_sections(content)
    if math.isqrt(sizes.num_patches) ** 2 != sizes.num_patches:
        raise ValueError(f"number of positions must be a square number, got {sizes.num_patches}")
    named = find_published(content)
    sections = vision_sections(content)
    num_heads = infer_heads(sizes, sections, named)
    hidden_act = infer_activation(layout, sections, named)
    source = "tensor shapes"
    if content:
        source += " and the configuration file"
    size = published_size(layout, sizes)
    if size is not None and named is None and (num_heads is None or hidden_act is None):
        config = SIZES[size]
        num_heads = num_heads or config.num_attention_heads
        if layout.has_hf_config:  # Other layouts exist with either activation.
            hidden_act = hidden_act or config.hidden_act
        source += f"; assumed from the published {size} size: {num_heads} heads, {hidden_act}"
    if num_heads is None or hidden_act is None:
        values = {"num_attention_heads": num_heads, "hidden_act": hidden_act}
        unknown = [name for name, value in values.items() if value is None]
        raise UnknownValuesError(
            f"cannot infer {' and '.join(unknown)} from the configuration or the tensor shapes; "
            "put the checkpoint's configuration beside the weights, or pass "
            "config=SigLipVisionConfig(...)"
        )
    defaults = {"vit_ln_eps": layout.layer_norm_eps or SigLipVisionConfig.layer_norm_eps}
    config = SigLipVisionConfig(
        num_channels=sizes.num_channels,
        embed_dim=sizes.embed_dim,
        image_size=infer_image_size(layout, sizes, content, named),
        patch_size=sizes.patch_size,
        num_attention_heads=num_heads,
        num_encoder_blocks=sizes.num_encoder_blocks,
        mlp_hidden_dim=sizes.mlp_hidden_dim,
        layer_norm_eps=first_value([*sections, defaults], "vit_ln_eps"),
        hidden_act=hidden_act,
        mean_pooling=infer_mean_pooling(sections, named),
        naflex=layout.naflex,
    )
    return Architecture(config, source)


def published_size(layout: Layout, sizes: StoredSizes) -> str | None:
    """Return the published size with these widths; None if there is none.

    The number of blocks may differ, since vision-language models drop the last ones. A NaFlex
    encoder must have the published positions, since other models store such a matrix, too.
    """
    if layout.naflex and (sizes.num_patches, sizes.patch_size) != (256, 16):
        return None
    for name, config in SIZES.items():
        widths = (config.embed_dim, config.mlp_hidden_dim)
        if widths == (sizes.embed_dim, sizes.mlp_hidden_dim):
            return name
    return None


def find_published(content: Json) -> SigLipVisionConfig | None:
    """Return the published model that a configuration names; None if it names none.

    Raises:
        ValueError: It names several different models.
    """
    configs = {}
    for text in texts_in(content):
        config = config_of_name(text)
        if config is not None:
            configs[text] = replace(config, pooling_head=False)
    if len(set(configs.values())) > 1:
        raise ValueError(
            f"configuration names several vision encoders ({', '.join(configs)}); pass config="
        )
    return next(iter(configs.values()), None)


def texts_in(content: object) -> Iterator[str]:
    """Yield all strings in a JSON value at any depth, without the keys of objects."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from texts_in(value)
    elif isinstance(content, list):
        for value in content:
            yield from texts_in(value)


def vision_sections(content: Json) -> list[Json]:
    """Return the sections where timm, open_clip, Janus, nanoVLM and others describe the encoder."""
    paths = (
        *BUILT_FROM,
        ("config", "vision"),
        ("vision_config", "params"),
        ("pretrained_cfg",),
        (),
    )
    sections = []
    for path in paths:
        section = section_at(content, path)
        if section is not None:
            sections.append(section)
    return sections


def first_value(sections: list[Json], *keys: str) -> Any:  # noqa: ANN401 (a value of JSON)
    """Return the first value of any of these keys, section by section; None if there is none."""
    for section in sections:
        for key in keys:
            if section.get(key) is not None:
                return section[key]
    return None


def infer_heads(
    sizes: StoredSizes, sections: list[Json], published: SigLipVisionConfig | None
) -> Any:  # noqa: ANN401 (a value of JSON, which SigLipVisionConfig checks)
    """Return the number of attention heads; None if unknown."""
    num_heads = sizes.num_attention_heads or first_value(
        sections, "num_heads", "vit_n_heads", "enc_n_heads"
    )
    if num_heads is None and published is not None and published.embed_dim == sizes.embed_dim:
        return published.num_attention_heads
    return num_heads


def infer_activation(
    layout: Layout, sections: list[Json], published: SigLipVisionConfig | None
) -> str | None:
    """Return `hidden_act`; None if unknown."""
    act = first_value(sections, "act_layer")
    if act is not None:
        return "gelu_pytorch_tanh" if act == "gelu_tanh" else str(act)
    if layout.hidden_act is not None:
        return layout.hidden_act
    return published.hidden_act if published is not None else None


def infer_mean_pooling(sections: list[Json], published: SigLipVisionConfig | None) -> bool:
    """Return whether the model pools by the mean of its tokens."""
    pool = first_value(sections, "global_pool", "timm_pool")
    if pool is not None:
        return bool(pool == "avg")
    return published is not None and published.mean_pooling


def infer_image_size(
    layout: Layout, sizes: StoredSizes, content: Json, named: SigLipVisionConfig | None
) -> int:
    """Return the image size in pixels: the first known size with the stored number of patches.

    Raises:
        ValueError: The model is built for images that are not square, or that have another number
            of patches.
    """
    grid_size = math.isqrt(sizes.num_patches)
    if layout.naflex:
        return grid_size * sizes.patch_size
    for path in BUILT_FROM:
        section = section_at(content, path) or {}
        for image_size in image_sizes([section]):
            if image_size // sizes.patch_size != grid_size:
                raise ValueError(
                    f"{'.'.join(path)} has images of {image_size} pixels, but the weights have "
                    f"{grid_size} x {grid_size} positions of patches of {sizes.patch_size} pixels; "
                    "to resize the positions, correct the image size and pass interpolation="
                )
    candidates = [*image_sizes(vision_sections(content))]
    if named is not None:
        candidates.append(named.image_size)
    if layout.image_size is not None:
        candidates.append(layout.image_size)
    candidates += published_image_sizes(sizes)
    for image_size in candidates:
        if image_size // sizes.patch_size == grid_size:
            return image_size
    return grid_size * sizes.patch_size


def image_sizes(sections: list[Json]) -> Iterator[int]:
    """Yield the image sizes in a configuration.

    Raises:
        ValueError: An image is not square.
    """
    for section in sections:
        for key in IMAGE_SIZE_KEYS:
            size = section.get(key)
            if isinstance(size, list) and all(is_int(side) for side in size[-2:]):
                if len(set(size[-2:])) > 1:
                    raise ValueError(f"{key} must be square, got {size}")
                size = size[-1] if size else None
            if is_int(size):
                yield size


def published_image_sizes(sizes: StoredSizes) -> Iterator[int]:
    """Yield the image sizes of published models of this shape.

    They need not be multiples of the patch size: 27 x 27 patches of 14 pixels are from 384.
    """
    for published in PUBLISHED:
        config = published.config
        shape = (config.embed_dim, config.patch_size, config.num_patches)
        if shape == (sizes.embed_dim, sizes.patch_size, sizes.num_patches):
            yield config.image_size

"""The published SigLIP towers, and how files that have no transformers `config.json` tell which one they hold.

Sources: the Hub repositories' `config.json`; big_vision `models/vit.py`; timm 1.0.31
    `models/vision_transformer.py` and
`models/naflexvit.py`; keras-hub `siglip_presets.py` for the counts of parameters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from siglip_port.checkpoint.hf_config import refuse_other_models
from siglip_port.checkpoint.layouts import Layout
from siglip_port.checkpoint.preprocessor_config import RESAMPLE as _RESAMPLE
from siglip_port.config import SigLipVisionConfig

_SIZES: dict[str, dict[str, Any]] = {
    "base": {
        "embed_dim": 768,
        "num_encoder_blocks": 12,
        "num_attention_heads": 12,
        "mlp_hidden_dim": 3072,
    },
    "large": {
        "embed_dim": 1024,
        "num_encoder_blocks": 24,
        "num_attention_heads": 16,
        "mlp_hidden_dim": 4096,
    },
    "so400m": {
        "embed_dim": 1152,
        "num_encoder_blocks": 27,
        "num_attention_heads": 16,
        "mlp_hidden_dim": 4304,
    },
    "giant-opt": {
        "embed_dim": 1536,
        "num_encoder_blocks": 40,
        "num_attention_heads": 16,
        "mlp_hidden_dim": 6144,
    },
}


@dataclass(frozen=True)
class Published:
    """A published checkpoint.

    Attributes:
        repo: its id on the Hub.
        config: of its vision tower.
        vision_parameters: of the tower, the pooling head included.
        total_parameters: of the whole model, the text tower included.
        resample: PIL's number of the filter that its image processor resizes with: 2 bilinear, 3
            bicubic.
    """

    repo: str
    config: SigLipVisionConfig
    vision_parameters: int
    total_parameters: int
    resample: int

    @property
    def size(self) -> str:
        """Which of the four sizes it is: base, large, so400m or giant-opt."""
        return next(
            name for name, sizes in _SIZES.items() if sizes["embed_dim"] == self.config.embed_dim
        )

    @property
    def vision_bytes(self) -> int:
        """Size of the vision tower in the file, which is float32 in all of them."""
        return 4 * self.vision_parameters


def _published(repo: str, vision_parameters: int, total_parameters: int) -> Published:
    name = re.search(r"(base|large|so400m|giant-opt)-patch(\d+)-(\d+|naflex)", repo)
    size, patch, image = (
        name.groups() if name else ("so400m", "14", repo.rsplit("-")[-1])
    )  # medsiglip-448
    naflex = image == "naflex"
    config = SigLipVisionConfig(
        **_SIZES[size],
        patch_size=int(patch),
        image_size=256 if naflex else int(image),
        pooling_head=True,
        naflex=naflex,
    )
    return Published(
        repo, config, vision_parameters, total_parameters, 2 if "siglip2" in repo else 3
    )


# fmt: off
PUBLISHED = tuple(_published(*row) for row in (
    # repository                                      vision tower      whole model
    ("google/siglip-base-patch16-224",                  92_884_224,     203_155_970),
    ("google/siglip-base-patch16-256",                  92_930_304,     203_202_050),
    ("google/siglip-base-patch16-256-multilingual",     92_930_304,     370_626_050),
    ("google/siglip-base-patch16-384",                  93_176_064,     203_447_810),
    ("google/siglip-base-patch16-512",                  93_520_128,     203_791_874),
    ("google/siglip-large-patch16-256",                315_956_224,     652_150_786),
    ("google/siglip-large-patch16-384",                316_283_904,     652_478_466),
    ("google/siglip-so400m-patch14-224",               427_680_704,     877_360_306),
    ("google/siglip-so400m-patch14-384",               428_225_600,     877_960_498),
    ("google/siglip-so400m-patch16-256-i18n",          427_888_064,   1_128_758_962),
    ("google/siglip2-base-patch16-224",                 92_884_224,     375_187_970),
    ("google/siglip2-base-patch16-256",                 92_930_304,     375_234_050),
    ("google/siglip2-base-patch32-256",                 94_552_320,     376_856_066),
    ("google/siglip2-base-patch16-384",                 93_176_064,     375_479_810),
    ("google/siglip2-base-patch16-512",                 93_520_128,     375_823_874),
    ("google/siglip2-large-patch16-256",               315_956_224,     881_526_786),
    ("google/siglip2-large-patch16-384",               316_283_904,     881_854_466),
    ("google/siglip2-large-patch16-512",               316_742_656,     882_313_218),
    ("google/siglip2-so400m-patch14-224",              427_680_704,   1_135_463_602),
    ("google/siglip2-so400m-patch14-384",              428_225_600,   1_136_008_498),
    ("google/siglip2-so400m-patch16-256",              427_888_064,   1_135_670_962),
    ("google/siglip2-so400m-patch16-384",              428_256_704,   1_136_039_602),
    ("google/siglip2-so400m-patch16-512",              428_772_800,   1_136_555_698),
    ("google/siglip2-giant-opt-patch16-256",         1_163_168_256,   1_871_393_906),
    ("google/siglip2-giant-opt-patch16-384",         1_163_659_776,   1_871_885_426),
    ("google/siglip2-base-patch16-naflex",              92_930_304,     375_234_050),
    ("google/siglip2-so400m-patch16-naflex",           427_888_064,   1_135_670_962),
    ("google/medsiglip-448",                           428_565_440,     878_300_338),
))
"""The published checkpoints: 27 named google/siglip*, and medsiglip."""
# fmt: on

_TIMM = re.compile(
    r"(?:vit|naflexvit)_(base|large|so400m|giantopt)_patch(\d+)_siglip(_gap)?(?:_(\d+))?(?:\.\w+)?"
)
_JANUS = re.compile(r"siglip_(base|large|so400m)_patch(\d+)_(\d+)")
_PRISMATIC = re.compile(r"(?:dino)?siglip-vit-(so400m|so|b16)(?:-(\d+)px)?")


def named(name: str) -> SigLipVisionConfig | None:
    """Recognises the name of a published tower.

    Of a Hub repository, of timm, or of the code of Janus or Prismatic.

    timm builds some of its SigLIP towers with the exact GELU, though all were trained with the tanh
    form; the name decides. Janus, whose code is a copy of timm's, and Prismatic, which takes
    timm's, have the exact form too.

    Returns:
        The architecture, or None where the name is none of these.
    """
    for published in PUBLISHED:
        if name in (published.repo, published.repo.split("/")[1]):
            return published.config
    if match := _TIMM.fullmatch(name):
        size, patch, gap, image = match.groups()
        naflex = name.startswith("naflex")
        tanh = naflex or size == "giantopt" or (size, patch) in (("base", "32"), ("so400m", "16"))
        return SigLipVisionConfig(
            **_SIZES[size.replace("giantopt", "giant-opt")],
            patch_size=int(patch),
            image_size=int(image or 256),
            hidden_act="gelu_pytorch_tanh" if tanh or (size, image) == ("large", "512") else "gelu",
            mean_pooling=bool(gap),
            naflex=naflex,
        )
    if match := _JANUS.fullmatch(name):
        size, patch, image = match.groups()
        return SigLipVisionConfig(
            **_SIZES[size], patch_size=int(patch), image_size=int(image), hidden_act="gelu"
        )
    if match := _PRISMATIC.fullmatch(name):
        size, patch = ("base", 16) if match[1] == "b16" else ("so400m", 14)
        return SigLipVisionConfig(
            **_SIZES[size], patch_size=patch, image_size=int(match[2] or 224), hidden_act="gelu"
        )
    return None


def describe(
    layout: Layout, sizes: Mapping[str, int], contents: Mapping[str, Any]
) -> SigLipVisionConfig:
    """Works out the architecture of a tower whose files have no configuration of transformers' kind.

    What the shapes tell is taken from them. The number of heads, the activation, the epsilon and
    the size of a picture in pixels are not in the shapes: they are taken from what the
    configuration says, from the name of a published tower that it mentions, and from what the
    layout implies, in this order.

    Args:
        layout: of the weights.
        sizes: what their shapes tell, as `Layout.sizes` returns it.
        contents: of the configuration file; empty where there is none.

    Raises:
        ValueError: something remains unknown, or several towers are mentioned.
    """
    refuse_other_models(contents)
    names = {
        v: replace(found, pooling_head=False) for v in _strings(contents) if (found := named(v))
    }
    if len(set(names.values())) > 1:
        raise ValueError(
            f"its configuration names several towers ({', '.join(names)}); pass config="
        )
    known = next(iter(names.values()), None)
    told = _told(contents)

    heads = sizes.get("num_attention_heads") or _first(told, "num_heads", "vit_n_heads")
    if heads is None and known is not None and known.embed_dim == sizes["embed_dim"]:
        heads = known.num_attention_heads
    implied = {
        "act_layer": layout.hidden_act or (known.hidden_act if known else None),
        "vit_ln_eps": layout.layer_norm_eps or SigLipVisionConfig.layer_norm_eps,
    }
    act = _first([*told, implied], "act_layer")
    unknown = [
        what
        for what, value in (("the number of heads", heads), ("the activation", act))
        if value is None
    ]
    if unknown:
        raise ValueError(
            f"neither its configuration nor its shapes tell {' and '.join(unknown)}; put the "
            "checkpoint's own "
            "configuration beside the weights, or pass config=SigLipVisionConfig(...)"
        )
    grid, patch = math.isqrt(sizes["num_patches"]), sizes["patch_size"]
    if grid**2 != sizes["num_patches"]:
        raise ValueError(f"its {sizes['num_patches']} positions form no square grid")
    sides = [*_pixels(told), *((known.image_size,) if known else ()), *_by_shape(sizes)]
    pool = _first(told, "global_pool", "timm_pool")
    return SigLipVisionConfig(
        num_channels=sizes["num_channels"],
        embed_dim=sizes["embed_dim"],
        image_size=next(
            (s for s in sides if s // patch == grid and not layout.naflex), grid * patch
        ),
        patch_size=patch,
        num_attention_heads=heads,
        num_encoder_blocks=sizes["num_encoder_blocks"],
        mlp_hidden_dim=sizes["mlp_hidden_dim"],
        layer_norm_eps=_first([*told, implied], "vit_ln_eps"),
        hidden_act="gelu_pytorch_tanh" if act == "gelu_tanh" else str(act),
        mean_pooling=bool(known and known.mean_pooling) if pool is None else pool == "avg",
        naflex=layout.naflex,
    )


def timm_config(config: SigLipVisionConfig, processor: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of a tower in timm's words.

    A published architecture, and all in which this one may differ.

    Args:
        config: of the tower.
        processor: the contents of its `preprocessor_config.json`.

    Raises:
        ValueError: the tower has another epsilon than 1e-6, which timm fixes.
    """
    if config.layer_norm_eps != SigLipVisionConfig.layer_norm_eps:
        raise ValueError(
            f"timm's SigLIP towers have layer_norm_eps 1e-6, this one has {config.layer_norm_eps}"
        )
    pool = "map" if config.pooling_head else "avg" if config.mean_pooling else ""
    size, width = config.image_size, config.embed_dim
    sizes: dict[str, Any] = (
        {"pos_embed_grid_size": [config.grid_size] * 2} if config.naflex else {"img_size": size}
    )
    model_args = {
        **sizes,
        "patch_size": config.patch_size,
        "in_chans": config.num_channels,
        "embed_dim": width,
        "depth": config.num_encoder_blocks,
        "num_heads": config.num_attention_heads,
        # timm takes int(width * ratio), which must not fall below the number meant
        "mlp_ratio": config.mlp_hidden_dim / width
        if int(width * (config.mlp_hidden_dim / width)) == config.mlp_hidden_dim
        else (config.mlp_hidden_dim + 0.5) / width,
        "act_layer": "gelu_tanh" if config.hidden_act == "gelu_pytorch_tanh" else "gelu",
        "global_pool": pool,
        "fc_norm": False,
    }
    return {
        "architecture": "naflexvit_base_patch16_siglip"
        if config.naflex
        else "vit_base_patch16_siglip_224",
        "num_classes": 0,
        "num_features": width,
        "global_pool": pool,
        "model_args": model_args,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [config.num_channels, size, size],
            "fixed_input_size": not config.naflex,
            "interpolation": next(
                (name for name, n in _RESAMPLE.items() if n == processor.get("resample")), "bicubic"
            ),
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": processor.get("image_mean"),
            "std": processor.get("image_std"),
            "num_classes": 0,
            "first_conv": "embeds.proj" if config.naflex else "patch_embed.proj",
            "classifier": "head",
        },
    }


def _by_shape(sizes: Mapping[str, int]) -> Iterator[int]:
    """The size of a picture in the published towers of this shape.

    That of 27 x 27 patches of 14 is 384, not 378.
    """
    for published in PUBLISHED:
        if all(
            getattr(published.config, name) == sizes[name]
            for name in ("embed_dim", "patch_size", "num_patches")
        ):
            yield published.config.image_size


def _strings(content: object) -> Iterator[str]:
    """All texts in a piece of JSON, however deep."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, (Mapping, list)):
        for value in content.values() if isinstance(content, Mapping) else content:
            yield from _strings(value)


def _told(contents: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The places in which timm, open_clip, Janus, nanoVLM and others write what is true of the vision tower."""
    paths = (
        ("model_args",),
        ("model_cfg", "vision_cfg"),
        ("vision_config", "params"),
        ("pretrained_cfg",),
        (),
    )
    found = []
    for path in paths:
        place: object = contents
        for key in path:
            place = place.get(key) if isinstance(place, Mapping) else None
        found += [place] if isinstance(place, Mapping) else []
    return found


def _pixels(told: list[Mapping[str, Any]]) -> Iterator[int]:
    """Sizes of a picture; of a list, the last, which is the width."""
    for place in told:
        for key in ("img_size", "image_size", "vit_img_size", "input_size"):
            value = place.get(key)
            size = value[-1] if isinstance(value, list) and value else value
            if isinstance(size, int) and not isinstance(size, bool):
                yield size


def _first(told: list[Mapping[str, Any]], *keys: str) -> Any:  # noqa: ANN401 (a value of JSON)
    return next((place[key] for place in told for key in keys if place.get(key) is not None), None)

"""The published SigLIP checkpoints, and the names of their vision encoders in other libraries.

Sources: the Hub repositories' `config.json`; timm 1.0.31 `models/vision_transformer.py` and
`models/naflexvit.py`; keras-hub `siglip_presets.py` for the counts of parameters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from siglip_port.config import SigLipVisionConfig

SIZES = {
    "base": SigLipVisionConfig(
        embed_dim=768, num_encoder_blocks=12, num_attention_heads=12, mlp_hidden_dim=3072
    ),
    "large": SigLipVisionConfig(
        embed_dim=1024, num_encoder_blocks=24, num_attention_heads=16, mlp_hidden_dim=4096
    ),
    "so400m": SigLipVisionConfig(
        embed_dim=1152, num_encoder_blocks=27, num_attention_heads=16, mlp_hidden_dim=4304
    ),
    "giant-opt": SigLipVisionConfig(
        embed_dim=1536, num_encoder_blocks=40, num_attention_heads=16, mlp_hidden_dim=6144
    ),
}
"""Architectures of the four sizes, without image and patch size."""


@dataclass(frozen=True)
class Published:
    """A published checkpoint.

    Attributes:
        repo: Hub id.
        config: Architecture of the vision encoder.
        vision_parameters: Parameter count of the vision encoder, with the pooling head.
        total_parameters: Parameter count of the whole model, with the text encoder.
        resample: PIL's filter number of the image processor: 2 bilinear, 3 bicubic.
    """

    repo: str
    config: SigLipVisionConfig
    vision_parameters: int
    total_parameters: int
    resample: int

    @property
    def size(self) -> str:
        """Size of the model: base, large, so400m or giant-opt."""
        names = {config.embed_dim: name for name, config in SIZES.items()}
        return names[self.config.embed_dim]

    @property
    def vision_bytes(self) -> int:
        """Size of the vision encoder in bytes; all published files are float32."""
        return 4 * self.vision_parameters


def from_name(repo: str, vision_parameters: int, total_parameters: int) -> Published:
    """Derive the entry of a checkpoint from its Hub id and parameter counts."""
    match = re.search(r"(base|large|so400m|giant-opt)-patch(\d+)-(\d+|naflex)", repo)
    size, patch_size, image_size = match.groups() if match else ("so400m", "14", "448")  # medsiglip
    naflex = image_size == "naflex"
    config = replace(
        SIZES[size],
        patch_size=int(patch_size),
        image_size=256 if naflex else int(image_size),
        pooling_head=True,
        naflex=naflex,
    )
    resample = 2 if "siglip2" in repo else 3
    return Published(repo, config, vision_parameters, total_parameters, resample)


# fmt: off
PUBLISHED = (
    #         repository                                  vision encoder     whole model
    from_name("google/siglip-base-patch16-224",              92_884_224,     203_155_970),
    from_name("google/siglip-base-patch16-256",              92_930_304,     203_202_050),
    from_name("google/siglip-base-patch16-256-multilingual", 92_930_304,     370_626_050),
    from_name("google/siglip-base-patch16-384",              93_176_064,     203_447_810),
    from_name("google/siglip-base-patch16-512",              93_520_128,     203_791_874),
    from_name("google/siglip-large-patch16-256",            315_956_224,     652_150_786),
    from_name("google/siglip-large-patch16-384",            316_283_904,     652_478_466),
    from_name("google/siglip-so400m-patch14-224",           427_680_704,     877_360_306),
    from_name("google/siglip-so400m-patch14-384",           428_225_600,     877_960_498),
    from_name("google/siglip-so400m-patch16-256-i18n",      427_888_064,   1_128_758_962),
    from_name("google/siglip2-base-patch16-224",             92_884_224,     375_187_970),
    from_name("google/siglip2-base-patch16-256",             92_930_304,     375_234_050),
    from_name("google/siglip2-base-patch32-256",             94_552_320,     376_856_066),
    from_name("google/siglip2-base-patch16-384",             93_176_064,     375_479_810),
    from_name("google/siglip2-base-patch16-512",             93_520_128,     375_823_874),
    from_name("google/siglip2-large-patch16-256",           315_956_224,     881_526_786),
    from_name("google/siglip2-large-patch16-384",           316_283_904,     881_854_466),
    from_name("google/siglip2-large-patch16-512",           316_742_656,     882_313_218),
    from_name("google/siglip2-so400m-patch14-224",          427_680_704,   1_135_463_602),
    from_name("google/siglip2-so400m-patch14-384",          428_225_600,   1_136_008_498),
    from_name("google/siglip2-so400m-patch16-256",          427_888_064,   1_135_670_962),
    from_name("google/siglip2-so400m-patch16-384",          428_256_704,   1_136_039_602),
    from_name("google/siglip2-so400m-patch16-512",          428_772_800,   1_136_555_698),
    from_name("google/siglip2-giant-opt-patch16-256",     1_163_168_256,   1_871_393_906),
    from_name("google/siglip2-giant-opt-patch16-384",     1_163_659_776,   1_871_885_426),
    from_name("google/siglip2-base-patch16-naflex",          92_930_304,     375_234_050),
    from_name("google/siglip2-so400m-patch16-naflex",       427_888_064,   1_135_670_962),
    from_name("google/medsiglip-448",                       428_565_440,     878_300_338),
)
"""The published checkpoints: 27 named google/siglip* and medsiglip."""
# fmt: on

TIMM_NAME = re.compile(
    r"(?:vit|naflexvit)_(base|large|so400m|giantopt)_patch(\d+)_siglip(_gap)?(?:_(\d+))?(?:\.\w+)?"
)
JANUS_NAME = re.compile(r"siglip_(base|large|so400m)_patch(\d+)_(\d+)")
PRISMATIC_NAME = re.compile(r"(?:dino)?siglip-vit-(so400m|so|b16)(?:-(\d+)px)?")


def config_of_name(name: str) -> SigLipVisionConfig | None:
    """Return the architecture of a published vision encoder by name.

    Accepts Hub ids, local paths that end in their last part, and the names in timm, Janus and
    Prismatic. Janus (a copy of timm's code) and Prismatic (which uses timm) have the exact GELU.

    Returns:
        The architecture; None if the name is unknown.
    """
    path = name.replace("\\", "/").rstrip("/")
    is_local = path.startswith((".", "~", "/")) or path.count("/") > 1
    for published in PUBLISHED:
        last_part = published.repo.split("/")[1]
        if path in (published.repo, last_part) or (is_local and path.endswith(f"/{last_part}")):
            return published.config
    timm = TIMM_NAME.fullmatch(name)
    if timm:
        return config_of_timm(name, timm)
    janus = JANUS_NAME.fullmatch(name)
    if janus:
        return replace(
            SIZES[janus[1]],
            patch_size=int(janus[2]),
            image_size=int(janus[3]),
            hidden_act="gelu",
        )
    prismatic = PRISMATIC_NAME.fullmatch(name)
    if prismatic:
        is_base = prismatic[1] == "b16"
        return replace(
            SIZES["base" if is_base else "so400m"],
            patch_size=16 if is_base else 14,
            image_size=int(prismatic[2] or 224),
            hidden_act="gelu",
        )
    return None


def config_of_timm(name: str, match: re.Match[str]) -> SigLipVisionConfig:
    """Return the architecture that timm builds for a model name.

    timm builds some SigLIP models with the exact GELU, although all were trained with the tanh
    approximation; which ones depends on the name.
    """
    size, patch_size, gap, image_size = match.groups()
    naflex = name.startswith("naflex")
    has_tanh = (
        naflex
        or size == "giantopt"
        or (size, patch_size) in (("base", "32"), ("so400m", "16"))
        or (size, image_size) == ("large", "512")
    )
    return replace(
        SIZES[size.replace("giantopt", "giant-opt")],
        patch_size=int(patch_size),
        image_size=int(image_size or 256),
        hidden_act="gelu_pytorch_tanh" if has_tanh else "gelu",
        mean_pooling=bool(gap),
        naflex=naflex,
    )

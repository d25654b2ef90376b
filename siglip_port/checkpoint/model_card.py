"""`README.md` of a saved encoder: the model card of the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from siglip_port.config import SigLipVisionConfig
from siglip_port.model import SigLipVisionModel

CARD = "README.md"

MARKER = "<!-- Written by siglip-port; remove this line to keep the file in later saves. -->"
"""Line of every card. A `README.md` without it is the user's and is never replaced."""

MAX_CARD_BYTES = 2**20

LICENSE_KEYS = ("license", "license_name", "license_link")

LOAD_IN_TRANSFORMERS = (
    "from transformers import AutoImageProcessor, AutoModel\n"
    "\n"
    'processor = AutoImageProcessor.from_pretrained(folder, backend="pil")\n'
    "model = AutoModel.from_pretrained(folder).eval()\n"
    'output = model(**processor(images, return_tensors="pt"))\n'
)

LOAD_IN_SENTENCE_TRANSFORMERS = """\
from sentence_transformers import SentenceTransformer

embeddings = SentenceTransformer(folder).encode(images)
"""

LOAD_IN_TIMM = """\
import timm

model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
"""

LOAD_IN_SIGLIP_PORT = """\
from siglip_port import SigLipVisionModel

model = SigLipVisionModel.from_hf(folder)
"""


def model_card(model: SigLipVisionModel, library: str) -> str:
    """Return the model card of a model.

    Args:
        model: Saved model. The license is that of the model card beside the weights it was loaded
            from.
        library: Library that the files are for, `transformers` or `timm`.
    """
    programs = [LOAD_IN_TIMM]
    if library == "transformers":
        programs = [LOAD_IN_TRANSFORMERS]
        if has_sentence_embedding(model.config):
            programs.append(LOAD_IN_SENTENCE_TRANSFORMERS)
    programs.append(LOAD_IN_SIGLIP_PORT)
    lines = [
        *front_matter(model, library),
        MARKER,
        "",
        "# SigLIP vision encoder",
        "",
        f"{describe_source(model)} {describe_architecture(model)}",
        "",
        "## Load",
        "",
        "`folder` is the folder of this file or its Hub id, `images` a list of PIL images.",
    ]
    text = "\n".join(lines) + "\n"
    for program in programs:
        text += f"\n```python\n{program}```\n"
    return text


def has_sentence_embedding(config: SigLipVisionConfig) -> bool:
    """Return whether sentence-transformers can compute the model's embedding."""
    return config.pooling_head or (config.mean_pooling and not config.naflex)


def front_matter(model: SigLipVisionModel, library: str) -> list[str]:
    """Return the YAML lines of a card. License and base model are omitted if they are unknown."""
    lines = ["---", *license_lines(model)]
    origin = origin_of(model)
    if origin is not None:
        lines.append(f"base_model: {origin[0]}")
    tags = ["siglip", "vision"]
    if library == "transformers" and has_sentence_embedding(model.config):
        tags.append("sentence-transformers")
    lines += [f"library_name: {library}", "pipeline_tag: image-feature-extraction", "tags:"]
    return [*lines, *(f"- {tag}" for tag in tags), "---", ""]


def origin_of(model: SigLipVisionModel) -> tuple[str, str] | None:
    """Return Hub id and commit of the weights that the model was loaded from; None if unknown."""
    if model.provenance is None or model.provenance.origin is None:
        return None
    name, _, commit = model.provenance.origin.partition("@")
    return name, commit


def describe_source(model: SigLipVisionModel) -> str:
    """Describe where the weights are from. Paths of this machine are not recorded."""
    origin = origin_of(model)
    if origin is None:
        return "The origin of the weights is not recorded."
    name, commit = origin
    return f"Loaded from `{name}` at commit `{commit}`; later training is not recorded."


def describe_architecture(model: SigLipVisionModel) -> str:
    """Describe sizes, pooling and dtype of a model."""
    config = model.config
    size = f"images of {config.image_size} x {config.image_size} pixels"
    if config.naflex:
        size = f"images of any aspect ratio (NaFlex), {config.num_patches} positions"
    pooling = "no pooling"
    if config.pooling_head:
        pooling = "an attention pooling head"
    elif config.mean_pooling:
        pooling = "mean pooling"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    return (
        f"{config.num_encoder_blocks} blocks of width {config.embed_dim}, patches of "
        f"{config.patch_size} pixels, {size}, {pooling}; {parameters:,} parameters in {dtype}."
    )


def license_lines(model: SigLipVisionModel) -> list[str]:
    """Return the license in the model card beside the loaded weights; nothing if it is unknown."""
    if model.provenance is None:
        return []
    for file in model.provenance.files:
        lines = read_license(file.parent / CARD)
        if lines:
            return lines
    return []


def read_license(path: Path) -> list[str]:
    """Return the license lines of a model card's front matter; nothing if there are none."""
    if not path.is_file() or path.stat().st_size > MAX_CARD_BYTES:
        return []
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if front is None:
        return []
    lines = []
    for key in LICENSE_KEYS:
        value = re.search(rf"^{key}: *([\w.:/ -]+)$", front[1], re.MULTILINE | re.ASCII)
        if value is not None:
            lines.append(f"{key}: {value[1].strip()}")
    return lines


def is_other_card(path: Path) -> bool:
    """Return whether a path is taken by something else than a card of this package."""
    if not os.path.lexists(path):
        return False
    if not path.is_file() or path.stat().st_size > MAX_CARD_BYTES:
        return True
    return MARKER.encode() not in path.read_bytes()

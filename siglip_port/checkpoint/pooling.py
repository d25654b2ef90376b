"""How a checkpoint pools, and the projections that it applies to the pooled embedding.

SigLIP has no projection. A model that has one (open_clip's `timm_proj`, big_vision's `num_classes`,
a wrapper in the style of CLIP, sentence-transformers' `Dense`) has other embeddings than its
encoder, so such a checkpoint is loaded without pooling.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from siglip_port.checkpoint.errors import CheckpointError, HubUnreachableError
from siglip_port.checkpoint.formats import parse_json
from siglip_port.checkpoint.key_rules import Layout
from siglip_port.checkpoint.layouts import CLASSIFIER
from siglip_port.checkpoint.source import Source
from siglip_port.config import SigLipVisionConfig
from siglip_port.validation import NO_POOLING

PROJECTION = "projection behind the pooling"
LANGUAGE_MODEL = "language model"
MODULES = "modules.json"
MAX_NAMES = 2

OPEN_CLIP_TRUNK = "trunk."
"""End of open_clip's prefix; its projection is `head.` beside the trunk."""

LAYERS = r"(?:[./](?:\d+|proj|linear|dense|mlp|fc\d?|norm|layers?|net|out))*"
PARAMETERS = r"(?:[./](?:weight|bias|kernel|scale))?"

PROJECTION_NAME = re.compile(
    rf"(?:.+[./])?(?:visual|vision|image|img)_(?:\w+_)?(?:proj|projection|head){LAYERS}{PARAMETERS}"
)
"""Projections of image embeddings beside the encoder, at any level."""

SIBLING_NAME = re.compile(
    rf"(?:proj|projection|projection_head|proj_head|head|fc|dense){LAYERS}{PARAMETERS}"
)
"""Projections directly beside the encoder, or beside a module that contains it."""

BEHIND_POOLING = ("Dense", "LayerNorm")
"""Modules of sentence-transformers that change the pooled embedding (Normalize only scales it)."""


@dataclass(frozen=True)
class Pooling:
    """The pooling of a checkpoint.

    Attributes:
        has_head: Whether the file has an attention pooling head.
        projection: Names of the tensors or folders of a projection behind the pooling.
        classifier: Names of the tensors of an image classifier, which timm applies to the
            embedding.
        requested: Value of `pooling_head=`.
    """

    has_head: bool
    projection: tuple[str, ...]
    classifier: tuple[str, ...]
    requested: bool | None

    def describe(self, config: SigLipVisionConfig) -> str:
        """Return how the loaded model pools, and why."""
        behind = ""
        if self.projection:
            behind = f", without the projection behind it ({shorten(self.projection)})"
        elif self.classifier:
            behind = f", without the image classifier behind it ({shorten(self.classifier)})"
        if config.pooling_head:
            return f"attention pooling head{behind}"
        if config.mean_pooling and self.has_head:
            return "mean of the tokens, of a classifier; pooling_head=True loads its unused head"
        if config.mean_pooling:
            return f"mean of the tokens{behind}"
        if self.projection and self.requested is None:
            return f"{NO_POOLING}{self._refusal()}"
        return "none"

    def _refusal(self) -> str:
        """Return why the embedding of the checkpoint is not available, and what to do."""
        names = shorten(self.projection)
        if self.has_head:
            return (
                f"the checkpoint has a projection behind its pooling head ({names}), which is not "
                "applied; pass pooling_head=True to load the head without it"
            )
        return (
            f"the checkpoint has a projection behind its pooling ({names}), which is not applied; "
            "pool the tokens yourself for the embedding before it"
        )


def shorten(names: Collection[str]) -> str:
    """Return the first names in order, and the number of others."""
    shown = sorted(names)[:MAX_NAMES]
    text = ", ".join(shown)
    if len(names) > len(shown):
        text += f" and {len(names) - len(shown)} more"
    return text


def find_projection(layout: Layout, prefix: str, names: Collection[str], pools: bool) -> list[str]:
    """Return the tensors of a projection behind the pooling.

    Args:
        layout: Layout of the encoder.
        prefix: Prefix of the encoder.
        names: Names of all stored tensors.
        pools: Whether the checkpoint pools, by a head or by the mean. If not, a projection is one
            of tokens, as in PaliGemma.
    """
    others = [name for name in names if not name.startswith(prefix)]
    projection = []
    for name in names:
        if name.startswith(prefix) and is_inner_projection(layout, prefix, name, pools):
            projection.append(name)
    if pools:
        projection += outer_projection(layout, prefix, others)
    return sorted(projection)


def is_inner_projection(layout: Layout, prefix: str, name: str, pools: bool) -> bool:
    """Return whether a tensor under the encoder's prefix belongs to a projection."""
    part = name.removeprefix(prefix)
    if not any(re.fullmatch(pattern, part) for pattern in layout.projections):
        return False
    reason = layout.reason_to_ignore(name, prefix)
    if reason is None:
        return True
    # open_clip gives timm's classifier as many classes as the embedding has dimensions.
    is_open_clip = prefix.endswith(OPEN_CLIP_TRUNK)
    return pools and (reason != CLASSIFIER or is_open_clip)


def outer_projection(layout: Layout, prefix: str, names: Iterable[str]) -> list[str]:
    """Return the tensors of a projection outside the encoder's prefix.

    In a model with a language model they project tokens, not the pooled embedding.
    """
    parents = parents_of(prefix)
    projection = []
    for name in names:
        if layout.reason_to_ignore(name, prefix) == LANGUAGE_MODEL:
            return []
        is_sibling = any(
            name.startswith(parent) and SIBLING_NAME.fullmatch(name.removeprefix(parent))
            for parent in parents
        )
        if is_sibling or PROJECTION_NAME.fullmatch(name):
            projection.append(name)
    return projection


def parents_of(prefix: str) -> list[str]:
    """Return the prefixes of the modules that contain the encoder: `a.b.c.` -> `a.b.`, `a.`, ``."""
    parents = []
    while prefix:
        prefix = re.sub(r"[^./]+[./]$", "", prefix)
        parents.append(prefix)
    return parents


def modules_behind_pooling(source: Source) -> list[str]:
    """Return the folders of sentence-transformers' modules that change the pooled embedding.

    Args:
        source: Source of the files. Offline, modules that are not cached are not detected.

    Raises:
        CheckpointError: The list of modules cannot be read.
    """
    try:
        path = source.get(MODULES)
    except HubUnreachableError:
        return []
    if path is None:
        return []
    try:
        modules = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); download it again") from error
    folders = []
    for module in modules if isinstance(modules, list) else []:
        if isinstance(module, dict) and str(module.get("type")).split(".")[-1] in BEHIND_POOLING:
            folders.append(str(module.get("path")))
    return folders

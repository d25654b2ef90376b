"""Recognition of a checkpoint's layout and prefix by tensor names and shapes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from siglip_port.checkpoint.diagnosis import Symptoms, diagnose
from siglip_port.checkpoint.errors import CheckpointError, MultipleEncodersError
from siglip_port.checkpoint.key_rules import Layout
from siglip_port.checkpoint.layouts import HUGGINGFACE, LAYOUTS, PREFIX
from siglip_port.checkpoint.source import subfolder_advice
from siglip_port.checkpoint.stored_names import canonical_name
from siglip_port.checkpoint.weight_files import WeightFiles

# Candidate prefixes of vision encoders; checking one may require downloading a header.
MAX_CANDIDATES = 100
MAX_GROUPS_SHOWN = 12


class Match(NamedTuple):
    """A vision encoder in a checkpoint.

    Attributes:
        layout: Layout of its tensors.
        prefix: Prefix of their names.
    """

    layout: Layout
    prefix: str

    @property
    def title(self) -> str:
        """Layout and prefix, for messages."""
        if not self.prefix:
            return f"{self.layout.title}, no prefix"
        return f"{self.layout.title}, prefix {self.prefix.rstrip('./')}"

    def has_shapes_of(self, other: Match) -> bool:
        """Return whether the shapes do not distinguish the layout from that of another match."""
        shapes = (self.layout.signature_keys, self.layout.square_dims)
        return shapes == (other.layout.signature_keys, other.layout.square_dims)


def recognize(files: WeightFiles, layout_name: str | None, prefix: str | None) -> Match:
    """Find the only vision encoder in a checkpoint.

    Args:
        files: Weights files.
        layout_name: Name of the layout; None for any.
        prefix: Prefix of the encoder's names; None for any.

    Raises:
        CheckpointError: There is no vision encoder.
        MultipleEncodersError: There are several.
        ValueError: The layout does not exist.
    """
    layouts = [layout for layout in LAYOUTS if layout.name == layout_name]
    if layout_name is None:
        layouts = recognizable_layouts()
    if not layouts:
        names = ", ".join(layout.name for layout in LAYOUTS)
        raise ValueError(f"layout must be one of {names}, got {layout_name!r}")
    if prefix is not None:
        prefix = with_separator(prefix, layout_name)
        if not files.duplicates:
            prefix = canonical_name(prefix)
    if layout_name is not None and prefix is not None:
        match = Match(layouts[0], prefix)
        check_patch_embedding(files, match)
        return match
    matches, refusals = find_matches(files, layouts, prefix)
    if not matches:
        raise CheckpointError(describe_no_match(files, layouts, prefix, refusals))
    if len(matches) > 1:
        choices = [f"layout={layout.name!r}, prefix={prefix!r}" for layout, prefix in matches]
        raise MultipleEncodersError(
            f"{files.source.title} contains several vision encoders, or one that matches several "
            f"layouts: {'; '.join(choices)}; pass layout= and prefix=",
            [*matches],
        )
    return matches[0]


def recognizable_layouts() -> list[Layout]:
    """Return the layouts that shapes determine, without those that a configuration selects."""
    return [layout for layout in LAYOUTS if not layout.model_types]


def model_types(content: Mapping[str, Any]) -> set[str]:
    """Return the `model_type` of a configuration and of its sections."""
    sections = [content, *(value for value in content.values() if isinstance(value, Mapping))]
    types = [section.get("model_type") for section in sections]
    return {kind for kind in types if isinstance(kind, str)}


def select_by_config(match: Match, naflex: bool, content: Mapping[str, Any]) -> Match:
    """Return the match with the layout that the configuration selects.

    Args:
        match: Layout by the shapes, and prefix.
        naflex: Whether the configuration describes a NaFlex model.
        content: Contents of the configuration file.
    """
    types = model_types(content)
    for layout in LAYOUTS:
        candidate = Match(layout, match.prefix)
        is_named = bool(types & set(layout.model_types))
        if is_named and layout.naflex == naflex and candidate.has_shapes_of(match):
            return candidate
    return match


def with_separator(prefix: str, layout_name: str | None) -> str:
    """Add the trailing separator that messages omit."""
    if not prefix or prefix[-1] in "./":
        return prefix
    if layout_name is not None and layout_name.startswith("big_vision"):
        return f"{prefix}/"
    return f"{prefix}."


def check_patch_embedding(files: WeightFiles, match: Match) -> None:
    """Raise CheckpointError if the requested layout does not allow the patch embedding's shape."""
    weight = files.tensor(match.prefix + match.layout.signature_keys[0])
    if weight is not None and not match.layout.fits(weight.shape):
        raise CheckpointError(
            f"{files.source.title}: patch embedding has shape {list(weight.shape)}, which layout "
            f"{match.layout.name!r} does not allow; omit layout="
        )


def find_matches(
    files: WeightFiles, layouts: Iterable[Layout], prefix: str | None = None
) -> tuple[list[Match], list[str]]:
    """Find all vision encoders in a checkpoint.

    Returns:
        The matches, and the reasons why others were refused.

    Raises:
        CheckpointError: There are too many candidates.
    """
    matches: list[Match] = []
    refusals: list[str] = []
    for layout in layouts:
        for candidate in candidate_prefixes(files, layout, prefix):
            match = Match(layout, candidate)
            if not is_plausible(files, match, matches):
                continue
            reasons = [
                reason for key, reason in layout.rejected_keys if candidate + key in files.file_of
            ]
            if reasons:
                refusals.append(f"{match.title}: has {reasons[0]}")
            else:
                matches.append(match)
    if not matches and not refusals and HUGGINGFACE in layouts:
        matches = find_damaged(files, prefix)
    return matches, refusals


def candidate_prefixes(files: WeightFiles, layout: Layout, prefix: str | None) -> list[str]:
    """Return the prefixes under which the signature keys of a layout occur."""
    prefixes = layout.prefixes(files.file_of)
    if prefix is not None:
        prefixes = [name for name in prefixes if name.rstrip("./") == prefix.rstrip("./")]
    if len(prefixes) > MAX_CANDIDATES:
        raise CheckpointError(
            f"{files.source.name} contains {len(prefixes)} vision encoders in layout "
            f"{layout.name!r}, limit is {MAX_CANDIDATES}; pass prefix="
        )
    return prefixes


def is_plausible(files: WeightFiles, match: Match, matches: list[Match]) -> bool:
    """Return whether the patch embedding fits the layout, or is unreadable under a new prefix."""
    weight = files.tensor(match.prefix + match.layout.signature_keys[0])
    if weight is not None:
        return match.layout.fits(weight.shape)
    # In a damaged file the shape is unknown, so the first layout with these names is used.
    return all(match.prefix != other.prefix for other in matches)


def find_damaged(files: WeightFiles, prefix: str | None) -> list[Match]:
    """Match a HuggingFace file that lacks its signature keys, at the most common prefixes.

    The error can then name the missing tensors.
    """
    matches = []
    for candidate in ("", PREFIX):
        mappings = HUGGINGFACE.mappings(1, HUGGINGFACE.rules(pooling_head=True), candidate)
        if prefix in (None, candidate) and mappings.keys() & files.file_of.keys():
            matches.append(Match(HUGGINGFACE, candidate))
    return matches


def describe_no_match(
    files: WeightFiles, layouts: list[Layout], prefix: str | None, refusals: list[str]
) -> str:
    """Return the message for a missing encoder: its cause, and the groups of tensor names."""
    message = f"{files.source.title} "
    cause = None
    names = [name for name in files.file_of if name.startswith(prefix or "")]
    if names or prefix is None:
        tensors = files.known_tensors()
        known = {name: tensors[name] for name in names if name in tensors}
        cause = diagnose(Symptoms(names, known, duplicates=files.duplicates))
    if cause is not None:
        message = f"{files.source.title}: {cause}; it "
    message += "contains no SigLIP vision encoder in "
    if len(layouts) == 1:
        message += f"layout {layouts[0].name}"
    else:
        message += f"a supported layout ({', '.join(layout.name for layout in layouts)})"
    if prefix is not None:
        message += f" with prefix {prefix!r}"
    groups = Counter(re.split(r"[./]", name)[0] for name in files.file_of)
    counts = [f"{group} ({count})" for group, count in groups.most_common(MAX_GROUPS_SHOWN)]
    message += f"; tensor names start with: {', '.join(counts) or 'nothing'}"
    message += "".join(f"; refused: {refusal}" for refusal in refusals)
    if len(layouts) == 1 or prefix is not None:
        message += "; omit layout= and prefix= to detect them"
    return message + subfolder_advice(files.source)

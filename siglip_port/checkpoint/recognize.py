"""Which layout a checkpoint is stored in, and behind which prefix, by its names and shapes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from siglip_port.checkpoint.errors import CheckpointError, MultipleEncodersError
from siglip_port.checkpoint.key_rules import Layout
from siglip_port.checkpoint.layouts import HUGGINGFACE, LAYOUTS, PREFIX
from siglip_port.checkpoint.weight_files import WeightFiles

# Places in a checkpoint whose names may mean a vision encoder; to look at one may mean to fetch a
# header.
MAX_CANDIDATES = 100
MAX_GROUPS_SHOWN = 12


class Match(NamedTuple):
    """A vision encoder in a file.

    Attributes:
        layout: how it is stored.
        prefix: what stands before its names.
    """

    layout: Layout
    prefix: str

    @property
    def title(self) -> str:
        """The layout and the prefix, for people."""
        if not self.prefix:
            return f"{self.layout.title}, no prefix"
        return f"{self.layout.title}, prefix {self.prefix.rstrip('./')}"


def recognize(files: WeightFiles, layout_name: str | None, prefix: str | None) -> Match:
    """Find the one layout and prefix whose rule the names and shapes meet.

    Args:
        files: the weights files.
        layout_name: of the layout; None for any.
        prefix: what stands before the names; None for any.

    Raises:
        CheckpointError: there is none.
        MultipleEncodersError: there are several.
        ValueError: there is no layout of this name.
    """
    layouts = [layout for layout in LAYOUTS if layout_name in (None, layout.name)]
    if not layouts:
        names = ", ".join(layout.name for layout in LAYOUTS)
        raise ValueError(f"layout must be None or one of {names}, got {layout_name!r}")
    if prefix is not None:
        prefix = with_separator(prefix, layout_name)
    if layout_name is not None and prefix is not None:
        match = Match(layouts[0], prefix)
        check_patch_embedding(files, match)
        return match
    matches, refusals = find_matches(files, layouts, prefix)
    if not matches:
        raise CheckpointError(describe_no_match(files, layouts, prefix, refusals))
    if len(matches) > 1:
        choices = [f"layout={layout.name!r}, prefix={place!r}" for layout, place in matches]
        raise MultipleEncodersError(
            f"{files.source.title} holds more than one vision encoder, or one that matches "
            f"several layouts: {'; '.join(choices)}; "
            "say which by layout= and prefix=",
            [*matches],
        )
    return matches[0]


def with_separator(prefix: str, layout_name: str | None) -> str:
    """Add the separator that messages leave out of a prefix."""
    if not prefix or prefix[-1] in "./":
        return prefix
    if layout_name is not None and layout_name.startswith("big_vision"):
        return f"{prefix}/"
    return f"{prefix}."


def check_patch_embedding(files: WeightFiles, match: Match) -> None:
    """Raise CheckpointError if the patch embedding cannot be of the layout that was named."""
    weight = files.tensor(match.prefix + match.layout.signature_keys[0])
    if weight is not None and not match.layout.fits(weight.shape):
        raise CheckpointError(
            f"{files.source.title}: the patch embedding has the shape "
            f"{list(weight.shape)}, which it cannot "
            f"have in the layout {match.layout.name!r}; leave layout= out"
        )


def find_matches(
    files: WeightFiles, layouts: Iterable[Layout], prefix: str | None = None
) -> tuple[list[Match], list[str]]:
    """Find all layouts and prefixes whose rule the names and shapes meet.

    Returns:
        The matches; and why others are refused, in words.

    Raises:
        CheckpointError: there are too many places to look at.
    """
    matches: list[Match] = []
    refusals: list[str] = []
    for layout in layouts:
        for place in candidate_prefixes(files, layout, prefix):
            match = Match(layout, place)
            if not is_plausible(files, match, matches):
                continue
            rejected = [why for key, why in layout.rejected_keys if place + key in files.file_of]
            if rejected:
                refusals.append(f"{place or 'no prefix'} ({layout.title}): it has {rejected[0]}")
            else:
                matches.append(match)
    if not matches and not refusals and HUGGINGFACE in layouts:
        matches = find_damaged(files, prefix)
    return matches, refusals


def candidate_prefixes(files: WeightFiles, layout: Layout, prefix: str | None) -> list[str]:
    """Find the prefixes behind which the signature keys of a layout stand."""
    prefixes = layout.prefixes(files.file_of)
    if prefix is not None:
        prefixes = [place for place in prefixes if place.rstrip("./") == prefix.rstrip("./")]
    if len(prefixes) > MAX_CANDIDATES:
        raise CheckpointError(
            f"{files.source.name} names {len(prefixes)} encoders in the layout "
            f"{layout.name!r}, more than the "
            f"{MAX_CANDIDATES} that are looked at; say which is meant by prefix="
        )
    return prefixes


def is_plausible(files: WeightFiles, match: Match, matches: list[Match]) -> bool:
    """Whether the patch embedding may be of this layout, after `matches` were found."""
    weight = files.tensor(match.prefix + match.layout.signature_keys[0])
    if weight is not None:
        return match.layout.fits(weight.shape)
    # A damaged file, whose shape cannot tell: the first that fits has to do.
    return all(match.prefix != other.prefix for other in matches)


def find_damaged(files: WeightFiles, prefix: str | None) -> list[Match]:
    """Find a damaged file that has lost what it is recognized by, in the commonest places.

    To say what is missing.
    """
    matches = []
    for place in ("", PREFIX):
        mappings = HUGGINGFACE.mappings(1, HUGGINGFACE.rules(pooling_head=True), place)
        if prefix in (None, place) and mappings.keys() & files.file_of.keys():
            matches.append(Match(HUGGINGFACE, place))
    return matches


def describe_no_match(
    files: WeightFiles, layouts: list[Layout], prefix: str | None, refusals: list[str]
) -> str:
    """Say that there is no vision encoder, and what there is."""
    names = ", ".join(layout.name for layout in layouts)
    message = f"{files.source.title} holds no SigLIP vision encoder in a layout that is known here "
    message += f"({names})"
    if prefix is not None:
        message += f" behind the prefix {prefix!r}"
    groups = Counter(re.split(r"[./]", name)[0] for name in files.file_of)
    counts = [f"{group} ({count})" for group, count in groups.most_common(MAX_GROUPS_SHOWN)]
    message += f"; its tensors begin with: {', '.join(counts)}"
    return message + "".join(f"; refused: {refusal}" for refusal in refusals)

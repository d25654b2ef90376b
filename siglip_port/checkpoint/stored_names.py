"""Canonical names of stored tensors: without the names of wrappers and of old releases.

Compilers and trainers insert a segment into the names of the modules that they wrap, and old
releases of big_vision and mlx name some modules differently. The key map has neither.

Sources: torch `_dynamo/eval_frame.py` and `distributed/fsdp`; flax `training/checkpoints.py`
(`convert_pre_linen`); big_vision `models/vit.py` (`fix_old_checkpoints`); mlx-embeddings
`models/siglip.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

WRAPPERS = (
    "_orig_mod",  # torch.compile
    "module",  # DataParallel, DistributedDataParallel, DeepSpeed, moving averages
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",  # Lightning Fabric
)
"""Segments that wrappers insert into names, at any level."""

FUSED_PROJECTION = re.compile(r"((?:.+\.)?head\.attention\.in_proj)\.(weight|bias)")
"""mlx's name of the fused projection of the pooling head: a module, with a dot."""

OLD_POSITIONS = re.compile(r"((?:.+/)?)Transformer/(?:posembed_input/)?pos_embedding")

NUMBERED = re.compile(r"((?:.+/)?)(LayerNorm|MultiHeadDotProductAttention|MlpBlock)_(\d{1,3})(/.+)")
NUMBERED_KINDS = 3

HEAD_PARTS = re.compile(r"probe|(?:LayerNorm|MultiHeadDotProductAttention|MlpBlock)_0/.+")


def canonical_names(stored_names: Collection[str]) -> dict[str, str]:
    """Return the canonical name of every stored tensor.

    Several stored names may have the same canonical name, for example those of a model and of its
    compiled copy.

    Args:
        stored_names: All names in the checkpoint.
    """
    names = {name: canonical_name(name) for name in stored_names}
    if any("/" in name for name in stored_names):
        names = with_linen_numbers(names)
        names = with_named_head(names)
    return names


def canonical_name(name: str) -> str:
    """Return a name without wrappers and old module names; also of a prefix."""
    if "." in name:
        *modules, last = name.split(".")
        segments = [segment for segment in modules if segment not in WRAPPERS]
        return FUSED_PROJECTION.sub(r"\1_\2", ".".join([*segments, last]))
    return OLD_POSITIONS.sub(r"\1pos_embedding", name)


def removed_wrappers(names: Iterable[str]) -> tuple[str, ...]:
    """Return the wrappers in these stored names, in the order of `WRAPPERS`."""
    segments: set[str] = set()
    for name in names:
        segments.update(name.split("."))
    return tuple(wrapper for wrapper in WRAPPERS if wrapper in segments)


def with_linen_numbers(names: Mapping[str, str]) -> dict[str, str]:
    """Number the modules of flax as since 2021: each kind separately, from 0.

    Before, one counter numbered all modules of a block: `LayerNorm_0`,
    `MultiHeadDotProductAttention_1`, `LayerNorm_2`, `MlpBlock_3`.

    Args:
        names: Canonical name of every stored tensor.
    """
    numbers: dict[str, dict[str, set[int]]] = {}
    for name in names.values():
        match = NUMBERED.fullmatch(name)
        if match:
            parent, kind, number, _ = match.groups()
            numbers.setdefault(parent, {}).setdefault(kind, set()).add(int(number))
    old = {parent for parent, kinds in numbers.items() if has_one_counter(kinds)}
    renumbered = {}
    for stored, name in names.items():
        renumbered[stored] = name
        match = NUMBERED.fullmatch(name)
        if match and match[1] in old:
            parent, kind, number, rest = match.groups()
            index = sorted(numbers[parent][kind]).index(int(number))
            renumbered[stored] = f"{parent}{kind}_{index}{rest}"
    return renumbered


def has_one_counter(kinds: Mapping[str, set[int]]) -> bool:
    """Return whether one counter numbered the modules of all kinds."""
    numbers = [number for values in kinds.values() for number in values]
    return len(kinds) == NUMBERED_KINDS and sorted(numbers) == list(range(len(numbers)))


def with_named_head(names: Mapping[str, str]) -> dict[str, str]:
    """Name the pooling head `MAPHead_0`, which old releases of big_vision wrote without a name.

    Args:
        names: Canonical name of every stored tensor.
    """
    present = set(names.values())
    roots = []
    for name in present:
        root = name.removesuffix("probe")
        if root != name and root + "embedding/kernel" in present:
            roots.append(root)
    renamed = {}
    for stored, name in names.items():
        renamed[stored] = name
        for root in roots:
            part = name.removeprefix(root)
            if name.startswith(root) and HEAD_PARTS.fullmatch(part):
                renamed[stored] = f"{root}MAPHead_0/{part}"
    return renamed

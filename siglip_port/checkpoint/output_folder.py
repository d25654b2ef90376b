"""Replacing the checkpoint in a folder, so that every reader loads the new one.

Libraries read different files of a folder: an index before the weights, every `*.safetensors` file,
or adapters beside the weights. Whatever a library reads must be what was saved.
"""

from __future__ import annotations

import re
from pathlib import Path

from siglip_port.atomic import transaction
from siglip_port.checkpoint.errors import CheckpointError
from siglip_port.checkpoint.json_files import read_index
from siglip_port.checkpoint.model_card import CARD, is_other_card
from siglip_port.checkpoint.preprocessor_config import PREPROCESSOR, PROCESSOR
from siglip_port.checkpoint.sentence_transformers import MODEL, MODULES, TRANSFORMER
from siglip_port.checkpoint.source import INDEX, WEIGHTS

DESCRIPTIONS = (PROCESSOR, PREPROCESSOR, MODULES, TRANSFORMER, MODEL)
"""Files that describe the checkpoint of a folder; removed if the new checkpoint has none."""

ADAPTERS = re.compile(r"adapter_config\.json|adapter_model\.(safetensors|bin)")

OTHER_WEIGHTS = re.compile(
    r".+\.safetensors|.+\.safetensors\.index\.json"
    r"|pytorch_model.*\.bin|pytorch_model.*\.bin\.index\.json"
    r"|open_clip_config\.json|open_clip_pytorch_model\.bin"
)
"""Names of weights that libraries read beside or instead of `model.safetensors`."""


def check_folder(folder: Path) -> None:
    """Check that a folder has no weights that libraries would mix with those to be saved.

    Args:
        folder: Output folder; need not exist.

    Raises:
        CheckpointError: It has adapters, or weights that do not belong to the checkpoint that is
            replaced. The message names the files.
        OSError: The folder cannot be read.
    """
    if not folder.is_dir():
        return
    replaced = {WEIGHTS, INDEX, *old_shards(folder)}
    names = sorted(path.name for path in folder.iterdir() if not path.is_dir())
    adapters = [name for name in names if ADAPTERS.fullmatch(name) and name not in replaced]
    if adapters:
        raise CheckpointError(
            f"{folder} contains {', '.join(adapters)}, adapters that transformers would add to the "
            "saved weights; save to another folder, or move them to another folder first"
        )
    others = [name for name in names if OTHER_WEIGHTS.fullmatch(name) and name not in replaced]
    if others:
        raise CheckpointError(
            f"{folder} contains {', '.join(others)}, other weights that some libraries would read "
            f"beside or instead of {WEIGHTS}; save to another folder, or move them to another "
            "folder first"
        )


def old_shards(folder: Path) -> list[str]:
    """Return the shards that the index of a folder lists, and that exist.

    If the index is damaged, none: `check_folder` reports its shards as other weights.
    """
    path = folder / INDEX
    if not path.is_file():
        return []
    try:
        filenames = set(read_index(path).file_of.values())
    except CheckpointError:
        return []
    return sorted(name for name in filenames - {WEIGHTS} if (folder / name).exists())


def staged_names(staging: Path) -> list[str]:
    """Return the names of all files, relative to their folder, sorted."""
    paths = [path for path in staging.rglob("*") if path.is_file()]
    return sorted(path.relative_to(staging).as_posix() for path in paths)


def move_checkpoint(staging: Path, folder: Path) -> list[str]:
    """Replace the checkpoint in a folder; after an error, restore the old one.

    Index and shards of an old checkpoint are removed. A `README.md` that is not a model card of
    this package is kept.

    Args:
        staging: Folder with the new files, in a folder of `staging_dir`.
        folder: Target folder.

    Returns:
        Names of the moved files, relative to the folder.

    Raises:
        OSError: A file cannot be moved.
    """
    names = staged_names(staging)
    if CARD in names and is_other_card(folder / CARD):
        names.remove(CARD)
    with transaction(staging, folder) as changes:
        # A reader of the index sees the old checkpoint until its first shard is gone, then an
        # error: the configuration changes last. A killed process leaves the index, from which the
        # next save knows the remaining shards.
        changes.move(WEIGHTS)
        for name in old_shards(folder):
            changes.remove(name)
        changes.remove(INDEX)
        for name in names:
            if name != WEIGHTS:
                changes.move(name)
        for name in DESCRIPTIONS:
            if name not in names:
                changes.remove(name)
    return names

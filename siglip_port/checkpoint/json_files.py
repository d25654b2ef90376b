"""The JSON files of a checkpoint: configuration, image processor, shard index."""

from __future__ import annotations

import codecs
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from siglip_port.checkpoint.errors import CheckpointError, HubUnreachableError
from siglip_port.checkpoint.formats import MAX_JSON_BYTES, parse_json
from siglip_port.checkpoint.preprocessor_config import (
    PREPROCESSOR,
    PROCESSOR,
    WORDS,
    StoredProcessor,
)
from siglip_port.checkpoint.source import CONFIG, OPEN_CLIP_CONFIG, Source, pickle_advice

log = logging.getLogger(__name__)

PROCESSOR_FOLDERS = ("feature_extractor", "image_processor", "processor")
"""Folders in which diffusers and others store image processors, beside the encoder's folder."""


class Index(NamedTuple):
    """Contents of `model.safetensors.index.json`.

    Attributes:
        file_of: Name of every stored tensor -> name of its shard.
        total_bytes: Total size of all shards; 0 if unknown.
    """

    file_of: dict[str, str]
    total_bytes: int


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, strictly: see `siglip_port.checkpoint.formats.parse_json`.

    Raises:
        CheckpointError: The file cannot be read, or is not a valid JSON object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ValueError(f"file is {size} bytes, limit is {MAX_JSON_BYTES}")
        content = parse_json(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} must contain a JSON object, got {type(content).__name__}; download it again"
        )
    return content


def read_config(
    source: Source, filenames: Iterable[str] = (CONFIG, OPEN_CLIP_CONFIG)
) -> dict[str, Any] | None:
    """Read the checkpoint's `config.json`, or open_clip's; None if there is neither.

    Raises:
        CheckpointError: The file cannot be read.
        HubUnreachableError: No file is cached, and the repository may have one.
    """
    not_cached: HubUnreachableError | None = None
    for filename in filenames:
        try:
            path = source.get(filename)
        except HubUnreachableError as error:
            not_cached = not_cached or error
            continue
        if path is not None:
            return read_json(path)
    if not_cached is not None:
        raise not_cached
    return None


def read_preprocessor_config(source: Source) -> StoredProcessor | None:
    """Read the checkpoint's image processor; None if there is no file, or none is cached.

    Raises:
        CheckpointError: The file cannot be read.
    """
    not_cached: HubUnreachableError | None = None
    for filename in (PROCESSOR, PREPROCESSOR):  # the order of transformers 5
        try:
            path = source.get(filename)
        except HubUnreachableError as error:
            not_cached = not_cached or error
            continue
        if path is None:
            continue
        content = read_processor(path)
        if content is not None:
            return StoredProcessor(filename, content)
    try:
        sibling = read_sibling_processor(source)
    except HubUnreachableError as error:
        sibling = None
        not_cached = not_cached or error
    if sibling is None and not_cached is not None:  # not needed to load the model
        log.warning(
            "%s is not available, using SigLIP's default preprocessing: %s",
            PREPROCESSOR,
            not_cached,
        )
    return sibling


def read_processor(path: Path) -> dict[str, Any] | None:
    """Read an image processor from its own file, or from that of a processor.

    Returns:
        Options of the image processor; None if a `processor_config.json` has none.

    Raises:
        CheckpointError: The file cannot be read.
    """
    content = read_json(path)
    if path.name != PROCESSOR:
        return content
    image_processor = content.get("image_processor")
    if image_processor is not None and not isinstance(image_processor, dict):
        raise CheckpointError(
            f"{path}: image_processor must be a JSON object, got {image_processor!r}; download it "
            "again"
        )
    return image_processor


def read_sibling_processor(source: Source) -> StoredProcessor | None:
    """Read a SigLIP processor in a folder beside the encoder's, as diffusers stores it.

    Processors of other models there may belong to other encoders, and are not used.

    Raises:
        CheckpointError: The file cannot be read.
        HubUnreachableError: The file is not cached, and the Hub cannot be reached.
    """
    for folder in PROCESSOR_FOLDERS:
        path = source.get_sibling(folder, PREPROCESSOR)
        if path is None:
            continue
        stored = StoredProcessor(f"../{folder}/{PREPROCESSOR}", read_json(path))
        if stored.kind.startswith("Siglip"):
            return stored
    return None


def read_word(
    preprocessing: str | os.PathLike[str] | Mapping[str, Any] | None,
) -> str | StoredProcessor | None:
    """Read the argument `preprocessing` of `from_hf`.

    Args:
        preprocessing: One of `siglip_port.checkpoint.preprocessor_config.WORDS`, the options of a
            SigLIP processor, or the path of their file; or None.

    Returns:
        The word or the options; None for None.

    Raises:
        ValueError: It is another value.
        CheckpointError: The file cannot be read.
    """
    if preprocessing is None:
        return None
    if isinstance(preprocessing, Mapping):
        return StoredProcessor("preprocessing=", preprocessing)
    if isinstance(preprocessing, str) and preprocessing in WORDS:
        return preprocessing
    if isinstance(preprocessing, (str, os.PathLike)):
        path = Path(preprocessing)
        content = read_processor(path) if path.is_file() else None
        if content is not None:
            return StoredProcessor(str(path), content)
    raise ValueError(
        f"preprocessing must be {', '.join(map(repr, WORDS))}, a mapping, or the path of a "
        f"{PREPROCESSOR}, got {preprocessing!r}"
    )


def read_index(path: Path) -> Index:
    """Read which shard contains which tensor.

    The index may only give plain names of files beside it, not paths. These files may be symbolic
    links, as in the Hub's cache.

    Raises:
        CheckpointError: The file cannot be read, or is not a valid index.
    """
    content = read_json(path)
    file_of = content.get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(f, str) for f in file_of.values()):
        raise CheckpointError(
            f"{path} has no valid weight_map (tensor name -> file name); download it again"
        )
    filenames = sorted(set(file_of.values()))
    bad = [name for name in filenames if not re.fullmatch(r"[\w.-]+\.safetensors", name)]
    if bad:
        raise CheckpointError(
            f"{path} lists shards that are not plain .safetensors file names: "
            f"{', '.join(bad[:5])}" + pickle_advice(bad)
        )
    return Index(file_of, total_size(content.get("metadata")))


def total_size(metadata: object) -> int:
    """Return the total size in the index's metadata; 0 if it is missing or invalid."""
    if not isinstance(metadata, dict):
        return 0
    size = metadata.get("total_size")
    if not isinstance(size, int) or isinstance(size, bool):
        return 0
    return size if 0 < size < 1e15 else 0

"""The JSON files of a checkpoint: configuration, image processor, shard index."""

from __future__ import annotations

import codecs
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from siglip_port.checkpoint.errors import CheckpointError, HubUnreachableError
from siglip_port.checkpoint.formats import MAX_JSON_BYTES, parse_json
from siglip_port.checkpoint.preprocessor_config import PREPROCESSOR, PROCESSOR
from siglip_port.checkpoint.source import CONFIG, OPEN_CLIP_CONFIG, Source, pickle_advice

log = logging.getLogger(__name__)


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


def read_preprocessor_config(source: Source) -> dict[str, Any] | None:
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
        content = read_json(path)
        if filename == PREPROCESSOR:
            return content
        image_processor = content.get("image_processor")
        if isinstance(image_processor, dict):
            return image_processor
    if not_cached is not None:  # not needed to load the model
        log.warning(
            "%s is not available, using SigLIP's default preprocessing: %s",
            PREPROCESSOR,
            not_cached,
        )
    return None


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

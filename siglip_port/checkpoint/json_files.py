"""The JSON files of a checkpoint: configuration, image processor, index of the shards."""

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
    """What `model.safetensors.index.json` says.

    Attributes:
        file_of: the name of every stored tensor -> the name of the shard that holds it.
        total_bytes: of all shards together; 0 where the index does not say.
    """

    file_of: dict[str, str]
    total_bytes: int


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, strictly: see `siglip_port.checkpoint.formats.parse_json`.

    Raises:
        CheckpointError: the file is not readable, or holds none.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ValueError(f"it has {size} bytes, and at most {MAX_JSON_BYTES} are read")
        content = parse_json(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} must hold a JSON object, found a {type(content).__name__}; fetch it again"
        )
    return content


def read_config(
    source: Source, filenames: Iterable[str] = (CONFIG, OPEN_CLIP_CONFIG)
) -> dict[str, Any] | None:
    """Read the checkpoint's configuration, or open_clip's, as it is; None where there is neither.

    Raises:
        CheckpointError: it is not readable.
        HubUnreachableError: neither is cached, and there may be one.
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
    """Read how the checkpoint's images are made; None where no file tells, or none is cached.

    Raises:
        CheckpointError: the file is not readable.
    """
    not_cached: HubUnreachableError | None = None
    for filename in (PROCESSOR, PREPROCESSOR):  # as transformers 5 reads them
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
    if not_cached is not None:  # The model can do without.
        log.warning(
            "how images are prepared is not known, so it is as SigLIP's encoders are: %s",
            not_cached,
        )
    return None


def read_index(path: Path) -> Index:
    """Read which shard holds which tensor.

    A shard is a file beside the index, by its plain name: no path leads elsewhere. It may be a
    link, as all files of the Hub's cache are: what a link leads to is up to whoever made the
    folder, not to the index.

    Raises:
        CheckpointError: the file is not readable, or no such index.
    """
    content = read_json(path)
    file_of = content.get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(f, str) for f in file_of.values()):
        raise CheckpointError(
            f"{path} has no usable weight_map (tensor name -> file name); fetch it again"
        )
    filenames = sorted(set(file_of.values()))
    bad = [name for name in filenames if not re.fullmatch(r"[\w.-]+\.safetensors", name)]
    if bad:
        raise CheckpointError(
            f"{path} names shards that are no plain .safetensors file names: {', '.join(bad[:5])}"
            + pickle_advice(bad)
        )
    return Index(file_of, total_size(content.get("metadata")))


def total_size(metadata: object) -> int:
    """Return the bytes of all shards by the index's metadata; 0 where they do not say."""
    if not isinstance(metadata, dict):
        return 0
    size = metadata.get("total_size")
    if not isinstance(size, int) or isinstance(size, bool):
        return 0
    return size if 0 < size < 1e15 else 0

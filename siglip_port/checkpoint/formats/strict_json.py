"""Strict JSON: UTF-8, no duplicate keys, limited nesting."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

MAX_JSON_BYTES = 25_000_000
"""Maximum size of a header, an index or a configuration; the limit of huggingface_hub."""

# Nesting of objects and lists; the Rust reader of safetensors allows 127.
MAX_JSON_DEPTH = 100


def parse_json(content: bytes) -> Any:  # noqa: ANN401 (any JSON value)
    """Parse JSON strictly.

    Raises:
        ValueError: The content is not UTF-8 or not JSON, has a duplicate key, or is nested more
            than `MAX_JSON_DEPTH` levels deep.
    """
    try:
        document = json.loads(content.decode(), object_pairs_hook=object_from_pairs)
    except RecursionError as error:
        raise ValueError("lists and objects are nested too deep") from error
    level = [document]
    depth = 0
    while level:
        inner = next_level(level)
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise ValueError(f"lists and objects are nested more than {MAX_JSON_DEPTH} levels deep")
        level = inner
    return document


def next_level(values: list[Any]) -> list[Any]:
    """Return the members of these values; check that their strings are valid Unicode."""
    inner: list[Any] = []
    for value in values:
        if isinstance(value, str):
            value.encode()  # raises UnicodeEncodeError for a lone surrogate
        elif isinstance(value, (dict, list)):
            inner.extend(parts_of(value))
    return inner


def parts_of(container: dict[str, Any] | list[Any]) -> Iterable[Any]:
    """Return the keys and values of an object, or the values of a list."""
    if isinstance(container, dict):
        return itertools.chain(container, container.values())
    return container


def object_from_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the dict of an object without duplicate keys.

    Parsers disagree on duplicates: `json` keeps the last value, others the first.
    """
    result = dict(pairs)
    if len(result) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {name!r} occurs more than once")
    return result

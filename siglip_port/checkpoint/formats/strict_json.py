"""JSON as it is meant: UTF-8, every name once in an object, and not nested without end."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

MAX_JSON_BYTES = 25_000_000
"""Bytes of a header, an index or a configuration.

The limit of huggingface_hub, far above any that is known.
"""

# Objects and lists inside each other; Rust's own reader of safetensors allows 127.
MAX_JSON_DEPTH = 100


def parse_json(content: bytes) -> Any:  # noqa: ANN401 (whatever it says)
    """Read JSON strictly: in UTF-8, no name twice in one object, and no deeper than anybody needs.

    Raises:
        ValueError: it is no such JSON.
    """
    try:
        document = json.loads(content.decode(), object_pairs_hook=object_from_pairs)
    except RecursionError as error:
        raise ValueError("its lists and objects lie too deep inside each other") from error
    level = [document]
    depth = 0
    while level:
        inner = next_level(level)
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise ValueError(
                f"its lists and objects lie more than {MAX_JSON_DEPTH} deep inside each other"
            )
        level = inner
    return document


def next_level(values: list[Any]) -> list[Any]:
    """Return what lies inside these values; check the texts among them."""
    inner: list[Any] = []
    for value in values:
        if isinstance(value, str):
            value.encode()  # fails where it is half a character, which nobody could print
        elif isinstance(value, (dict, list)):
            inner.extend(parts_of(value))
    return inner


def parts_of(container: dict[str, Any] | list[Any]) -> Iterable[Any]:
    """Return the names and values of an object, or the values of a list."""
    if isinstance(container, dict):
        return itertools.chain(container, container.values())
    return container


def object_from_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of an object.

    Python's own reader keeps the last of several values, others the first.
    """
    result = dict(pairs)
    if len(result) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"it says {name!r} more than once")
    return result

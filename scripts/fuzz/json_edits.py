"""Damages JSON; most results are still valid JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random
from typing import Any

from scripts.fuzz.byte_edits import noise

DAMAGED = (ValueError, RecursionError, KeyError, TypeError, IndexError)
"""What an edit raises for a document that another edit has damaged."""

RAW_MARK = "\N{SYMBOL FOR NULL}"  # placeholder of one of RAW_TEXTS
RAW_TEXTS = (
    "[" * 100_000,
    "[" * 500 + "]" * 500,
    '{"a":' * 50_000 + "1" + "}" * 50_000,
    "9" * 5000,
    "1e400",
    "NaN",
    "-0",
    "-Infinity",
    "",
    "0x10",
    "'",
    '"\\ud800"',
    "\x00",
    "\ufeff",
    "1,1",
    "null,",
)

INTEGERS = (0, -1, 1, 2, 3, 4, 5, 6, 8, 16, 2**31, 2**63, 2**64, -(2**63), 10**40, 10**400)
FLOATS = (0.0, 0.5, 1e-6, 1e-300, -1.5, 4.0)
TEXTS = ("", "x", "4", "gelu", "gelu_new", "F32", "BF16", "F16", "F64", "I32", "F8_E4M3")
FILES = ("../x.safetensors", "/etc/passwd", "model.bin", "a/b.safetensors")
KINDS = ("siglip_vision_model", "siglip2_vision_model")
CONTAINERS: tuple[Any, ...] = (
    [],
    {},
    [0],
    [0, 0],
    [4, 4],
    [4, 5],
    [-4, -4],
    [2**40, 2**40],
    [1] * 70,
    {"a": 1},
    [None],
    [[4]],
    ["4"],
    [4.0],
)
RAW_VALUES: tuple[Any, ...] = ([RAW_MARK], {"a": RAW_MARK}, *[RAW_MARK] * 8)
VALUES: tuple[Any, ...] = (
    *(None, True, False),
    *INTEGERS,
    *FLOATS,
    *TEXTS,
    *FILES,
    *KINDS,
    *CONTAINERS,
    *RAW_VALUES,
)
"""Replacements for a value, besides variations of the value itself."""

OTHER_FILES = (
    "../model.safetensors",
    "/dev/zero",
    "/dev/zero.safetensors",
    "model.bin",
    "",
    ".",
    "a/b.safetensors",
    "model-00001-of-00003.safetensors\n",
    "\0.safetensors",
    "x.safetensors",
    ".safetensors",
    "~.safetensors",
)
"""File names that an index is made to list as a shard."""


def places_in(value: object) -> Iterator[tuple[Any, Any]]:
    """Yield the container and the key or index of every value in a JSON document."""
    if isinstance(value, dict):
        keys: list[Any] = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    else:
        return
    for key in keys:
        yield value, key
        yield from places_in(value[key])


def nudge(rng: Random, value: object) -> object:
    """Return a similar value, or the same value in another type."""
    if isinstance(value, bool) or value is None:
        return rng.choice((not value, int(bool(value)), str(value)))
    if isinstance(value, int | float):
        arithmetic = (value + 1, value - 1, value * 2, value / 2, -value)
        return rng.choice((*arithmetic, str(value), [value] * 2, float(value)))
    if isinstance(value, str):
        texts = (value + "x", value[:-1], value.upper())
        return rng.choice((*texts, [value], {value: value}, value + "\0", f" {value}"))
    assert isinstance(value, list | dict)
    return rng.choice((list(value), dict.fromkeys(map(str, value)), [value], json.dumps(value)))


def edit_json(rng: Random, content: bytes) -> bytes:
    """Apply one edit to JSON."""
    try:
        document = json.loads(content)
        places = list(places_in(document))
    except (ValueError, RecursionError):
        return noise(rng, content)
    if not places:
        return noise(rng, content)
    tail = edit_document(rng, document, places)
    text = json.dumps(document)
    text = text[:-1] + tail + text[-1:]
    text = text.replace(json.dumps(RAW_MARK), rng.choice(RAW_TEXTS))
    return text.encode("utf-8", "surrogatepass")


def edit_document(rng: Random, document: object, places: list[tuple[Any, Any]]) -> str:
    """Apply one edit to a document; return text to insert before its last character."""
    holder, key = rng.choice(places)
    other_holder, other_key = rng.choice(places)
    value = holder[key]
    match rng.randrange(8):
        case 0 | 1:
            holder[key] = rng.choice(VALUES)
        case 2:
            is_huge = isinstance(value, int) and abs(value) >= 10**300
            holder[key] = 0 if is_huge else nudge(rng, value)
        case 3:
            del holder[key]
        case 4 if isinstance(holder, dict):
            del holder[key]
            sibling = rng.choice(list(holder) or ["x"])
            holder[rng.choice((f"{key}x", str(key).upper(), sibling, ""))] = value
        case 5:
            holder[key] = json.loads(json.dumps(other_holder[other_key]))
        case 6:
            sibling = rng.choice([k for h, k in places if h is holder])
            holder[key] = holder[sibling]
            holder[sibling] = value
        case _ if isinstance(document, dict):
            name = rng.choice(list(document))
            value = rng.choice([*document.values(), None])
            return f", {json.dumps(name)}: {json.dumps(value)}"
    return ""


def edit_index(rng: Random, content: bytes) -> bytes:
    """Make an index list another file for one of its tensors, or for thousands of others."""
    try:
        document = json.loads(content)
        weight_map = document["weight_map"]
        names = list(weight_map)
        if rng.random() < 0.1:
            weight_map |= {f"text_model.{i}": f"model-{i}.safetensors" for i in range(5000)}
        name = rng.choice(names)
        weight_map[name] = rng.choice((*OTHER_FILES, *dict.fromkeys(weight_map.values())))
    except DAMAGED:
        return noise(rng, content)
    return json.dumps(document).encode()

"""A mutant: one bug, how it gets into the port, and how it is taken out again.

A mutant owns no text of the port. It replaces a method, a function or an entry of a table while a
context lasts, or it edits a model that has been loaded.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Unpack
from unittest import mock

import torch

from siglip_port import SigLipVisionModel
from siglip_port.checkpoint import LoadOptions

Subject = Literal["port", "naflex", "resized", "images"]
Patch = Callable[[contextlib.ExitStack], None]
"""Breaks the port until the stack is closed; made by the functions below."""

Edit = Callable[[SigLipVisionModel], object]
"""Breaks a loaded model, in place; what it returns is ignored."""


@dataclass(frozen=True)
class Mutant:
    """One bug of a port, or another way to compute the same.

    Attributes:
        name: short, unique.
        what: the bug in words.
        locations: words of `LOCATIONS`: the only points, tensors, outputs and fields of the config
            that the gates may name for it.
        gate: the gate that must detect it, whatever the others see; empty for what is equivalent.
        source: where the bug happened in public; `variant` for a close relative of one that did.
        patch: breaks the code, before a model is built and loaded.
        edit: breaks the loaded model.
        subject: what is broken: the `port`, called with images of its own size; with packed patches
            (`naflex`), or with images of another size (`resized`); or how `images` become pixels.
        is_equivalent: whether it computes the same, so that no gate may detect it.
    """

    name: str
    what: str
    locations: str = ""
    gate: str = "numerics"
    source: str = "variant"
    patch: Patch | None = field(default=None, compare=False, repr=False)
    edit: Edit | None = field(default=None, compare=False, repr=False)
    subject: Subject = "port"
    is_equivalent: bool = False

    def __getstate__(self) -> dict[str, object]:
        """What is sent to another process: all but the functions, most of which have no name."""
        return {**vars(self), "patch": None, "edit": None}

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Break the code; mend it at the end."""
        with contextlib.ExitStack() as stack:
            if self.patch is not None:
                self.patch(stack)
            yield

    def load(
        self, source: str | os.PathLike[str], **options: Unpack[LoadOptions]
    ) -> SigLipVisionModel:
        """Load the port from a checkpoint, by the options of `from_hf`, and break the model."""
        port = SigLipVisionModel.from_hf(source, **options)
        if self.edit is not None:
            with torch.no_grad():
                self.edit(port)
        return port


@dataclass(frozen=True)
class HarnessMutant:
    """One bug of the harness itself.

    Attributes:
        name: short, unique.
        what: the bug in words.
        shown_by: names of mutants; the broken harness must misjudge one of them.
        patch: breaks the harness.
    """

    name: str
    what: str
    shown_by: tuple[str, ...]
    patch: Patch = field(compare=False, repr=False)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Break the harness; mend it at the end."""
        with contextlib.ExitStack() as stack:
            self.patch(stack)
            yield


# --- ways to patch --------------------------------------------------------------------------------


def replace(owner: object, name: str, value: object) -> Patch:
    """Give a class, an object or a module another attribute: one that it has already."""

    def patch(stack: contextlib.ExitStack) -> None:
        stack.enter_context(mock.patch.object(owner, name, value))

    return patch


def wrap(owner: object, name: str, function: Callable[..., object]) -> Patch:
    """Replace a function or method by `function`, whose first argument is the original."""

    def patch(stack: contextlib.ExitStack) -> None:
        original = getattr(owner, name)

        def wrapper(*args: object, **options: object) -> object:
            return function(original, *args, **options)

        stack.enter_context(mock.patch.object(owner, name, wrapper))

    return patch


def replace_item(table: dict[str, Any], key: str, value: object) -> Patch:
    """Give a table another entry: one that it has already."""

    def patch(stack: contextlib.ExitStack) -> None:
        if key not in table:
            raise KeyError(f"the catalog is behind the code: the table has no entry {key!r}")
        stack.enter_context(mock.patch.dict(table, {key: value}))

    return patch


def combine(*patches: Patch) -> Patch:
    """Apply several patches as one."""

    def patch(stack: contextlib.ExitStack) -> None:
        for part in patches:
            part(stack)

    return patch


# --- where bugs are -------------------------------------------------------------------------------

BLOCK = r"encoder\.layers\.(\d+)"
LOCATIONS = {
    "patch": r"embeddings\.patch_embedding",
    "embeddings": r"embeddings(\.position_embedding)?",
    "in": rf"{BLOCK}\.layer_norm1:input",
    "ln1": rf"{BLOCK}\.layer_norm1",
    "q": rf"{BLOCK}\.self_attn\.q_proj",
    "k": rf"{BLOCK}\.self_attn\.k_proj",
    "v": rf"{BLOCK}\.self_attn\.v_proj",
    "context": rf"{BLOCK}\.self_attn\.out_proj:input",
    "attention": rf"{BLOCK}\.self_attn(\.out_proj)?",
    "residual": rf"{BLOCK}\.layer_norm2:input",
    "ln2": rf"{BLOCK}\.layer_norm2",
    "fc1": rf"{BLOCK}\.mlp\.fc1",
    "act": rf"{BLOCK}\.mlp\.fc2:input",
    "mlp": rf"{BLOCK}\.mlp(\.fc2)?",
    "out": BLOCK,
    "block": rf"{BLOCK}(\..*)?",
    "post-in": r"post_layernorm:input",
    "post": r"post_layernorm",
    "tokens": r"tokens",
    "head-q": r"head(\.attention:q|\.attention\.in_proj|\.probe|)",
    "head-k": r"head\.attention(:k|\.in_proj)",
    "head-v": r"head\.attention(:v|\.in_proj)",
    "head-context": r"head\.attention:context",
    "head-attention": r"head\.attention(\.out_proj)?",
    "head-ln": r"head\.layernorm",
    "head-fc1": r"head\.mlp\.fc1",
    "head-act": r"head\.mlp\.fc2:input",
    "head-mlp": r"head\.mlp(\.fc2)?",
    "head": r"head",
    "pooled": r"pooled",
    "inputs": r"inputs",
    "pixels": r"pixel_values",
}
"""Words for locations, as patterns of the reference's points; `5.ln1` is that of block 5 alone."""


def is_expected_location(location: str, expected: str) -> bool:
    """Whether a point, tensor or output is one of those that a mutant may be named for."""
    module = re.sub(r"[._](weight|bias)$", "", location)
    for word in expected.split():
        number, _, place = word.rpartition(".")
        pattern = LOCATIONS.get(place, re.escape(word))
        match = re.fullmatch(pattern, module)
        if match and (not number or number == match[1]):
            return True
    return False

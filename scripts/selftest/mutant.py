"""Mutants: bugs that are planted in the port, or in the harness, and removed afterwards.

A mutant contains no source code of the port. It replaces a method, a function or a table entry
within a context manager, or it edits a loaded model.
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

Subject = Literal["port", "regime", "naflex", "resized", "images", "entrances"]
Patch = Callable[[contextlib.ExitStack], None]
"""Breaks the port until the stack is closed; built by the functions below."""

Edit = Callable[[SigLipVisionModel], object]
"""Breaks a loaded model in place; the return value is ignored."""


@dataclass(frozen=True)
class Mutant:
    """A bug of the port, or an equivalent variant: another way to compute the same result.

    Attributes:
        name: Short, unique name.
        description: The bug in one line.
        locations: Keys of `LOCATIONS`, tensors, outputs and config fields that gates may report.
        gate: The gate that must detect it; empty for an equivalent variant.
        source: Public source of the bug (owner/repository#issue); `variant` if it is derived from
            another one.
        patch: Breaks the code before the model is built and loaded.
        edit: Breaks the loaded model.
        subject: `port` for any images, `regime` for those of some input regime, `naflex` for packed
            patches, `resized` for images of another size, `images` for preprocessing,
            `entrances` for methods other than `forward`, whose names are then the locations.
        is_equivalent: Whether no gate may detect it.
    """

    name: str
    description: str
    locations: str = ""
    gate: str = "numerics"
    source: str = "variant"
    patch: Patch | None = field(default=None, compare=False, repr=False)
    edit: Edit | None = field(default=None, compare=False, repr=False)
    subject: Subject = "port"
    is_equivalent: bool = False

    def __getstate__(self) -> dict[str, object]:
        """Return the state without the functions, most of which cannot be pickled."""
        return {**vars(self), "patch": None, "edit": None}

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Apply the patch within a context."""
        with contextlib.ExitStack() as stack:
            if self.patch is not None:
                self.patch(stack)
            yield

    def load(
        self, source: str | os.PathLike[str], **options: Unpack[LoadOptions]
    ) -> SigLipVisionModel:
        """Load the port with the options of `from_hf`, and apply the edit."""
        port = SigLipVisionModel.from_hf(source, **options)
        if self.edit is not None:
            with torch.no_grad():
                self.edit(port)
        return port


@dataclass(frozen=True)
class HarnessMutant:
    """A bug of the harness itself.

    Attributes:
        name: Short, unique name.
        description: The bug in one line.
        probes: Names of mutants and equivalent variants; the broken harness must misjudge one.
        patch: Breaks the harness.
    """

    name: str
    description: str
    probes: tuple[str, ...]
    patch: Patch = field(compare=False, repr=False)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Apply the patch within a context."""
        with contextlib.ExitStack() as stack:
            self.patch(stack)
            yield


# --- ways to patch --------------------------------------------------------------------------------


def replace(owner: object, name: str, value: object) -> Patch:
    """Replace an existing attribute of a class, an object or a module."""

    def patch(stack: contextlib.ExitStack) -> None:
        stack.enter_context(mock.patch.object(owner, name, value))

    return patch


def wrap(owner: object, name: str, function: Callable[..., object]) -> Patch:
    """Replace a function or method with `function`, whose first argument is the original."""

    def patch(stack: contextlib.ExitStack) -> None:
        original = getattr(owner, name)

        def wrapper(*args: object, **options: object) -> object:
            return function(original, *args, **options)

        stack.enter_context(mock.patch.object(owner, name, wrapper))

    return patch


def replace_item(table: dict[str, Any], key: str, value: object) -> Patch:
    """Replace an existing entry of a table."""

    def patch(stack: contextlib.ExitStack) -> None:
        if key not in table:
            raise KeyError(f"the table has no entry {key!r}; update the catalog")
        stack.enter_context(mock.patch.dict(table, {key: value}))

    return patch


def combine(*patches: Patch) -> Patch:
    """Apply several patches as one."""

    def patch(stack: contextlib.ExitStack) -> None:
        for part in patches:
            part(stack)

    return patch


# --- locations of bugs ----------------------------------------------------------------------------

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
"""Location -> pattern of the reference's points; `5.ln1` is block 5 only."""


def is_expected_location(location: str, expected: str) -> bool:
    """Whether a point, tensor or output is one of a mutant's locations."""
    module = re.sub(r"[._](weight|bias)$", "", location)
    for word in expected.split():
        number, _, key = word.rpartition(".")
        pattern = LOCATIONS.get(key, re.escape(word))
        match = re.fullmatch(pattern, module)
        if match and (not number or number == match[1]):
            return True
    return False

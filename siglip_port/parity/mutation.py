"""Builds the port with a mistake in it.

A changed copy of its files, a change of the loaded model, or of its pixels.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, Literal

from torch import Tensor

Kind = Literal["bug", "legal"]
Subject = Literal["port", "harness", "naflex", "resized", "images"]
Edit = tuple[str, str, str]
"""A file of the package without `.py`, a text that occurs there exactly once, and what takes its place."""


@dataclass(frozen=True)
class Mutant:
    """One change of the port.

    Attributes:
        name: short, unique.
        what: the change in words.
        gate: the gate that must notice it, whatever the others see; empty where none may.
        guilty: pattern of what may be named: points, tensors, outputs or config fields in the
            reference's names.
        source: where the mistake happened in public; `variant` for a close relative of one that
            did.
        edits: in copies of the port's files.
        change: of the loaded model.
        pixels: of what the port is given, and the reference is not.
        kind: `bug`, or `legal`, which must be let pass.
        subject: what is changed: the `port`, called with pictures of its own size; with packed
            patches (`naflex`), or with pictures of another size (`resized`); how `images` become
            pixels; or the `harness` itself.
    """

    name: str
    what: str
    gate: str = ""
    guilty: str = ""
    source: str = "variant"
    edits: tuple[Edit, ...] = ()
    change: Callable[[Any], object] | None = field(default=None, compare=False)
    pixels: Callable[[Tensor], Tensor] | None = field(default=None, compare=False)
    kind: Kind = "bug"
    subject: Subject = "port"


class _EditingLoader(SourceFileLoader):
    """Loads a file with changes in its text, which is compiled anew every time."""

    def __init__(self, fullname: str, path: str, edits: Sequence[Edit]) -> None:
        super().__init__(fullname, path)
        self.edits = edits

    def get_code(self, fullname: str) -> CodeType:
        text = self.get_data(self.path).decode()
        for file, old, new in self.edits:
            text = replaced(text, old, new, f"{file}.py")
        return compile(text, self.path, "exec", dont_inherit=True)


def replaced(text: str, old: str, new: str, file: str) -> str:
    """Replaces what occurs exactly once.

    Raises:
        ValueError: it does not.
    """
    if text.count(old) != 1:
        raise ValueError(
            f"the catalogue is behind the code: {file} holds this text {text.count(old)} times, "
            "expected once; bring "
            f"the mutant up to date: {old!r}"
        )
    return text.replace(old, new)


class _EditingFinder:
    def __init__(self, edits: Sequence[Edit]) -> None:
        self.edits = edits

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = (
            PathFinder.find_spec(name, path, target)
            if name.split(".")[0] == "siglip_port"
            else None
        )
        mine = [edit for edit in self.edits if f"siglip_port.{edit[0].replace('/', '.')}" == name]
        if spec is not None and spec.origin and mine:
            spec.loader = _EditingLoader(name, spec.origin, mine)
        return spec


@contextmanager
def edited(edits: Sequence[Edit], *, harness: bool = False) -> Iterator[Mapping[str, ModuleType]]:
    """Imports the package a second time with changes in its text; the first one is not touched.

    Args:
        edits: the changes.
        harness: whether `siglip_port.parity` is imported again too.

    Yields:
        The modules, by their full names, as far as they have been imported; others are imported
        when asked for by `importlib.import_module` within the context.

    Raises:
        ValueError: a text to be changed does not occur exactly once.
    """

    def ours(name: str) -> bool:
        return name == "siglip_port" or (
            name.startswith("siglip_port.") and (harness or ".parity" not in name)
        )

    before = {name: module for name, module in sys.modules.items() if ours(name)}
    for name in before:
        del sys.modules[name]
    finder = _EditingFinder(edits)
    sys.meta_path.insert(0, finder)
    try:
        importlib.import_module("siglip_port.model")
        yield sys.modules
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if ours(name)]:
            del sys.modules[name]
        sys.modules.update(before)


def block(model: Any, i: int = 5) -> Any:  # noqa: ANN401 (a class of a package imported a second time)
    """The `i`th block of a port; the last one where there are not so many."""
    blocks = model.transformer.encoder.encoder_blocks
    return blocks[min(i, len(blocks) - 1)]

"""Read-only and full disks."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

WRITING_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT

Function = Callable[..., Any]


@contextmanager
def unwritable(folder: Path, code: int) -> Iterator[None]:
    """Let every write below a folder fail, as on a read-only (EROFS) or full (ENOSPC) disk.

    Permissions would not stop root.
    """

    def refuse_below(function: Function, writes: Callable[..., bool]) -> Function:
        def call(path: object, *arguments: object, **options: object) -> object:
            paths = [Path(p) for p in (path, *arguments[:1]) if isinstance(p, (str, Path))]
            is_below = any(folder in p.parents for p in paths)
            if is_below and writes(*arguments, **options):
                raise OSError(code, os.strerror(code), str(path))
            return function(path, *arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("mkdir", "replace", "rename", "symlink", "link", "unlink", "rmdir"):
            patch.setattr(os, name, refuse_below(getattr(os, name), always))
        patch.setattr(os, "open", refuse_below(os.open, flags_write))
        patch.setattr(io, "open", refuse_below(io.open, mode_writes))
        yield


def always(*_: object, **__: object) -> bool:
    return True


def flags_write(flags: int, *_: object, **__: object) -> bool:
    return bool(flags & WRITING_FLAGS)


def mode_writes(mode: str = "r", *_: object, **__: object) -> bool:
    return any(letter in mode for letter in "wax+")


@contextmanager
def refused_operation(name: str, code: int) -> Iterator[None]:
    """Let one operation fail in `.siglip_port`, except for headers."""
    owner: Any = os if name == "posix_fallocate" else Path
    function: Function = getattr(owner, name)

    def refuse(path: object, *arguments: object, **options: object) -> object:
        is_reading = name == "open" and (not arguments or arguments[0] == "rb")
        is_own = ".siglip_port" in str(path) and "header" not in str(path)
        if isinstance(path, int) or (is_own and not is_reading):
            raise OSError(code, os.strerror(code), str(path))
        return function(path, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, refuse)
        yield

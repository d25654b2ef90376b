"""Optional dependencies: what a command needs beside the library."""

from __future__ import annotations

import importlib.util


class MissingExtraError(RuntimeError):
    """An optional dependency is not installed; the message names the extra that brings it."""


def require(package: str, extra: str, *, subject: str = "this") -> None:
    """Raise MissingExtraError unless a package is installed.

    Args:
        package: the name that is imported.
        extra: the extra of siglip-port that installs it.
        subject: what needs it.
    """
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(
            f"{subject} needs {package}, which is not installed: install siglip-port[{extra}]"
        )

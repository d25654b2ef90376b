"""Where a report comes from: date, command, versions and machine."""

from __future__ import annotations

import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from siglip_port import __version__

PACKAGES = ("transformers", "timm", "open_clip_torch", "onnxruntime", "openvino")
"""Packages whose versions are reported if a comparison imported them."""


def describe_origin() -> dict[str, str]:
    """Return date, command, versions and machine."""
    origin = {
        "siglip_port": __version__,
        "torch": str(torch.__version__),
    }
    for package in PACKAGES:
        if package.removesuffix("_torch") in sys.modules:
            origin[package] = installed_version(package)
    origin["python"] = platform.python_version()
    origin["machine"] = f"{platform.system()} {platform.machine()}"
    origin["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    origin["command"] = command_line()
    return origin


def command_line() -> str:
    """Return the command of this process, with the name of the program instead of its path."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def installed_version(package: str) -> str:
    """Return the version of a package; `unknown` for one without metadata."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"

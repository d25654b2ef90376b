"""Optional dependencies and the extras that install them."""

from __future__ import annotations

import importlib.util

EXTRAS = {
    "typer": "cli",
    "rich": "cli",
    "pyarrow": "embed",
    "ray": "ray",
    "matplotlib": "plot",
    "torchvision": "torchvision",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "transformers": "parity",
}
"""Import name of an optional dependency -> the extra that installs it."""


class MissingExtraError(ImportError):
    """An optional dependency is not installed; the message says which extra to install."""


def require(*packages: str) -> None:
    """Check that optional dependencies are installed.

    Args:
        packages: Import names, keys of `EXTRAS`.

    Raises:
        MissingExtraError: One of the packages is not installed.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(
                f"{package} is not installed; run: pip install 'siglip-port[{EXTRAS[package]}]'",
                name=package,
            )

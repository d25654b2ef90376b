"""Optional dependencies, and the extras of siglip-port that install them."""

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
"""Import name of each optional dependency -> the extra that installs it."""


class MissingExtraError(ImportError):
    """An optional dependency is not installed; the message names the extra that installs it."""


def require(*packages: str) -> None:
    """Raise MissingExtraError unless all of these packages are installed.

    Args:
        packages: import names, keys of `EXTRAS`.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(
                f"{package} is not installed; run: pip install 'siglip-port[{EXTRAS[package]}]'",
                name=package,
            )

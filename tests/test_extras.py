"""Checks of optional dependencies, and the extras in pyproject.toml."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from siglip_port.extras import EXTRAS, MissingExtraError, require

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def test_require(monkeypatch: pytest.MonkeyPatch) -> None:
    require("pyarrow", "transformers")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = r"^pyarrow is not installed; run: pip install 'siglip-port\[embed\]'$"
    with pytest.raises(MissingExtraError, match=message) as raised:
        require("transformers", "pyarrow")
    assert raised.value.name == "pyarrow"


def test_extras_match_pyproject() -> None:
    """Every extra exists and installs its packages."""
    content = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    extras = content["project"]["optional-dependencies"]
    for package, extra in EXTRAS.items():
        assert any(re.match(rf"{package}\b", requirement) for requirement in extras[extra])
    assert set(EXTRAS.values()) == set(extras)
    assert extras["parity"] == content["dependency-groups"]["reference"]

"""Optional dependencies."""

from __future__ import annotations

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


def test_every_extra_is_in_pyproject() -> None:
    """With the packages that it is there for."""
    content = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    extras = content["project"]["optional-dependencies"]
    for package, extra in EXTRAS.items():
        assert any(requirement.startswith(package) for requirement in extras[extra])
    assert set(EXTRAS.values()) == set(extras)
    assert extras["parity"] == content["dependency-groups"]["reference"]

"""The generic harness does not depend on SigLIP, and could be a separate package."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import siglip_port.parity

ROOT = Path(siglip_port.parity.__file__).parent
SIGLIP = ROOT / "siglip"
THIRD_PARTY = {"torch", "numpy", "PIL", "jinja2", "safetensors"}
SHARED = {"siglip_port.text", "siglip_port.atomic", "siglip_port.__version__"}

GENERIC_FILES = sorted(path for path in ROOT.rglob("*.py") if not path.is_relative_to(SIGLIP))


def imported_modules(path: Path) -> Iterator[str]:
    """Yield the full names of all modules that a file imports, at any level."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def is_allowed(name: str) -> bool:
    if name.startswith("siglip_port."):
        is_generic = not name.startswith("siglip_port.parity.siglip")
        is_shared = any(name.startswith(shared) for shared in SHARED)
        return is_shared or (name.startswith("siglip_port.parity") and is_generic)
    package = name.partition(".")[0]
    return package in THIRD_PARTY or package in sys.stdlib_module_names


@pytest.mark.parametrize("path", GENERIC_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_generic_harness_does_not_import_siglip(path: Path) -> None:
    assert [name for name in imported_modules(path) if not is_allowed(name)] == []


def test_harness_import_does_not_import_siglip() -> None:
    program = (
        "import sys, siglip_port.parity.report.html;"
        "print(*[name for name in sys.modules if name.startswith('siglip_port.parity.siglip')])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert run.stdout.split() == []


def top_level_modules(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports at module level."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield f"{node.module}"


@pytest.mark.parametrize("path", sorted(SIGLIP.glob("*.py")), ids=lambda path: path.name)
def test_parity_works_without_optimize_and_embed(path: Path) -> None:
    """Functions that judge an engine import `siglip_port.optimize` when called."""
    for name in top_level_modules(path):
        assert not name.startswith(("siglip_port.optimize", "siglip_port.embed")), name

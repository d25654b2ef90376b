"""The public names, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import siglip_port
from tests.helpers.checkpoints import MakeCheckpoint

ROOT = Path(__file__).parent.parent


def test_public_names() -> None:
    assert siglip_port.__all__ == sorted(
        siglip_port.__all__, key=lambda name: (not name.isupper(), name)
    )
    for name in siglip_port.__all__:
        assert getattr(siglip_port, name).__doc__, name
    assert (ROOT / "siglip_port" / "py.typed").is_file()


def test_import_cost() -> None:
    """Importing the package imports no optional or heavy dependency."""
    code = (
        "import sys, siglip_port, siglip_port.checkpoint, siglip_port.parity.compare;"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    imported = set(process.stdout.split())
    assert {"torch", "safetensors", "siglip_port"} <= imported
    assert not imported & {
        "transformers",
        "huggingface_hub",
        "PIL",
        "matplotlib",
        "pyarrow",
        "timm",
        "httpx",
        "typer",
        "rich",
    }


def test_model_import_is_minimal() -> None:
    code = (
        "import sys, siglip_port.model;"
        "print(*(name for name in sys.modules if name.startswith('siglip_port.')))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert set(process.stdout.split()) <= {
        "siglip_port.config",
        "siglip_port.model",
        "siglip_port.patches",
        "siglip_port.validation",
    }


def test_load_import_cost(checkpoint: MakeCheckpoint) -> None:
    """Loading must not use `meta` kernels implemented in Python: 900 modules, 3 s, 160 MB."""
    code = (
        "import sys, torch, siglip_port.checkpoint, siglip_port.hub.repository;"
        "before = set(sys.modules);"
        "siglip_port.SigLipVisionModel.from_hf(sys.argv[1]); print(*set(sys.modules) - before)"
    )
    command = [sys.executable, "-c", code, str(checkpoint())]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(process.stdout.split()) < 20


def imported_packages(path: Path) -> set[str]:
    """Return the top-level packages that a module imports, anywhere in it."""
    packages = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            packages.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                packages.add(name.value.partition(".")[0])
    return packages


def test_transformers_not_imported() -> None:
    importers = []
    for path in (ROOT / "siglip_port").rglob("*.py"):
        if "transformers" in imported_packages(path):
            importers.append(path.relative_to(ROOT).as_posix())
    folder = "siglip_port/parity/siglip"
    # The second one is a program of its own, which runs with other releases.
    assert sorted(importers) == [f"{folder}/reference.py", f"{folder}/second_reference_script.py"]


def test_demonstration_script() -> None:
    script = ROOT / "scripts" / "run_siglip_vision.py"
    process = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert process.stdout == "Output shape: torch.Size([1, 196, 768])\n"

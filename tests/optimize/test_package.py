"""`siglip_port.optimize` is callable for every import order, and optional."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import siglip_port
from siglip_port.optimize.selection import optimize

PACKAGE = Path(siglip_port.__file__).parent

IMPORTS = (
    "import siglip_port; from siglip_port import optimize",
    "from siglip_port import optimize; import siglip_port",
    "import siglip_port; optimize = siglip_port.optimize",
    "import siglip_port.optimize; from siglip_port import optimize",
    "import siglip_port.optimize.onednn; from siglip_port import optimize",
    "from siglip_port import optimize; import siglip_port.optimize.export",
    "import siglip_port; from siglip_port.optimize import optimize",
)

CALL = """
config = siglip_port.SigLipVisionConfig(
    embed_dim=8, image_size=16, num_attention_heads=2, num_encoder_blocks=1, mlp_hidden_dim=8
)
model = siglip_port.SigLipVisionModel(config)
for call in (optimize, siglip_port.optimize):
    assert call(model, engines=[]).choice.engine == "eager"
assert siglip_port.optimize.ENGINES
assert siglip_port.optimize.selection.ROUNDS
"""

WITHOUT_BOTH = """
import sys
sys.modules.update({"siglip_port.optimize": None, "siglip_port.embed": None})
import siglip_port.cli.app, siglip_port.parity, siglip_port.visualize
"""

WITHOUT_EMBED = """
import sys
sys.modules["siglip_port.embed"] = None
import siglip_port.optimize.export
"""

RUN_EACH_IN_FRESH_PROCESS = """
import os, sys, torch  # only torch is imported before the fork
torch.set_num_threads(1)
for program in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        assert not any(name.startswith("siglip_port") for name in sys.modules)
        exec(program, {})
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, program
"""


def run_in_fresh_processes(*programs: str) -> None:
    subprocess.run([sys.executable, "-c", RUN_EACH_IN_FRESH_PROCESS, *programs], check=True)


def test_callable_for_every_import_order() -> None:
    run_in_fresh_processes(*(imports + CALL for imports in IMPORTS))


def test_import_without_optimize_and_embed() -> None:
    run_in_fresh_processes(WITHOUT_BOTH, WITHOUT_EMBED)


@pytest.mark.parametrize("folder", ["optimize", "embed"])
def test_no_module_level_imports(folder: str) -> None:
    """Only `embed` may import `optimize`."""
    importers = []
    for path in PACKAGE.rglob("*.py"):
        if PACKAGE / folder in path.parents or PACKAGE / "embed" in path.parents:
            continue
        if re.search(rf"^(from|import) siglip_port\.{folder}\b", path.read_text(), re.MULTILINE):
            importers.append(path.name)
    assert importers == []


def test_signature() -> None:
    assert inspect.signature(siglip_port.optimize) == inspect.signature(optimize)
    with pytest.raises(ValueError, match="model must be a SigLipVisionModel, got int"):
        siglip_port.optimize(1)  # type: ignore[arg-type]

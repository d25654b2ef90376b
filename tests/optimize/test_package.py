"""`siglip_port.optimize` is a package and can be called, whatever is imported first."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import siglip_port
from siglip_port.optimize.selection import optimize

IMPORTS = (
    "import siglip_port; from siglip_port import optimize",
    "from siglip_port import optimize; import siglip_port",
    "import siglip_port; optimize = siglip_port.optimize",
    "import siglip_port.optimize; from siglip_port import optimize",
    "import siglip_port.optimize.onednn; from siglip_port import optimize",
    "from siglip_port import optimize; import siglip_port.optimize.export",
    "import siglip_port; from siglip_port.optimize import optimize",
)

PROGRAM = """
import os, sys, torch  # torch is imported once; nothing of ours is

def use(imports):
    names = {}
    exec(imports, names)
    siglip_port = names["siglip_port"]
    config = siglip_port.SigLipVisionConfig(
        embed_dim=8, image_size=16, num_attention_heads=2, num_encoder_blocks=1, mlp_hidden_dim=8
    )
    model = siglip_port.SigLipVisionModel(config)
    for optimize in (names["optimize"], siglip_port.optimize):
        assert optimize(model, engines=[]).choice.engine == "eager"
    assert siglip_port.optimize.ENGINES
    assert siglip_port.optimize.selection.ROUNDS

torch.set_num_threads(1)
for imports in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        assert not any(name.startswith("siglip_port") for name in sys.modules)
        use(imports)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, imports
"""


def test_call_in_fresh_process() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM, *IMPORTS], check=True)


def test_call_has_signature_of_function() -> None:
    assert inspect.signature(siglip_port.optimize) == inspect.signature(optimize)
    with pytest.raises(ValueError, match="model must be a SigLipVisionModel, got a int"):
        siglip_port.optimize(1)  # type: ignore[arg-type]

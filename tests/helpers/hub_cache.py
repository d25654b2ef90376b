"""What tests look for in the Hub's cache, and processes that load from it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import torch

from siglip_port import SigLipVisionModel

NAME = "google/siglip-small"


WEIGHTS = "CDN RANGE model.safetensors"


BALLAST = 300_000  # bytes: of a text tower, so that the vision tower is the lesser part


def assert_same(model: SigLipVisionModel, folder: Path, **how: Any) -> None:  # noqa: ANN401
    """The same bits as read from the files themselves."""
    local = SigLipVisionModel.from_hf(folder, **how)
    assert model.config == local.config
    state = model.state_dict()
    assert state.keys() == local.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in local.state_dict().items())


def kept(cache: Path, pattern: str = "*.safetensors") -> list[Path]:
    """What is kept of towers in the cache."""
    return sorted(cache.rglob(f".siglip_port/{pattern}"))


CHILD = textwrap.dedent("""
    import signal, sys
    # Processes that a script runs in the background ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from siglip_port import SigLipVisionModel
    from siglip_port.hub import chunked_download
    chunked_download.CHUNK_BYTES = 4096
    model = SigLipVisionModel.from_hf(sys.argv[1], cache_dir=sys.argv[2])
    print(sum(float(t.double().sum()) for t in model.state_dict().values()))
""")


def start(cache: Path, first: str = "") -> subprocess.Popen[str]:
    """Loads the model in a process of its own, which runs `first` before."""
    command = [sys.executable, "-c", first + CHILD, NAME, str(cache)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )


def wait_for(happened: Any, seconds: float = 60) -> None:  # noqa: ANN401
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)

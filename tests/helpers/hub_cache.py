"""Checks of the Hub's cache."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from siglip_port import SigLipVisionModel

NAME = "google/siglip-small"

WEIGHTS = "CDN RANGE model.safetensors"
"""Key of the range requests for the weights: see `tests.helpers.hub_server.Hub`."""

HEADER_BYTES = 65_536
"""Size of the first request for a header."""

TEXT_MODEL_BYTES = 300_000
"""Size of the text model, which is larger than the vision encoder."""


def assert_same(
    model: SigLipVisionModel, folder: Path, *, pooling_head: bool | None = None
) -> None:
    """Check that a model equals the one that is loaded from a folder, bit for bit."""
    times = tuple(path.stat().st_mtime_ns for path in sorted(folder.iterdir()))
    local = load_local(folder, times, pooling_head)
    assert model.config == local.config
    state = model.state_dict()
    assert state.keys() == local.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in local.state_dict().items())


@lru_cache(maxsize=4)
def load_local(
    folder: Path, times: tuple[int, ...], pooling_head: bool | None
) -> SigLipVisionModel:
    """Return the model in a folder; the modification times are part of the cache key."""
    return SigLipVisionModel.from_hf(folder, pooling_head=pooling_head)


def own_files(cache: Path, pattern: str = "*.safetensors") -> list[Path]:
    """Return the files in `.siglip_port`, by default the vision encoders."""
    return sorted(cache.rglob(f".siglip_port/{pattern}"))


def read_files(folder: Path) -> dict[Path, bytes]:
    """Return the contents of all files below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def encoder_bytes(folder: Path) -> int:
    """Return the size of the vision encoder's tensors in a whole model, in bytes."""
    tensors = load_file(folder / "model.safetensors").items()
    return sum(tensor.nbytes for name, tensor in tensors if not name.startswith("text_model."))

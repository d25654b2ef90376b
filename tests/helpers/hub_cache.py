"""What tests look for in the Hub's cache."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from siglip_port import SigLipVisionModel

NAME = "google/siglip-small"

WEIGHTS = "CDN RANGE model.safetensors"
"""The key of the requests for parts of the weights: see `tests.helpers.hub_server.Hub`."""

HEADER_BYTES = 65_536
"""What is asked for of a header at once."""

TEXT_MODEL_BYTES = 300_000
"""Beside the vision encoder, so that it is the lesser part."""


def assert_same(
    model: SigLipVisionModel, folder: Path, *, pooling_head: bool | None = None
) -> None:
    """The same bits as read from the files themselves."""
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
    """The model in a folder whose files were written at these times."""
    return SigLipVisionModel.from_hf(folder, pooling_head=pooling_head)


def own_files(cache: Path, pattern: str = "*.safetensors") -> list[Path]:
    """What the port keeps in the cache for itself; by default, vision encoders."""
    return sorted(cache.rglob(f".siglip_port/{pattern}"))


def read_files(folder: Path) -> dict[Path, bytes]:
    """The contents of all files below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def encoder_bytes(folder: Path) -> int:
    """The size of the vision encoder's tensors in a whole model."""
    tensors = load_file(folder / "model.safetensors").items()
    return sum(tensor.nbytes for name, tensor in tensors if not name.startswith("text_model."))

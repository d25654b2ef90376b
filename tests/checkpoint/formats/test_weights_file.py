"""Reading one weights file: mapped, or copied if it is too large to map."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

from siglip_port import SigLipVisionModel
from siglip_port.checkpoint.formats import weights_file as files
from siglip_port.checkpoint.inspect import inspect_checkpoint
from siglip_port.hub import find_source
from tests.helpers.checkpoints import SMALL, MakeCheckpoint


def test_file_larger_than_memory(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sparse file of 60 GB is loaded, whether or not the machine can map it."""
    folder = checkpoint(SMALL)
    # Cloned, because the mapped file is overwritten below.
    expected = {
        name: tensor.clone()
        for name, tensor in SigLipVisionModel.from_hf(folder).state_dict().items()
    }
    path = folder / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    end = len(content) - 8 - length
    prefixed = {
        f"vision_tower.{name}": value for name, value in header.items() if name != "__metadata__"
    }
    rest = {
        "dtype": "BF16",
        "shape": [30_000, 1_000_000],
        "data_offsets": [end, end + 60_000_000_000],
    }
    text = json.dumps({**prefixed, "language_model.w": rest}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + content[8 + length :])
        file.truncate(8 + len(text) + end + 60_000_000_000)
    inspection = inspect_checkpoint(find_source(folder))
    assert inspection.problem is None
    assert inspection.total.bytes == end + 60_000_000_000

    def no_memory(*_: object, **__: object) -> None:
        raise RuntimeError(
            "unable to mmap 60000000000 bytes from file: Cannot allocate memory (12)"
        )

    monkeypatch.setattr(files, "safe_open", no_memory)
    model = SigLipVisionModel.from_hf(folder)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())

"""Files that are edited byte by byte, and what all that reads them must say."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from siglip_port import CheckpointError, SigLipVisionModel
from siglip_port.checkpoint import inspect_checkpoint
from siglip_port.hub import find_source

Json = dict[str, Any]


def assert_refused(source: Path, message: str) -> None:
    """Assert that all that reads raises a `CheckpointError` with this text, and nothing else."""
    with pytest.raises(CheckpointError, match=message):
        SigLipVisionModel.from_hf(source)
    try:
        inspection = inspect_checkpoint(find_source(source))
    except CheckpointError:
        return
    assert inspection.problem is not None


def assert_loads(source: Path, model: SigLipVisionModel) -> None:
    """Assert that a checkpoint holds the weights of a model."""
    state = SigLipVisionModel.from_hf(source).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def read_raw(path: Path) -> tuple[Json, bytes]:
    """Read the JSON and the data of a safetensors file, as they are."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_raw(path: Path, header: Json | bytes, data: bytes) -> None:
    """Write a safetensors file of any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)

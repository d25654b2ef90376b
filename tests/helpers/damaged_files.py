"""Edits of files byte by byte, and checks that every reader refuses or loads them."""

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
    """Assert that loading raises CheckpointError with this message, and that inspecting fails."""
    with pytest.raises(CheckpointError, match=message):
        SigLipVisionModel.from_hf(source)
    try:
        inspection = inspect_checkpoint(find_source(source))
    except CheckpointError:
        return
    assert inspection.problem is not None


def assert_loads(
    source: Path, model: SigLipVisionModel, *, preprocessing: str | None = None
) -> None:
    """Assert that a checkpoint contains the weights of a model."""
    state = SigLipVisionModel.from_hf(source, preprocessing=preprocessing).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def read_raw(path: Path) -> tuple[Json, bytes]:
    """Return the JSON header and the data of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_raw(path: Path, header: Json | bytes, data: bytes) -> None:
    """Write a safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)

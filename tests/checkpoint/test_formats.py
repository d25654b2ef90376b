from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from siglip_port import SigLipVisionModel
from siglip_port.checkpoint.formats import UnreadableFileError, open_tensors, read_header
from siglip_port.checkpoint.formats import weights_file as files
from siglip_port.checkpoint.inspect import inspect_checkpoint
from siglip_port.hub.repository import find_source
from tests.helpers.checkpoints import SMALL, MakeCheckpoint

TENSORS = {
    "a": torch.randn(3, 5),
    "b": torch.randn(4).bfloat16(),
    "c": torch.tensor(2.5),
    "d": torch.ones(2, 0),
    "e": torch.ones(3, dtype=torch.int64),
    "f": torch.ones(2).to(torch.float8_e4m3fn),
}


def test_the_header_is_what_safetensors_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(TENSORS, path, {"format": "pt"})
    header = read_header(path).tensors
    with safe_open(path, framework="pt") as file:
        assert header.keys() == set(file.keys())
        for name, stored in header.items():
            assert stored.shape == tuple(file.get_slice(name).get_shape())
            assert stored.dtype == file.get_slice(name).get_dtype()
            assert stored.nbytes == TENSORS[name].nbytes


def test_a_file_larger_than_memory(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 GB, all but the tower a hole in the file.

    Whether safetensors can map it depends on the machine.
    """
    folder = checkpoint(SMALL)
    # Copied: the file that they are mapped from is overwritten below.
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
    found = inspect_checkpoint(find_source(folder))
    assert found.problem is None
    assert found.whole.bytes == end + 60_000_000_000

    def no_memory(*_: object, **__: object) -> None:
        raise RuntimeError(
            "unable to mmap 60000000000 bytes from file: Cannot allocate memory (12)"
        )

    monkeypatch.setattr(files, "safe_open", no_memory)
    model = SigLipVisionModel.from_hf(folder)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@given(st.integers(0, 400), st.binary(min_size=1, max_size=3))
def test_a_damaged_header_is_read_or_refused(position: int, damage: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.safetensors")
        save_file(TENSORS, path)
        content = bytearray(path.read_bytes())
        content[position : position + len(damage)] = damage
        path.write_bytes(content)
        try:
            header = read_header(path).tensors
        except UnreadableFileError:
            return
        with open_tensors(path) as read:
            for name in header:
                try:
                    read(name)
                except UnreadableFileError:
                    return


def test_an_archive_begins_as_one(tmp_path: Path) -> None:
    """Found by scripts/fuzz/run.py: Python's zipfile is content with the directory at the end."""
    path = tmp_path / "tower.npz"
    np.savez(path, weight=np.ones(3, np.float32))
    assert read_header(path).tensors.keys() == {"weight"}
    content = path.read_bytes()
    path.write_bytes(content[:2] + b"?" + content[3:])
    with pytest.raises(
        UnreadableFileError, match="not a zip archive: it does not begin as one does"
    ):
        read_header(path)

"""The weights files of a checkpoint: single files, shards, pickles, and memory use."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    SiglipModel,
)

from siglip_port import CheckpointError, SigLipVisionModel
from siglip_port.checkpoint.inspect import inspect_checkpoint
from siglip_port.checkpoint.source import CONFIG, pickle_advice
from siglip_port.hub import find_source
from tests.helpers.checkpoints import (
    SMALL,
    MakeCheckpoint,
    adding,
    dropping,
    edit_config,
    edit_index,
    edit_tensors,
    shard,
)
from tests.helpers.damaged_files import assert_loads, assert_refused
from tests.helpers.npz_files import BIAS, Members, describe_array, npy_header
from tests.helpers.other_libraries import write_two_encoders

load = SigLipVisionModel.from_hf


def test_named_file(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    (folder / "model.safetensors").rename(folder / "encoder.v2.safetensors")
    assert load(str(folder / "encoder.v2.safetensors")).config == SMALL
    with pytest.raises(
        CheckpointError,
        match=r"contains neither model.safetensors nor .*found: config.json, encoder.v2",
    ):
        load(folder)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_permission_denied(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    for path in (folder / "model.safetensors", folder / "config.json", folder):
        mode = path.stat().st_mode
        path.chmod(0)
        with pytest.raises(CheckpointError, match="Permission denied"):
            load(folder)
        path.chmod(mode)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "weights.pth", "last.ckpt"])
def test_pickles_refused(checkpoint: MakeCheckpoint, name: str) -> None:
    folder = checkpoint()
    torch.save(load_file(folder / "model.safetensors"), folder / name)
    (folder / "model.safetensors").unlink()
    for source in (folder, folder / name):
        with pytest.raises(
            CheckpointError,
            match=rf"pickled weights \({name}\) are not supported: loading a pickle can run",
        ):
            load(source)
    (folder / name).rename(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not a valid safetensors file"):
        load(folder)
    assert pickle_advice(["model.safetensors", "config.json"]) == ""


def test_unneeded_shard(tmp_path: Path) -> None:
    write_two_encoders(tmp_path, SiglipModel)
    tensors = load_file(tmp_path / "model.safetensors")
    files = {name: f"{name.split('.')[0]}.safetensors" for name in tensors}
    for file in set(files.values()) - {"text_model.safetensors"}:
        save_file(
            {k: v.clone() for k, v in tensors.items() if files[k] == file},
            tmp_path / file,
            {"format": "pt"},
        )
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    provenance = load(tmp_path).provenance
    assert provenance is not None
    assert [file.name for file in provenance.files] == ["vision_model.safetensors"]


def test_missing_and_damaged_shards(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(CheckpointError) as error:
        load(folder)
    message = str(error.value)
    assert re.search(
        r"has no file model-00002-of-00003.safetensors; unreadable tensors \(2[12]\):", message
    )
    assert re.search(
        r"model-00003-of-00003.safetensors is not a valid safetensors file .*; unreadable tensors "
        r"\(2[12]\):",
        message,
    )


def test_tensor_missing_in_shard(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    shard(folder)
    for i in (1, 2, 3):
        edit_tensors(folder, dropping("head.probe"), f"model-{i:05}-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"missing tensors \(1\):\n    head.probe\n"):
        load(folder)


def test_tensors_that_the_index_does_not_list(sharded: Path, model: SigLipVisionModel) -> None:
    """The index is the authority: outdated copies and tensors of another save are not loaded."""
    tensors = load_file(sharded / "model-00001-of-00003.safetensors")
    name = min(tensors)
    second = "model-00002-of-00003.safetensors"
    extra = {name: tensors[name] + 1, "extra": tensors[name], "language_model.x": torch.ones(2)}
    edit_tensors(sharded, adding(extra), second)
    assert_loads(sharded, model)
    provenance = load(sharded).provenance
    assert provenance is not None
    assert provenance.ignored == {"not in the index": 3}
    assert inspect_checkpoint(find_source(sharded)).ignored == {"not in the index": 3}
    # The copy is loaded where the index lists it.
    edit_index(sharded, lambda index: {"weight_map": {**index["weight_map"], name: second}})
    stored = load(sharded).state_dict()
    changed = [
        key for key, tensor in model.state_dict().items() if not torch.equal(tensor, stored[key])
    ]
    assert changed


def test_thousands_of_shards(sharded: Path, model: SigLipVisionModel) -> None:
    """Shards without encoder tensors are not opened, and need not exist."""
    rest = {f"language_model.layers.{i}.w": f"rest-{i:05}.safetensors" for i in range(20_000)}
    edit_index(sharded, lambda index: {**index, "weight_map": {**rest, **index["weight_map"]}})
    assert_loads(sharded, model)


def test_linked_shards(sharded: Path, model: SigLipVisionModel) -> None:
    """Shards may be symbolic links, as in the Hub's cache."""
    (sharded.parent / "blobs").mkdir()
    for path in sharded.glob("*.safetensors"):
        path.symlink_to(path.rename(sharded.parent / "blobs" / path.stem))
    assert_loads(sharded, model)
    path = next(sharded.glob("*.safetensors"))
    path.unlink()
    path.symlink_to(path.name)
    assert_refused(sharded, f"{path.name}.*; unreadable tensors")


MEASURE = r"""
import re, sys
from pathlib import Path
from siglip_port import CheckpointError, SigLipVisionModel
def peak():  # of this process, in megabytes
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1000
for path in sys.argv[1:2] + sys.argv[1:]:  # the first path twice, to exclude imports
    before = peak()
    try:
        SigLipVisionModel.from_hf(path)
    except CheckpointError as error:
        print(peak() - before, str(error).splitlines()[0][-200:])
    else:
        raise SystemExit(f"{path} was loaded")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_bounded_memory(encoder_copy: Path, members: Members, tmp_path: Path) -> None:
    """Files that would need gigabytes are refused first; memory is measured in a subprocess."""
    wide = Path(shutil.copytree(encoder_copy, tmp_path / "wide"))
    edit_config(wide, hidden_size=10**9, num_attention_heads=1, intermediate_size=10**9)
    header = tmp_path / "header.npz"
    large = tmp_path / "large.npz"
    lists = Path(shutil.copytree(encoder_copy, tmp_path / "lists"))
    with zipfile.ZipFile(header, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(BIAS, b"\x93NUMPY\2\0" + struct.pack("<I", 1 << 28) + bytes(1 << 28))
    with zipfile.ZipFile(large, "w", zipfile.ZIP_DEFLATED) as archive:
        # Width 8192 instead of 24, 4 GB according to the headers and the directory.
        for name, content in members.items():
            shape = [
                {24: 8192, 12: 4096}.get(size, size) for size in np.load(io.BytesIO(content)).shape
            ]
            header_bytes = npy_header(describe_array(str(tuple(shape))))
            archive.writestr(name, header_bytes)
            archive.getinfo(name).file_size = len(header_bytes) + 4 * int(np.prod(shape))
    (lists / CONFIG).write_text('{"a": [' + "[]," * 1_000_000 + "[]]}")
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, (wide, header, large, lists))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    memory, messages = zip(
        *(line.split(maxsplit=1) for line in process.stdout.splitlines()[1:]), strict=True
    )
    assert "(hidden_size is 1000000000, but 24 in the weights;" in messages[0]
    assert "EOF: reading array header" in messages[1]
    assert "more than 100 times its size; nothing was loaded" in messages[2]
    assert max(map(int, memory[:3])) < 100
    assert int(memory[3]) < 200

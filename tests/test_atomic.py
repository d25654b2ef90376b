"""A write that is interrupted, wherever it is, leaves the old files or the new ones.

And never a mixture that loads.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from siglip_port import CheckpointError, SigLipVisionModel
from siglip_port.checkpoint.extract import extract
from tests.helpers.checkpoints import SMALL, MakeCheckpoint, edit_config
from tests.helpers.hub_cache import NAME, WEIGHTS, assert_same, kept, start
from tests.helpers.hub_server import Hub

ROOT = Path(__file__).resolve().parents[2]


linux = pytest.mark.skipif(
    sys.platform != "linux", reason="forks, and is stopped by Linux's limits"
)


def interrupted(*arguments: object) -> dict[tuple[str, int, str], int]:
    """How many attempts were disturbed so, ended so, and left so."""
    command = [sys.executable, "-m", "tests.helpers.interrupted_writes", *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert not run.returncode, run.stderr
    found = {(how, code, state): count for how, code, state, count in json.loads(run.stdout)}
    print(f"{arguments[:2]}: {found}")
    return found


@linux
@pytest.mark.parametrize(
    ("what", "where"),
    [
        ("save_hf", "over"),
        ("save_hf", "new"),
        ("save_timm", "over"),
        ("extract", "over"),
        ("extract", "new"),
    ],
)
def test_the_old_files_or_the_new(what: str, where: str, tmp_path: Path) -> None:
    found = interrupted(what, where, tmp_path)
    assert {state for _, _, state in found} <= {"old", "new", "both"}, found
    killed = sum(count for (how, code, _), count in found.items() if (how, code) == ("kill", -9))
    assert killed >= 8, found  # at as many different moments, at least
    assert found["kill", 0, "new"] == 1
    mixed = {how for (how, _, state) in found if state == "both"}
    assert mixed <= {"kill"}, found  # nobody is left to put the old files back
    assert (
        sum(count for (how, code, _), count in found.items() if (how, code) == ("full disk", 1))
        == 5
    ), found
    assert found["kill in a write", -25, "old"] == 5, found
    assert where == "new" or found["no permission", 1, "new"] == 1, (
        found
    )  # new: by the attempt before


def test_a_place_that_cannot_be_taken_leaves_the_old_files(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """The weights are moved before it is found out that the configuration cannot be."""
    model = SigLipVisionModel.from_hf(checkpoint())
    for write in (SigLipVisionModel.save_hf, extract):
        place = tmp_path / write.__name__
        (place / "config.json").mkdir(parents=True)
        (place / "model.safetensors").write_text("the old ones")
        with pytest.raises(CheckpointError, match="written"):
            write(model, place)
        assert (place / "model.safetensors").read_text() == "the old ones"
        assert sorted(path.name for path in place.iterdir()) == ["config.json", "model.safetensors"]


def test_files_of_two_checkpoints_do_not_load_as_one(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Shapes alone would not tell: the two differ in nothing but the activation."""
    model = SigLipVisionModel.from_hf(checkpoint())
    other = SigLipVisionModel.from_hf(checkpoint(), config=replace(SMALL, hidden_act="gelu"))
    for write in (SigLipVisionModel.save_hf, extract):
        one, two = tmp_path / f"one {write.__name__}", tmp_path / f"two {write.__name__}"
        write(model, one)
        write(other, two)
        assert SigLipVisionModel.from_hf(one).config.hidden_act == "gelu_pytorch_tanh"
        assert SigLipVisionModel.from_hf(two).config.hidden_act == "gelu"
        shutil.copy(one / "config.json", two)
        with pytest.raises(
            CheckpointError,
            match="the configuration is not the one that these weights were saved wit",
        ):
            SigLipVisionModel.from_hf(two)
        assert SigLipVisionModel.from_hf(two, config=other.config).config == other.config


@pytest.mark.parametrize(
    "changes", [{"attention_dropout": 0.5}, {"vision_use_head": ...}, {"comment": "mine"}]
)
def test_what_changes_no_tower_may_be_edited(
    changes: dict[str, Any], checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    SigLipVisionModel.from_hf(checkpoint()).save_hf(tmp_path / "saved")
    edit_config(tmp_path / "saved", **changes)
    assert_same(SigLipVisionModel.from_hf(tmp_path / "saved"), tmp_path / "saved")


def test_the_same_model_makes_the_same_file(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    SigLipVisionModel.from_hf(checkpoint()).save_hf(tmp_path / "first")
    first = (tmp_path / "first" / "model.safetensors").read_bytes()
    for i in range(8):  # safetensors by itself puts the metadata in one of two orders
        SigLipVisionModel.from_hf(checkpoint(name=f"{i}")).save_hf(tmp_path / f"again {i}")
        assert (tmp_path / f"again {i}" / "model.safetensors").read_bytes() == first


def test_a_cache_that_may_only_be_read_serves_what_it_holds(
    hub: Hub,
    folder: Path,
    cache: Path,
) -> None:
    SigLipVisionModel.from_hf(NAME, cache_dir=cache)
    for path in [*cache.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert_same(SigLipVisionModel.from_hf(NAME, cache_dir=cache, local_files_only=True), folder)
    finally:
        for path in [*cache.rglob("*")]:
            path.chmod(0o755)


@linux
def test_a_download_that_is_killed_anywhere(hub: Hub, folder: Path, tmp_path: Path) -> None:
    found = interrupted("cache", NAME, folder, tmp_path)
    assert {state for _, _, state in found} == {"right"}, found
    assert found["kill", -9, "right"] > 15
    assert found["kill", 0, "right"] == 1


@pytest.mark.parametrize("most", [100, 20_000])
def test_a_disk_that_fills_up_under_the_cache(
    most: int,
    hub: Hub,
    folder: Path,
    cache: Path,
) -> None:
    """By the kernel: no file may grow beyond `most` bytes."""
    child = start(
        cache, f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({most}, {most}))"
    )
    _, errors = child.communicate(timeout=120)
    assert "CheckpointError" in errors
    assert "could not be fetched: [Errno 27] File too large" in errors
    assert not kept(cache)
    assert_same(SigLipVisionModel.from_hf(NAME, cache_dir=cache), folder)
    assert hub.requests[WEIGHTS] > 1

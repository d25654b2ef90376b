"""A write that is interrupted, wherever it is, leaves the old files or the new ones.

And never a mixture that loads.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from siglip_port import CheckpointError, SigLipVisionModel
from siglip_port.checkpoint.extract import extract_model
from tests.helpers.checkpoints import MakeCheckpoint
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
def test_interrupted_save(what: str, where: str, tmp_path: Path) -> None:
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


def test_blocked_path(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """The weights are moved before it is found out that the configuration cannot be."""
    model = SigLipVisionModel.from_hf(checkpoint())
    for write in (SigLipVisionModel.save_hf, extract_model):
        place = tmp_path / write.__name__
        (place / "config.json").mkdir(parents=True)
        (place / "model.safetensors").write_text("the old ones")
        with pytest.raises(CheckpointError, match="written"):
            write(model, place)
        assert (place / "model.safetensors").read_text() == "the old ones"
        assert sorted(path.name for path in place.iterdir()) == ["config.json", "model.safetensors"]


def test_read_only_cache(
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
def test_interrupted_download(hub: Hub, folder: Path, tmp_path: Path) -> None:
    found = interrupted("cache", NAME, folder, tmp_path)
    assert {state for _, _, state in found} == {"right"}, found
    assert found["kill", -9, "right"] > 15
    assert found["kill", 0, "right"] == 1


@pytest.mark.parametrize("most", [100, 20_000])
def test_full_disk(
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

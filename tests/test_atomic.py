"""An interrupted write leaves the old files or the new ones, never a mixture that loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from siglip_port import CheckpointError, SigLipVisionModel
from siglip_port.atomic import write_text
from siglip_port.checkpoint.extract import extract_model
from tests.helpers.checkpoints import MakeCheckpoint

ROOT = Path(__file__).parents[1]
OPERATIONS = ("save_hf:over", "save_hf:new", "save_timm:over", "extract:over", "extract:new")

linux = pytest.mark.skipif(
    sys.platform != "linux", reason="forks, and is stopped by Linux's limits"
)

Outcomes = dict[tuple[str, int, str], int]
"""Counts by disturbance, exit code, and state of the folder."""


def run_interrupted(stride: int, folder: Path, *operations: object) -> dict[str, Outcomes]:
    arguments = [str(stride), str(folder), *map(str, operations)]
    command = [sys.executable, "-m", "tests.helpers.interrupted_writes", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert not run.returncode, run.stderr
    outcomes = {}
    for operation, rows in json.loads(run.stdout).items():
        outcomes[operation] = {
            (disturbance, code, state): n for disturbance, code, state, n in rows
        }
        print(f"{operation}: {outcomes[operation]}")
    return outcomes


def count(outcomes: Outcomes, disturbance: str, code: int) -> int:
    return sum(n for outcome, n in outcomes.items() if outcome[:2] == (disturbance, code))


def check_outcomes(operation: str, outcomes: Outcomes, kills: int, limits: int) -> None:
    """Check for old or new files after at least `kills` kills and at `limits` file size limits."""
    assert {state for _, _, state in outcomes} <= {"old", "new", "both"}, outcomes
    assert count(outcomes, "kill", -9) >= kills, outcomes  # each at another step
    assert outcomes["kill", 0, "new"] == 1
    mixed = {disturbance for disturbance, _, state in outcomes if state == "both"}
    assert mixed <= {"kill"}, outcomes  # a killed process cannot restore the old files
    assert count(outcomes, "full disk", 1) == limits, outcomes
    assert outcomes["kill in a write", -25, "old"] == limits, outcomes
    if operation.endswith(":over"):  # without old files, the previous attempt wrote the new ones
        assert outcomes["no permission", 1, "new"] == 1, outcomes


@linux
def test_interrupted_save(tmp_path: Path) -> None:
    """At every sixth step; the next test covers all steps."""
    for operation, outcomes in run_interrupted(6, tmp_path, *OPERATIONS).items():
        check_outcomes(operation, outcomes, kills=2, limits=2)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_interrupted_save_at_every_step(operation: str, tmp_path: Path) -> None:
    outcomes = run_interrupted(1, tmp_path, operation)[operation]
    check_outcomes(operation, outcomes, kills=8, limits=5)


def test_blocked_path(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The weights are moved before moving the configuration fails."""
    model = SigLipVisionModel.from_hf(checkpoint())
    for write in (SigLipVisionModel.save_hf, extract_model):
        target = tmp_path / write.__name__
        (target / "config.json").mkdir(parents=True)
        (target / "model.safetensors").write_text("the old ones")
        with pytest.raises(CheckpointError, match="written"):
            write(model, target)
        assert (target / "model.safetensors").read_text() == "the old ones"
        assert sorted(path.name for path in target.iterdir()) == [
            "config.json",
            "model.safetensors",
        ]


def test_failed_write_text_keeps_old_file(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    write_text(target, "one")
    with pytest.raises(UnicodeEncodeError):
        write_text(target, "\ud800")
    assert target.read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]

"""Loads from the Hub that are killed before each of their steps.

A step is a file system operation of a load in `.siglip_port`. Each load is a separate process.
After a kill, an offline load may fail, but an online load must be right.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from siglip_port import CheckpointError, SigLipVisionModel
from siglip_port.hub import chunked_download
from tests.helpers.interrupted_writes import EVENTS, at_event, kill, run_disturbed, undisturbed
from tests.helpers.sweeps import sample_ends

OWN_FOLDER = Path(".siglip_port")


@dataclass(frozen=True)
class Download:
    """A load of a repository into a cache, in separate processes."""

    name: str
    folder: Path
    cache: Path

    def load(self, *, local_files_only: bool = False) -> None:
        """Load, and exit with an error code if the weights are wrong."""
        model = SigLipVisionModel.from_hf(
            self.name, cache_dir=self.cache, local_files_only=local_files_only
        )
        expected = SigLipVisionModel.from_hf(self.folder).state_dict()
        for key, tensor in model.state_dict().items():
            if not torch.equal(tensor, expected[key]):
                os._exit(97)

    def load_offline_and_online(self) -> None:
        with contextlib.suppress(CheckpointError):
            self.load(local_files_only=True)
        self.load()

    def count_steps(self) -> int:
        """Return the number of steps of a load."""
        counter = self.cache.with_name("steps")

        def count() -> None:
            def hook(event: str, arguments: tuple[object, ...]) -> None:
                if event in EVENTS and any(str(OWN_FOLDER) in str(a) for a in arguments[:2]):
                    os.write(descriptor, b".")

            descriptor = os.open(counter, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            sys.addaudithook(hook)

        assert run_disturbed(self.load, count) == 0
        return counter.stat().st_size

    def is_right_after_kill(self, step: int) -> bool:
        """Kill a load before a step, load again, and return whether the weights are right."""
        shutil.rmtree(self.cache, ignore_errors=True)
        code = run_disturbed(self.load, at_event(step, OWN_FOLDER, kill))
        assert code == -9, code
        # in a separate process, so that no connection is shared
        return run_disturbed(self.load_offline_and_online, undisturbed) == 0


def kill_downloads(name: str, folder: Path, room: Path, interval: int) -> None:
    """Print JSON: number of steps, number of kills, and the steps with a wrong result.

    Args:
        name: Hub id.
        folder: Folder of the repository.
        room: Empty folder.
        interval: Interval of the steps at which loads are killed; includes the first and the last.
    """
    chunked_download.CHUNK_BYTES = 32768
    download = Download(name, folder, room / "cache")
    steps = download.count_steps()
    killed = sample_ends(range(steps), interval)
    wrong = [step for step in killed if not download.is_right_after_kill(step)]
    print(json.dumps({"steps": steps, "killed": len(killed), "wrong": wrong}))

"""Loads from the Hub again and again, killed each time before another step.

A step is a thing that a load does to what the port keeps in the cache. Each load is a process of
its own. Afterwards a load offline may be refused; online, it must be right.
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
    """A load of a repository into a cache, in processes of its own."""

    name: str
    served: Path
    cache: Path

    def load(self, *, local_files_only: bool = False) -> None:
        """Load, and end the process where the model is not right."""
        model = SigLipVisionModel.from_hf(
            self.name, cache_dir=self.cache, local_files_only=local_files_only
        )
        expected = SigLipVisionModel.from_hf(self.served).state_dict()
        for key, tensor in model.state_dict().items():
            if not torch.equal(tensor, expected[key]):
                os._exit(97)

    def load_offline_and_online(self) -> None:
        with contextlib.suppress(CheckpointError):
            self.load(local_files_only=True)
        self.load()

    def count_steps(self) -> int:
        """The number of things that a load does to what is kept of the vision encoder."""
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
        """Kill a load before one of its steps, and load again."""
        shutil.rmtree(self.cache, ignore_errors=True)
        code = run_disturbed(self.load, at_event(step, OWN_FOLDER, kill))
        assert code == -9, code
        # in a process of its own: no connection is shared
        return run_disturbed(self.load_offline_and_online, undisturbed) == 0


def kill_downloads(name: str, served: Path, room: Path, interval: int) -> None:
    """Print, as JSON, how many steps a load has, how many of them were its last, and the result.

    Args:
        name: the Hub id.
        served: the folder that holds what the Hub serves.
        room: an empty folder.
        interval: between the steps that are a load's last; the first and the last are among them.
    """
    chunked_download.CHUNK_BYTES = 32768
    download = Download(name, served, room / "cache")
    steps = download.count_steps()
    killed = sample_ends(range(steps), interval)
    wrong = [step for step in killed if not download.is_right_after_kill(step)]
    print(json.dumps({"steps": steps, "killed": len(killed), "wrong": wrong}))

"""Write a checkpoint many times, interrupted at a different step each time.

`python -m tests.helpers.interrupted_writes STRIDE FOLDER OPERATION...`, where an operation is
`save_hf`, `save_timm` or `extract`, followed by `:over` (to a folder with another checkpoint) or
`:new` (to a new folder). Each attempt is a forked process that is interrupted by

- SIGKILL before the n-th file system operation, for every STRIDE-th n;
- SIGXFSZ in the middle of a write, at a file size limit (RLIMIT_FSIZE);
- an error in place of that signal (EFBIG, as on a full disk), or missing permissions;
- an error (EIO) or Ctrl-C in place of the n-th file system operation.

Prints JSON by operation: disturbance, exit code, state of the folder, and the number of attempts
with this outcome.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from siglip_port import CheckpointError, SigLipVisionConfig, SigLipVisionModel
from siglip_port.checkpoint import extract_model
from tests.helpers.models import random_model

# NEW equals timm's vit_base_patch16_siglip_224 in everything but sizes; OLD differs only in the
# activation.
NEW = SigLipVisionConfig(
    embed_dim=24, num_attention_heads=2, num_encoder_blocks=2, mlp_hidden_dim=40
)
OLD = replace(NEW, hidden_act="gelu")

EVENTS = (
    "open",
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.chmod",
    "os.truncate",
    "os.link",
    "os.symlink",
)

Disturbance = Callable[[], None]
Files = dict[str, bytes]


class Outcome(NamedTuple):
    """The outcome of an attempt.

    Attributes:
        disturbance: Name of the disturbance.
        code: 0 for success, 1 for a CheckpointError, minus the number of a signal.
        state: State of the folder.
    """

    disturbance: str
    code: int
    state: str


def writer(name: str, model: SigLipVisionModel) -> Callable[[Path], object]:
    """Return the function that writes a model to a folder."""
    if name == "extract":
        return lambda folder: extract_model(model, folder)
    return model.save_hf if name == "save_hf" else model.save_timm


# --- disturbances ---------------------------------------------------------------------------------


def run_disturbed(run: Callable[[], object], disturb: Disturbance, folder: str = "") -> int:
    """Run a function in a separate process; return `Outcome.code`."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 99
    try:
        torch.set_num_threads(1)
        disturb()
        run()
        code = 0
    except CheckpointError as error:
        code = 1 if folder in str(error) else 98
    except KeyboardInterrupt:
        code = 130
    finally:
        os._exit(code)


def undisturbed() -> None:
    """Do nothing."""


def kill() -> None:
    """Kill the process."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    """Raise the error of a broken disk."""
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def interrupt() -> None:
    """Raise KeyboardInterrupt."""
    raise KeyboardInterrupt


def at_event(number: int, folder: Path, disturb: Disturbance) -> Disturbance:
    """Disturb the n-th file system operation in the folder."""

    def install() -> None:
        events = itertools.count()

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            is_in_folder = any(str(folder) in str(argument) for argument in arguments[:2])
            if event in EVENTS and is_in_folder and next(events) == number:
                disturb()

        sys.addaudithook(hook)

    return install


def limit_file_size(size: int, action: signal.Handlers) -> Disturbance:
    """Limit the file size to `size` bytes."""

    def install() -> None:
        signal.signal(signal.SIGXFSZ, action)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return install


def drop_permission() -> None:
    """Become a user without write permission."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


# --- saving ---------------------------------------------------------------------------------------


def read_files(folder: Path) -> Files:
    """Read the files of a checkpoint, without hidden files."""
    files: Files = {}
    if folder.exists():
        for path in folder.iterdir():
            if path.is_file() and not path.name.startswith("."):
                files[path.name] = path.read_bytes()
    return files


class Save:
    """Attempts to save a new model.

    Args:
        name: Name of the operation.
        over: Whether the target folder has an old checkpoint.
        room: Empty folder.
        stride: Interval of the steps at which attempts are killed.
    """

    def __init__(self, name: str, over: bool, room: Path, stride: int) -> None:
        self.name = name
        self.over = over
        self.room = room
        self.stride = stride
        self.folder = room / "checkpoint"
        self.models = {"old": random_model(OLD, seed=1), "new": random_model(NEW, seed=2)}
        self.write = writer(name, self.models["new"])
        self.before = room / "before"
        writer(name, self.models["old"])(self.before)
        self.write(room / "after")
        self.old_files = read_files(self.before) if over else {}
        self.new_files = read_files(room / "after")

    def outcomes(self) -> Iterator[Outcome]:
        """Try every disturbance."""
        number_of_events = 0
        for number in itertools.count(step=self.stride):
            outcome = self.attempt("kill", at_event(number, self.room, kill))
            yield outcome
            if outcome.code == 0:
                number_of_events = number
                break
        if self.name == "save_hf" and self.over:
            for disturb in (fail, interrupt):
                for number in range(0, number_of_events, self.stride):
                    yield self.attempt(disturb.__name__, at_event(number, self.room, disturb))
        size = len(self.new_files["model.safetensors"])
        for limit in (0, 7, 1000, size // 2, size - 1)[:: max(1, self.stride // 2)]:
            yield self.attempt("kill in a write", limit_file_size(limit, signal.SIG_DFL))
            yield self.attempt("full disk", limit_file_size(limit, signal.SIG_IGN))
        if self.over:
            self.folder.chmod(0o555)
            code = run_disturbed(self.run, drop_permission, str(self.folder))
            yield Outcome("no permission", code, self.judge(self.old_files))
            self.folder.chmod(0o755)

    def run(self) -> None:
        """Save the new model."""
        self.write(self.folder)

    def attempt(self, disturbance: str, disturb: Disturbance) -> Outcome:
        """Save in a disturbed process, and judge the folder; then save undisturbed."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.over:
            shutil.copytree(self.before, self.folder)
        code = run_disturbed(self.run, disturb, str(self.folder))
        state = self.judge(self.old_files)
        hidden = [*self.folder.glob(".*"), *self.room.glob(".*")]
        if disturbance not in ("fail", "interrupt") and code in (0, 1) and hidden:
            state = "left something behind"
        self.run()  # a second attempt must always succeed
        is_new = read_files(self.folder) == {**self.old_files, **self.new_files}
        if not is_new or self.judge({}) != "new":
            state += ", and a second attempt failed"
        for leftover in self.room.glob(".*"):
            shutil.rmtree(leftover)
        return Outcome(disturbance, code, state)

    def judge(self, old_files: Files) -> str:
        """Return the state of the folder: `old`, `new`, `both`, or a problem.

        `both` means a mixture that is refused or loads as the same model.
        """
        files = read_files(self.folder)
        for name, content in files.items():
            if content not in (old_files.get(name), self.new_files.get(name)):
                return f"half: {name}"
        if old_files.keys() - files.keys():
            return f"lost: {sorted(old_files.keys() - files.keys())}"
        state = "both"
        if files == old_files:
            state = "old"
        elif files == self.new_files:
            state = "new"
        if not files:
            return state
        return self.judge_model(
            state, is_whole={"model.safetensors", "config.json"} <= files.keys()
        )

    def judge_model(self, state: str, is_whole: bool) -> str:
        """Return the state if the folder loads accordingly, else a problem."""
        try:
            loaded = SigLipVisionModel.from_hf(self.folder)
        except CheckpointError as error:
            expected = "the configuration is not the one that the weights were saved with"
            if state == "both" and (expected in str(error) or not is_whole):
                return state
            return f"refused: {error}"
        for name, model in self.models.items():
            if state in (name, "both") and is_same_model(loaded, model):
                return state
        return "another model"


def is_same_model(a: SigLipVisionModel, b: SigLipVisionModel) -> bool:
    """Return whether two models are equal, bit for bit."""
    state = b.state_dict()
    is_equal = all(torch.equal(tensor, state[name]) for name, tensor in a.state_dict().items())
    return is_equal and a.config == b.config


def main() -> None:
    """Print the outcomes of every operation."""
    stride, room, *operations = sys.argv[1:]
    counts = {}
    for operation in operations:
        name, _, where = operation.partition(":")
        save = Save(name, where == "over", Path(room, name, where), int(stride))
        counts[operation] = Counter(save.outcomes())
    rows = {key: [[*outcome, n] for outcome, n in c.items()] for key, c in counts.items()}
    print(json.dumps(rows))


if __name__ == "__main__":
    main()

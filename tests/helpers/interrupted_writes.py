"""Writes a checkpoint again and again, stopped each time at another moment.

`python -m tests.helpers.interrupted_writes`.

Arguments: what to do (`save_hf`, `save_timm`, `extract`), to a folder that holds another checkpoint
    (`over`) or none
(`new`), and an empty folder to work in. Each attempt is a process of its own, forked from this one,
which ends

- by SIGKILL, before the n-th thing it does to the file system, for every n;
- by the kernel, in the middle of a write: SIGXFSZ at a number of bytes (RLIMIT_FSIZE);
- with an error in place of that signal (EFBIG: as of a full disk), or without permission;
- by an error (EIO), or by Ctrl-C, in place of the n-th thing it does to the file system.

`cache NAME FOLDER` instead of what and where: `from_hf(NAME)`, into an empty cache, of what FOLDER
holds; killed before the n-th thing it does to what is kept of the tower.

Prints JSON: for each attempt, what was found in the folder afterwards.
"""

from __future__ import annotations

import contextlib
import errno
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

import torch

from siglip_port import CheckpointError, SigLipVisionConfig, SigLipVisionModel
from siglip_port.checkpoint.extract import extract_model
from siglip_port.hub import partial_download as towers
from siglip_port.parity.stress_weights import randomise

# As timm's vit_base_patch16_siglip_224 in what shapes do not show; the other differs in nothing
# else.
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


def model(config: SigLipVisionConfig, seed: int) -> SigLipVisionModel:
    """A tower whose every parameter is random."""
    made = SigLipVisionModel(config).eval()
    randomise(made, seed=seed)
    return made


def writers(new: SigLipVisionModel) -> dict[str, Callable[[Path], object]]:
    """The operations."""
    return {
        "save_hf": new.save_hf,
        "save_timm": new.save_timm,
        "extract": lambda folder: extract_model(new, folder),
    }


def attempt(write: Callable[[Path], object], folder: Path, limit: Callable[[], None]) -> int:
    """Runs it in a process of its own; returns how that ended.

    0 well, 1 by a CheckpointError, minus a signal.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 99
    try:
        torch.set_num_threads(1)
        limit()
        write(folder)
        code = 0
    except CheckpointError as error:
        code = 1 if str(folder) in str(error) else 98
    except KeyboardInterrupt:
        code = 130
    finally:
        os._exit(code)


def kill() -> None:
    """Ends the process as nothing else does."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    """As a disk that is broken."""
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def interrupt() -> None:
    """As Ctrl-C."""
    raise KeyboardInterrupt


def at(n: int, folder: Path, disturb: Callable[[], None]) -> Callable[[], None]:
    """Disturbs the n-th event in or around the folder."""

    def install() -> None:
        left = [n]

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            if event in EVENTS and any(str(folder) in str(argument) for argument in arguments[:2]):
                left[0] -= 1
                if left[0] == -1:
                    disturb()

        sys.addaudithook(hook)

    return install


def file_size(most: int, action: signal.Handlers) -> Callable[[], None]:
    """Lets no file grow beyond `most` bytes."""

    def install() -> None:
        signal.signal(signal.SIGXFSZ, action)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    return install


def without_permission() -> None:
    """Becomes a user who may write nowhere here."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint; what is hidden is none."""
    if not folder.exists():
        return {}
    return {
        p.name: p.read_bytes()
        for p in folder.iterdir()
        if p.is_file() and not p.name.startswith(".")
    }


def judge(
    folder: Path,
    old: dict[str, bytes],
    new: dict[str, bytes],
    states: dict[str, dict[str, torch.Tensor]],
) -> str:
    """Says what is there.

    `old`, `new`, `both` (refused, or the same tower either way), or what is wrong.
    """
    found = contents(folder)
    for name, content in found.items():
        if content not in (old.get(name), new.get(name)):
            return f"half: {name}"
    if old.keys() - found.keys():
        return f"lost: {sorted(old.keys() - found.keys())}"
    which = "old" if found == old else "new" if found == new else "both"
    if not found:
        return which
    try:
        loaded = SigLipVisionModel.from_hf(folder)
    except CheckpointError as error:
        whole = "model.safetensors" in found and "config.json" in found
        expected = "the configuration is not the one that these weights were saved with"
        return (
            which
            if which == "both" and (expected in str(error) or not whole)
            else f"refused: {error}"
        )
    for name, config in (("old", OLD), ("new", NEW)):
        same = all(torch.equal(t, states[name][key]) for key, t in loaded.state_dict().items())
        if same and loaded.config == config and which in (name, "both"):
            return which
    return "another tower"


def attempts(what: str, where: str, room: Path) -> Iterator[tuple[str, int, str]]:
    """Tries everything; yields how an attempt was disturbed, how it ended, and what was found."""
    old, new = model(OLD, 1), model(NEW, 2)
    write = writers(new)[what]
    before, after = room / "before", room / "after"
    writers(old)[what](before)
    write(after)
    olds, news = contents(before) if where == "over" else {}, contents(after)
    states = {"old": old.state_dict(), "new": new.state_dict()}
    folder = room / "checkpoint"

    def one(how: str, limit: Callable[[], None]) -> tuple[str, int, str]:
        shutil.rmtree(folder, ignore_errors=True)
        if where == "over":
            shutil.copytree(before, folder)
        code = attempt(write, folder, limit)
        found = judge(folder, olds, news, states)
        if (
            how not in ("fail", "interrupt")
            and code in (0, 1)
            and [*folder.glob(".*"), *room.glob(".*")]
        ):
            found = "left something behind"
        write(folder)  # whatever is there, a second attempt does it
        if contents(folder) != {**olds, **news} or judge(folder, {}, news, states) != "new":
            found += ", and a second attempt failed"
        for leftover in room.glob(".*"):
            shutil.rmtree(leftover)
        return how, code, found

    for n in range(1000):
        how, code, found = one("kill", at(n, room, kill))
        yield how, code, found
        if code == 0:
            break
    for disturb in (fail, interrupt) if (what, where) == ("save_hf", "over") else ():
        for i in range(n):
            yield one(disturb.__name__, at(i, room, disturb))
    size = len(news["model.safetensors"])
    for most in (0, 7, 1000, size // 2, size - 1):
        yield one("kill in a write", file_size(most, signal.SIG_DFL))
        yield one("full disk", file_size(most, signal.SIG_IGN))
    if where == "over":
        (room / "checkpoint").chmod(0o555)
        folder.chmod(0o555)
        code = attempt(write, folder, without_permission)
        yield "no permission", code, judge(folder, olds, news, states)
        folder.chmod(0o755)


def cache_attempts(name: str, served: Path, room: Path) -> Iterator[tuple[str, int, str]]:
    """Kills a download at every step.

    Afterwards, offline, the tower is right or refused, and online it is right.
    """
    towers.PIECE = 32768
    cache = room / "cache"

    def load(_: Path, *, local_files_only: bool = False) -> None:
        model = SigLipVisionModel.from_hf(name, cache_dir=cache, local_files_only=local_files_only)
        expected = SigLipVisionModel.from_hf(served).state_dict()
        if not all(
            torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items()
        ):
            os._exit(97)

    def offline_and_online(_: Path) -> None:
        with contextlib.suppress(CheckpointError):
            load(cache, local_files_only=True)
        load(cache)

    for n in range(1000):
        shutil.rmtree(cache, ignore_errors=True)
        code = attempt(load, cache, at(n, Path(".siglip_port"), kill))
        after = attempt(
            offline_and_online, cache, lambda: None
        )  # in a process of its own: no connection is shared
        yield "kill", code, "right" if after == 0 else f"exit code {after}"
        if code == 0:
            break


def main() -> None:
    """Prints one line a kind of disturbance."""
    what, where, *folders = sys.argv[1:]
    paths = [Path(folder) for folder in folders]
    counted = Counter(
        cache_attempts(where, *paths) if what == "cache" else attempts(what, where, *paths)
    )
    print(json.dumps([[*key, count] for key, count in sorted(counted.items())]))


if __name__ == "__main__":
    main()

"""One damaged checkpoint: made from its number, loaded by the real `from_hf`, and judged.

For `run.py`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import get_args

from scripts.fuzz.mutants import (
    KINDS,
    NPZ,
    TRAP,
    Files,
    Mutant,
    change,
    join,
    make,
    mutate,
    noise,
    split,
)
from scripts.fuzz.oracle import Meaning, Reader, UnusableError, loaded
from siglip_port import CheckpointError, SigLipVisionModel
from tests.helpers.hub_server import Fault, Hub, Kind, Repository, files

MEMORY = 256 * 2**20
"""Bytes by which all mutants together may raise the peak of a process's resident memory."""

SECONDS = 20.0  # for one mutant

NAME = "fuzz/tower"  # on the Hub
OUTCOMES = ("refused", "identical", "as the file says", "FAILED")
FAULTY = (
    "HEAD config.json",
    "GET config.json",
    "HEAD *",
    "GET *",
    "CDN RANGE *",
    "CDN GET *",
    "GET api/*",
    "*",
)
STATUS = (400, 401, 403, 404, 408, 410, 416, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Result:
    """What has become of a mutant.

    Attributes:
        number: of the mutant.
        row: of the table.
        outcome: one of `OUTCOMES`.
        changed: whether anything was damaged at all.
        peak: the most memory that the process has had so far, in bytes.
        what: layout and mutators.
        error: of a failure.
    """

    number: int
    row: str
    outcome: str
    changed: bool
    peak: int
    what: str
    error: str = ""


class _HangError(BaseException):
    """It has taken too long. Not an `Exception`, which a loader might take for its own."""


class Fuzzer:
    """Makes mutants, loads them and judges the outcome.

    Args:
        seed: of all mutants.
        room: an empty folder.
        keep: where to copy what has failed to; None for nowhere.
        hub_share: of mutants that come from the Hub. If there are any, the client's waits are short
            from now on.

    Attributes:
        base: the most memory that the process has had before the first mutant, in bytes.
    """

    def __init__(
        self, seed: int, room: Path, hub_share: float = 0.0, keep: Path | None = None
    ) -> None:
        self._seed, self._room, self._share, self._keep = seed, room, hub_share, keep
        self._intact = {name: make(name) for name in KINDS}
        self._readers = {name: Reader(name) for name in KINDS}
        self._meanings = {
            name: reader.read(self._intact[name]) for name, reader in self._readers.items()
        }
        self._hub = _our_hub(room) if hub_share else None
        for (
            name,
            content,
        ) in self._intact.items():  # so that what is imported on the way counts as no mutant's
            folder = self._write(content)
            SigLipVisionModel.from_hf(folder / NPZ if KINDS[name].local else folder)
            if self._hub and not KINDS[name].local:
                self._from_hub(folder)
        self.base = _peak()

    def mutant(self, number: int) -> tuple[str, Mutant, Random]:
        """Makes the mutant of a number: its row in the table, and what decides over the rest."""
        rng = Random(f"{self._seed}-{number}")
        row = (
            rng.choice(("hub ranges", "hub faults", "hub cache"))
            if rng.random() < self._share
            else ""
        )
        names = [name for name in KINDS if not row or not KINDS[name].local]
        if row in ("", "hub ranges"):
            mutant = mutate(
                rng, self._intact, rng.choice([*names, "sharded"])
            )  # which alone has an index
            return row or mutant.group, mutant, rng
        name = rng.choice(("whole", "sharded") if row == "hub cache" else names)
        return row, Mutant(name, row, (), self._intact[name], changed=True), rng

    def run(self, number: int) -> Result:
        """Loads the mutant of a number, and judges."""
        row, mutant, rng = self.mutant(number)
        steps = list(mutant.steps)
        folder = self._write(mutant.files)
        try:
            load: Callable[[], SigLipVisionModel] = lambda: SigLipVisionModel.from_hf(  # noqa: E731
                folder / NPZ if KINDS[mutant.kind].local else folder
            )
            if row.startswith("hub"):
                load = self._prepare(row, folder, rng, steps)
            model, problem = _guarded(load)
            outcome = problem or self._judge(row, mutant, model)
            if row == "hub faults" and outcome in OUTCOMES:
                outcome = self._afterwards(folder, mutant) or outcome
            if files_in(folder) != mutant.files:
                outcome = "files have been changed or left behind in the checkpoint's folder"
        except Exception:
            outcome = f"the fuzzer's own fault: {traceback.format_exc()}"
        if (peak := _peak()) > self.base + MEMORY:
            outcome = f"{(peak - self.base) / 2**20:.0f} MiB of memory more than before the first mutant; {outcome}"
            self.base = peak
        failed = outcome not in OUTCOMES
        if failed and self._keep is not None:
            shutil.copytree(
                folder.parent, self._keep / str(number), symlinks=True, dirs_exist_ok=True
            )
        what = f"{mutant.kind}: {', '.join(steps)}"
        return Result(
            number,
            row,
            "FAILED" if failed else outcome,
            mutant.changed,
            peak,
            what,
            outcome if failed else "",
        )

    def _afterwards(self, folder: Path, mutant: Mutant) -> str:
        """Loads again, from a Hub that is well: what is wrong with that, or nothing."""
        assert self._hub is not None
        self._hub.reset()
        model, problem = _guarded(lambda: self._from_hub(folder))
        outcome = problem or self._judge("hub faults", mutant, model)
        return (
            "" if outcome == "identical" else f"afterwards, with nothing wrong any more: {outcome}"
        )

    def _judge(self, row: str, mutant: Mutant, model: SigLipVisionModel | None) -> str:
        """One of the outcomes, or what is wrong."""
        intact = self._meanings[mutant.kind]
        if model is None:
            return "refused" if mutant.changed else "intact files are refused"
        try:
            told = self._readers[mutant.kind].read(mutant.files)
        except UnusableError as why:
            return f"loaded, although {why}"
        found = loaded(model, mutant.files)
        if row in (
            "hub faults",
            "hub cache",
        ):  # where it cannot be had, the tower does without the preprocessor's file
            told, found, intact = (
                replace(meaning, processor=None) for meaning in (told, found, intact)
            )
        if found != told:
            return f"SILENTLY DIFFERENT: {_differences(told, found)}"
        return "identical" if found == intact else "as the file says"

    def _write(self, content: Files) -> Path:
        """Puts files into a new folder; a mapped one must not be written to.

        What was there before goes.
        """
        for old in self._room.iterdir():
            shutil.rmtree(old)
        folder = Path(tempfile.mkdtemp(dir=self._room), "checkpoint")
        folder.mkdir()
        for name, data in content.items():
            Path(folder, name).write_bytes(data)
        return folder

    def _from_hub(self, folder: Path, *, offline: bool = False) -> SigLipVisionModel:
        assert self._hub is not None
        self._hub.repositories[NAME] = Repository(folder)
        return SigLipVisionModel.from_hf(
            NAME, cache_dir=folder.parent / "cache", local_files_only=offline
        )

    def _prepare(
        self, row: str, folder: Path, rng: Random, steps: list[str]
    ) -> Callable[[], SigLipVisionModel]:
        """Has something go wrong at the Hub or in the cache; returns what loads then."""
        assert self._hub is not None
        self._hub.reset()
        if row == "hub faults":
            self._hub.faults = [_fault(rng)]
            steps.append(str(self._hub.faults[0]))
        if row != "hub cache":
            return lambda: self._from_hub(folder)
        if rng.random() < 0.5:  # an interrupted download
            works = Fault("none", "CDN RANGE *", times=rng.randrange(1, 8))
            self._hub.faults = [
                works,
                Fault("reset", "CDN RANGE *", times=None, after=rng.choice((None, 200))),
            ]
        with contextlib.suppress(CheckpointError):
            self._from_hub(folder)
        self._hub.reset()
        paths = sorted((folder.parent / "cache").rglob("*"))
        kept = [
            path
            for path in paths
            if path.is_file() and not path.is_symlink() and path.suffix != ".lock"
        ]
        kept += 3 * [
            path for path in kept if ".siglip_port" in path.parts
        ]  # ours, among many small ones of the client
        for path in rng.choices(kept, k=rng.choice((1, 1, 2))):
            content = path.read_bytes() if path.exists() else b""
            path.unlink(missing_ok=True)
            if rng.random() < 0.9:
                header, data = split(content)
                path.write_bytes(
                    rng.choice(
                        (noise(rng, content), join(header, change(rng, data)), b"", content + b"\0")
                    )
                )
            steps.append(f"damaged {path.relative_to(folder.parent)}")
        offline = rng.random() < 0.5
        return lambda: self._from_hub(folder, offline=offline)


def files_in(folder: Path) -> Files:
    """All files below a folder."""
    return {name: path.read_bytes() for name, path in files(folder).items()}


def _our_hub(room: Path) -> Hub:
    """Starts a Hub, and points this process's client at it.

    Nobody waits long, the client's own retries neither.
    """
    hub = Hub()
    os.environ |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(room.parent),
        "HF_HUB_VERBOSITY": "critical",
    }
    os.environ.pop("HF_HUB_OFFLINE", None)
    from huggingface_hub import constants

    from siglip_port.hub import chunked_download, retry

    logging.getLogger("siglip_port").setLevel(logging.CRITICAL)  # to say how it copes is no failure
    constants.HF_HUB_DOWNLOAD_TIMEOUT = constants.HF_HUB_ETAG_TIMEOUT = 0.3  # type: ignore[assignment]
    retry.BACKOFF_SECONDS = (0.01,) * len(retry.BACKOFF_SECONDS)  # type: ignore[assignment]
    chunked_download.CHUNK_BYTES = 512
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(0.01 if seconds else 0)
    return hub


def _fault(rng: Random) -> Fault:
    """Anything that goes wrong between the Hub and here, and can be noticed."""
    kind: Kind = rng.choice([kind for kind in get_args(Kind) if kind != "none"])
    request, times = rng.choice(FAULTY), rng.choice((1, 1, 2, None))
    # Ten bytes a request for ever would be progress, if a slow one.
    after = rng.choice((None, 0, 1, 10, 100) if times else (None, 0, 1000))
    if (
        kind == "wrong bytes"
    ):  # in a header, which is what is read first, or in what is fetched whole
        request, times = rng.choice(
            (("CDN RANGE *", 1), ("CDN GET *", times), ("GET *.json", times))
        )
    if kind == "stall":
        times = 1
    return Fault(
        kind,
        request,
        times,
        after,
        seconds=0.01 if kind == "slow" else None,
        status=rng.choice(STATUS),
    )


@contextmanager
def _timed() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise _HangError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _guarded(load: Callable[[], SigLipVisionModel]) -> tuple[SigLipVisionModel | None, str]:
    """Loads. Returns the model, None if it was refused; and what went wrong, if it was neither."""
    model, words = None, io.StringIO()
    try:
        with (
            warnings.catch_warnings(record=True) as warned,
            contextlib.redirect_stdout(words),
            contextlib.redirect_stderr(words),
            _timed(),
        ):
            warnings.simplefilter("always")
            with contextlib.suppress(CheckpointError):
                model = load()
    except _HangError:
        return None, f"nothing in {SECONDS:g} seconds"
    except Exception:
        return None, traceback.format_exc()
    if os.environ.pop(TRAP, ""):
        return None, "a pickle was loaded"
    if warned:
        return None, f"warned: {warned[0].message}"
    return model, f"printed: {words.getvalue()}" if words.getvalue() else ""


def _differences(told: Meaning, found: Meaning) -> str:
    """In what a model is not what the files say."""
    return "; ".join(
        f"the bits of {sum(a != b for a, b in zip(one, two, strict=False))} bytes of {len(one)} "
        f"and {len(two)}"
        if name == "state"
        else f"{name} is {two}, the files say {one}"
        for name, one, two in (
            (name, getattr(told, name), getattr(found, name)) for name in asdict(told)
        )
        if one != two
    )


def _peak() -> int:
    """The most memory that this process has had so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

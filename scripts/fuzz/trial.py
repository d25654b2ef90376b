"""One damaged checkpoint: made from its number, loaded by the real `from_hf`, and judged.

For `run.py`.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
import traceback
from dataclasses import dataclass, fields, replace
from pathlib import Path
from random import Random

from scripts.fuzz.fuzz_hub import Load, load_from_hub, prepare, start_hub
from scripts.fuzz.guard import peak_memory, run_guarded
from scripts.fuzz.intact import KINDS, NPZ, Files, make
from scripts.fuzz.mutants import Mutant, mutate
from scripts.fuzz.oracle import Meaning, Reader, meaning_of
from scripts.fuzz.stored_tensors import UnusableError
from siglip_port import SigLipVisionModel
from tests.helpers.hub_server import files

MEMORY = 256 * 2**20
"""Bytes by which all mutants together may raise the peak of a process's resident memory."""

SECONDS = 20.0  # for one mutant

OUTCOMES = ("refused", "identical", "as the file says", "FAILED")
HUB_ROWS = ("hub ranges", "hub faults", "hub cache")


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
        self.seed = seed
        self.room = room
        self.hub_share = hub_share
        self.keep = keep
        self.intact = {name: make(name) for name in KINDS}
        self.readers = {name: Reader(name) for name in KINDS}
        self.meanings = {n: reader.read(self.intact[n]) for n, reader in self.readers.items()}
        self.hub = start_hub(room) if hub_share else None
        # so that what is imported on the way counts as no mutant's
        for name, content in self.intact.items():
            folder = self.write(content)
            load_from_folder(folder, name)
            if self.hub and not KINDS[name].local:
                load_from_hub(self.hub, folder)
        self.base = peak_memory()

    def mutant(self, number: int) -> tuple[str, Mutant, Random]:
        """Make the mutant of a number: its row in the table, and what decides over the rest."""
        rng = Random(f"{self.seed}-{number}")
        row = ""
        if rng.random() < self.hub_share:
            row = rng.choice(HUB_ROWS)
        names = [name for name in KINDS if not row or not KINDS[name].local]
        if row in ("", "hub ranges"):
            # of the kinds, the sharded one alone has an index
            mutant = mutate(rng, self.intact, rng.choice([*names, "sharded"]))
            return row or mutant.group, mutant, rng
        name = rng.choice(("whole", "sharded") if row == "hub cache" else names)
        return row, Mutant(name, row, (), self.intact[name], changed=True), rng

    def run(self, number: int) -> Result:
        """Load the mutant of a number, and judge."""
        row, mutant, rng = self.mutant(number)
        steps = list(mutant.steps)
        folder = self.write(mutant.files)
        try:
            outcome = self.outcome(row, mutant, folder, rng, steps)
        except Exception:
            outcome = f"the fuzzer's own fault: {traceback.format_exc()}"
        peak = peak_memory()
        if peak > self.base + MEMORY:
            excess = (peak - self.base) / 2**20
            outcome = f"{excess:.0f} MiB of memory more than before the first mutant; {outcome}"
            self.base = peak
        error = ""
        if outcome not in OUTCOMES:
            error = outcome
            outcome = "FAILED"
            if self.keep is not None:
                target = self.keep / str(number)
                shutil.copytree(folder.parent, target, symlinks=True, dirs_exist_ok=True)
        what = f"{mutant.kind}: {', '.join(steps)}"
        return Result(number, row, outcome, mutant.changed, peak, what, error)

    def outcome(self, row: str, mutant: Mutant, folder: Path, rng: Random, steps: list[str]) -> str:
        """Load a mutant; return one of the outcomes, or what is wrong."""
        load: Load = functools.partial(load_from_folder, folder, mutant.kind)
        if row.startswith("hub"):
            assert self.hub is not None
            load = prepare(self.hub, row, folder, rng, steps)
        model, problem = run_guarded(load, SECONDS)
        outcome = problem or self.judge(row, mutant, model)
        if row == "hub faults" and outcome in OUTCOMES:
            outcome = self.load_again(folder, mutant) or outcome
        if files_in(folder) != mutant.files:
            return "files have been changed or left behind in the checkpoint's folder"
        return outcome

    def load_again(self, folder: Path, mutant: Mutant) -> str:
        """Load from a Hub that is well; return what is wrong with that, or nothing."""
        assert self.hub is not None
        self.hub.reset()
        model, problem = run_guarded(functools.partial(load_from_hub, self.hub, folder), SECONDS)
        outcome = problem or self.judge("hub faults", mutant, model)
        if outcome == "identical":
            return ""
        return f"afterwards, with nothing wrong any more: {outcome}"

    def judge(self, row: str, mutant: Mutant, model: SigLipVisionModel | None) -> str:
        """Return one of the outcomes, or what is wrong."""
        if model is None:
            return "refused" if mutant.changed else "intact files are refused"
        intact = self.meanings[mutant.kind]
        try:
            expected = self.readers[mutant.kind].read(mutant.files)
        except UnusableError as error:
            return f"loaded, although {error}"
        actual = meaning_of(model, mutant.files)
        if row in ("hub faults", "hub cache"):
            # where it cannot be had, the model does without the preprocessor's file
            expected = replace(expected, processor=None)
            actual = replace(actual, processor=None)
            intact = replace(intact, processor=None)
        if actual != expected:
            return f"SILENTLY DIFFERENT: {describe_differences(expected, actual)}"
        return "identical" if actual == intact else "as the file says"

    def write(self, content: Files) -> Path:
        """Put files into a new folder; a mapped one must not be written to.

        What was there before goes.
        """
        for old in self.room.iterdir():
            shutil.rmtree(old)
        folder = Path(tempfile.mkdtemp(dir=self.room), "checkpoint")
        folder.mkdir()
        for name, data in content.items():
            Path(folder, name).write_bytes(data)
        return folder


def load_from_folder(folder: Path, kind: str) -> SigLipVisionModel:
    """Load a checkpoint of a kind."""
    return SigLipVisionModel.from_hf(folder / NPZ if KINDS[kind].local else folder)


def files_in(folder: Path) -> Files:
    """Read all files below a folder."""
    return {name: path.read_bytes() for name, path in files(folder).items()}


def describe_differences(expected: Meaning, actual: Meaning) -> str:
    """Say in what a model is not what the files say."""
    differences = []
    for field in fields(Meaning):
        one = getattr(expected, field.name)
        two = getattr(actual, field.name)
        if one == two:
            continue
        if field.name == "state":
            count = sum(a != b for a, b in zip(one, two, strict=False))
            differences.append(f"the bits of {count} bytes of {len(one)} and {len(two)}")
        else:
            differences.append(f"{field.name} is {two}, the files say {one}")
    return "; ".join(differences)

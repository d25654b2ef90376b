"""One trial of `run.py`: a mutant is built from its number, loaded, and its outcome checked."""

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
from scripts.fuzz.oracle import ModelState, Reader, model_state
from scripts.fuzz.stored_tensors import UnusableError
from siglip_port import SigLipVisionModel
from tests.helpers.hub_server import files

MEMORY = 256 * 2**20
"""Bytes by which mutants may raise the peak resident memory of a process."""

SECONDS = 20.0
"""Time limit of one load."""

OUTCOMES = ("refused", "identical", "as described", "FAILED")
HUB_ROWS = ("hub ranges", "hub faults", "hub cache")


@dataclass(frozen=True)
class TrialResult:
    """The result of a mutant.

    Attributes:
        number: number of the mutant.
        row: row of the summary table.
        outcome: one of `OUTCOMES`.
        changed: whether the files differ from the intact ones.
        peak: peak resident memory of the process so far, in bytes.
        mutation: layout and mutators.
        error: description of a failure; empty for other outcomes.
    """

    number: int
    row: str
    outcome: str
    changed: bool
    peak: int
    mutation: str
    error: str = ""


class Fuzzer:
    """Builds mutants, loads them and checks the outcomes.

    Args:
        seed: seed of all mutants.
        workspace: an empty folder.
        hub_share: share of mutants that are loaded from the Hub, 0 to 1. Above 0, the timeouts of
            the Hub client in this process are shortened for good.
        keep: folder to copy the files of failed mutants to; None to discard them.

    Attributes:
        base: peak resident memory of the process before the first mutant, in bytes.
    """

    def __init__(
        self, seed: int, workspace: Path, hub_share: float = 0.0, keep: Path | None = None
    ) -> None:
        self.seed = seed
        self.workspace = workspace
        self.hub_share = hub_share
        self.keep = keep
        self.intact = {name: make(name) for name in KINDS}
        self.readers = {name: Reader(name) for name in KINDS}
        self.states = {n: reader.read(self.intact[n]) for n, reader in self.readers.items()}
        self.hub = start_hub(workspace) if hub_share else None
        # Load every kind once, so that the memory of imports is not attributed to a mutant.
        for name, content in self.intact.items():
            folder = self.write(content)
            load_from_folder(folder, name)
            if self.hub and not KINDS[name].local:
                load_from_hub(self.hub, folder)
        self.base = peak_memory()

    def mutant(self, number: int) -> tuple[str, Mutant, Random]:
        """Build a mutant; return its row in the table, the mutant, and the random generator."""
        rng = Random(f"{self.seed}-{number}")
        row = ""
        if rng.random() < self.hub_share:
            row = rng.choice(HUB_ROWS)
        names = [name for name in KINDS if not row or not KINDS[name].local]
        if row in ("", "hub ranges"):
            # "sharded" twice: it is the only kind with an index.
            mutant = mutate(rng, self.intact, rng.choice([*names, "sharded"]))
            return row or mutant.group, mutant, rng
        name = rng.choice(("whole", "sharded") if row == "hub cache" else names)
        return row, Mutant(name, row, (), self.intact[name], changed=True), rng

    def run(self, number: int) -> TrialResult:
        """Load a mutant and return its result."""
        row, mutant, rng = self.mutant(number)
        steps = list(mutant.steps)
        folder = self.write(mutant.files)
        try:
            outcome = self.outcome(row, mutant, folder, rng, steps)
        except Exception:
            outcome = f"error in the fuzzer: {traceback.format_exc()}"
        peak = peak_memory()
        if peak > self.base + MEMORY:
            excess = (peak - self.base) / 2**20
            outcome = f"memory grew by {excess:.0f} MiB since the first mutant; {outcome}"
            self.base = peak
        error = ""
        if outcome not in OUTCOMES:
            error = outcome
            outcome = "FAILED"
            if self.keep is not None:
                target = self.keep / str(number)
                shutil.copytree(folder.parent, target, symlinks=True, dirs_exist_ok=True)
        mutation = f"{mutant.kind}: {', '.join(steps)}"
        return TrialResult(number, row, outcome, mutant.changed, peak, mutation, error)

    def outcome(self, row: str, mutant: Mutant, folder: Path, rng: Random, steps: list[str]) -> str:
        """Load a mutant; return one of `OUTCOMES`, or a description of the failure."""
        load: Load = functools.partial(load_from_folder, folder, mutant.kind)
        if row.startswith("hub"):
            assert self.hub is not None
            load = prepare(self.hub, row, folder, rng, steps)
        model, problem = run_guarded(load, SECONDS)
        outcome = problem or self.check(row, mutant, model)
        if row == "hub faults" and outcome in OUTCOMES:
            outcome = self.load_again(folder, mutant) or outcome
        if files_in(folder) != mutant.files:
            return "checkpoint folder modified: files were changed or left behind"
        return outcome

    def load_again(self, folder: Path, mutant: Mutant) -> str:
        """Load from the Hub without faults; return the failure, or an empty string."""
        assert self.hub is not None
        self.hub.reset()
        model, problem = run_guarded(functools.partial(load_from_hub, self.hub, folder), SECONDS)
        outcome = problem or self.check("hub faults", mutant, model)
        if outcome == "identical":
            return ""
        return f"second load, without faults: {outcome}"

    def check(self, row: str, mutant: Mutant, model: SigLipVisionModel | None) -> str:
        """Compare a model with its files; return one of `OUTCOMES`, or the difference.

        Args:
            row: row of the summary table.
            mutant: the files.
            model: the model that was loaded from them; None if they were refused.
        """
        if model is None:
            return "refused" if mutant.changed else "intact files were refused"
        intact = self.states[mutant.kind]
        try:
            expected = self.readers[mutant.kind].read(mutant.files)
        except UnusableError as error:
            return f"loaded invalid files: {error}"
        actual = model_state(model, mutant.files)
        if row in ("hub faults", "hub cache"):
            # A preprocessor file that cannot be downloaded is optional.
            expected = replace(expected, processor=None)
            actual = replace(actual, processor=None)
            intact = replace(intact, processor=None)
        if actual != expected:
            return f"SILENTLY DIFFERENT: {describe_differences(expected, actual)}"
        return "identical" if actual == intact else "as described"

    def write(self, content: Files) -> Path:
        """Write files to a new folder and delete the previous one.

        The folder is new each time since a memory-mapped file must not be overwritten.
        """
        for old in self.workspace.iterdir():
            shutil.rmtree(old)
        folder = Path(tempfile.mkdtemp(dir=self.workspace), "checkpoint")
        folder.mkdir()
        for name, data in content.items():
            Path(folder, name).write_bytes(data)
        return folder


def load_from_folder(folder: Path, kind: str) -> SigLipVisionModel:
    """Load a checkpoint of a kind."""
    return SigLipVisionModel.from_hf(folder / NPZ if KINDS[kind].local else folder)


def files_in(folder: Path) -> Files:
    """Read all files in a folder tree."""
    return {name: path.read_bytes() for name, path in files(folder).items()}


def describe_differences(expected: ModelState, actual: ModelState) -> str:
    """Describe how a loaded model differs from what its files describe."""
    differences = []
    for field in fields(ModelState):
        expected_value = getattr(expected, field.name)
        actual_value = getattr(actual, field.name)
        if expected_value == actual_value:
            continue
        if field.name == "tensors":
            count = sum(a != b for a, b in zip(expected_value, actual_value, strict=False))
            differences.append(
                f"tensors: {count} bytes differ, {len(actual_value)} bytes in all, "
                f"expected {len(expected_value)}"
            )
        else:
            differences.append(f"{field.name}: {actual_value}, expected {expected_value}")
    return "; ".join(differences)

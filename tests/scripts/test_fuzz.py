"""scripts/fuzz: a short run; bugs of a loader are reported with the mutant's number."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from scripts.fuzz import fuzz_hub, run, trial
from scripts.fuzz.mutants import Mutant
from scripts.fuzz.trial import Fuzzer, TrialResult
from siglip_port import CheckpointError, SigLipVisionConfig, SigLipVisionModel
from siglip_port.checkpoint import hf_config
from siglip_port.checkpoint.formats import Header, parse_header
from siglip_port.checkpoint.formats import weights_file as files
from siglip_port.checkpoint.key_rules import Layout
from siglip_port.hub import chunked_download, partial_download
from tests.helpers.hub_server import Hub

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Fuzzer:
    return Fuzzer(0, tmp_path_factory.mktemp("workspace"))


def run_row(fuzzer: Fuzzer, row: str, count: int) -> Iterator[TrialResult]:
    """Run the first mutants of a row."""
    numbers = (number for number in range(10_000) if fuzzer.mutant(number)[0] == row)
    return (fuzzer.run(next(numbers)) for _ in range(count))


GROUPS = {
    "header",
    "length",
    "data",
    "index",
    "config",
    "preprocessor",
    "npz",
    "files",
    "several",
}


def run_campaign(count: int, folder: Path) -> dict[str, Any]:
    """Run a campaign without failures; return its report."""
    report = folder / "fuzz.json"
    arguments = ["--count", str(count), "--hub-share", "0.08", "--json", str(report)]
    command = [sys.executable, "scripts/fuzz/run.py", *arguments]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, ""), process.stdout + process.stderr
    assert f"HANDLED {count} of {count}" in process.stdout
    summary: dict[str, Any] = json.loads(report.read_text())
    total = summary["rows"]["all"]
    assert (total["tried"], total["FAILED"], summary["failed"]) == (count, 0, [])
    return summary


def test_short_campaign(tmp_path: Path) -> None:
    total = run_campaign(60, tmp_path)["rows"]["all"]
    assert all(total[outcome] > 1 for outcome in ("refused", "identical", "as described"))


@pytest.mark.slow
def test_campaign(tmp_path: Path) -> None:
    """Most mutants are refused, some are valid checkpoints of another model."""
    rows = run_campaign(150, tmp_path)["rows"]
    assert rows.keys() == GROUPS | {"hub ranges", "hub faults", "hub cache", "all"}
    assert rows["all"]["(unchanged)"] < 5
    outcomes = ("refused", "identical", "as described")
    assert all(rows["all"][outcome] > 10 for outcome in outcomes)


# --- loaders with bugs ----------------------------------------------------------------------------

Patch = pytest.MonkeyPatch
load = SigLipVisionModel.from_hf
config_of = SigLipVisionConfig.from_hf


def skip_size_check(patch: Patch) -> None:
    def parse_any_size(content: bytes, _: int) -> Header:
        ends = [
            tensor["data_offsets"][1]
            for name, tensor in json.loads(content).items()
            if name != "__metadata__"
        ]
        return parse_header(content, 8 + len(content) + max(ends))

    def no_memory(*_: object, **__: object) -> None:
        raise RuntimeError("unable to mmap")

    patch.setattr(files, "parse_header", parse_any_size)
    patch.setattr(files, "safe_open", no_memory)  # safetensors itself refuses such files


def ignore_unknown_keys(patch: Patch) -> None:
    patch.setattr(Layout, "reason_to_ignore", lambda *_: "unknown")


def default_invalid_fields(patch: Patch) -> None:
    def from_hf(content: dict[str, Any]) -> SigLipVisionConfig:
        try:
            return config_of(content)
        except ValueError:
            outer = content.get("vision_config", content)
            inner = {k: v for k, v in outer.items() if k != "layer_norm_eps"}
            return config_of(
                {**content, "vision_config": inner} if "vision_config" in content else inner
            )

    patch.setattr(SigLipVisionConfig, "from_hf", from_hf)


def ignore_settings(patch: Patch) -> None:
    patch.setattr(hf_config, "refuse_unknown_keys", lambda _: None)


def reuse_old_weights(patch: Patch) -> None:
    """Like a cache whose key is the configuration alone."""
    states: dict[object, Any] = {}

    def from_hf(source: Path) -> SigLipVisionModel:
        model = load(source)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        kind = model.config, next(iter(state.values())).dtype
        model.load_state_dict(states.setdefault(kind, state), assign=True)
        return model

    patch.setattr(SigLipVisionModel, "from_hf", from_hf)


def replace_damaged_by_random(patch: Patch) -> None:
    def from_hf(source: Path) -> SigLipVisionModel:
        try:
            return load(source)
        except CheckpointError:
            return SigLipVisionModel(
                SigLipVisionConfig(embed_dim=8, num_attention_heads=2, num_encoder_blocks=1)
            )

    patch.setattr(SigLipVisionModel, "from_hf", from_hf)


def swap_two_tensors(patch: Patch) -> None:
    def from_hf(source: Path) -> SigLipVisionModel:
        model = load(source)
        state = model.state_dict()
        query, key = (
            next(name for name in state if name.endswith(f"{part}_proj.weight")) for part in "qk"
        )
        model.load_state_dict({**state, query: state[key], key: state[query]}, assign=True)
        return model

    patch.setattr(SigLipVisionModel, "from_hf", from_hf)


@pytest.mark.parametrize(
    ("plant_bug", "row", "error"),
    [
        (
            skip_size_check,
            "data",
            "loaded invalid files: model.*safetensors: Error while deserializing",
        ),
        (ignore_unknown_keys, "header", "loaded invalid files: unknown tensors"),
        (default_invalid_fields, "config", "loaded invalid files: layer_norm_eps is"),
        (ignore_settings, "config", "loaded invalid files: settings of another model"),
        (reuse_old_weights, "data", "SILENTLY DIFFERENT: tensors: "),
        (replace_damaged_by_random, "files", "loaded invalid files: no weights"),
        (swap_two_tensors, "preprocessor", "SILENTLY DIFFERENT: tensors: "),
    ],
)
def test_broken_loader_detected(
    plant_bug: Callable[[Patch], None], row: str, error: str, fuzzer: Fuzzer, monkeypatch: Patch
) -> None:
    plant_bug(monkeypatch)
    for result in run_row(fuzzer, row, 300):
        if result.outcome == "FAILED" and re.search(error, result.error):
            break
    else:
        pytest.fail("the bug was not detected")
    monkeypatch.undo()
    assert fuzzer.run(result.number).outcome != "FAILED"


def cached_encoders(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*.safetensors") if ".siglip_port" in path.parts]


def test_damaged_cache_detected(hub: Hub, tmp_path: Path, monkeypatch: Patch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(trial, "start_hub", lambda _: hub)
    monkeypatch.setattr(fuzz_hub, "cached_files", cached_encoders)
    monkeypatch.setattr(chunked_download, "CHUNK_BYTES", 512)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    fuzzer = Fuzzer(4, tmp_path, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(
            partial_download.VisionDownload, "is_complete", lambda download: download.path.exists()
        )
        different = (
            r for r in run_row(fuzzer, "hub cache", 100) if r.error.startswith("SILENTLY DIFFERENT")
        )
        result = next(different)
    assert re.search(r"/\.siglip_port/.*\.safetensors$", result.mutation)
    assert fuzzer.run(result.number).outcome != "FAILED"


def misbehave(number: int, folder: Path) -> None:
    """Simulate a faulty loader; the fault depends on the number of the mutant."""
    match number:
        case 1:
            os._exit(3)
        case 3:
            os.kill(os.getpid(), signal.SIGKILL)
        case 4:
            raise KeyError("a")
        case 5:
            threading.Event().wait()
        case 6:
            b"x" * (trial.MEMORY + (200 << 20))
        case 7:
            print("hm")
        case 8:
            warnings.warn("hm", stacklevel=1)
        case 9:
            Path(folder, "left").write_text("behind")


# The threads of the tests' Hub server are idle when the fuzzer forks.
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_failures_reported(
    tmp_path: Path, monkeypatch: Patch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The report contains the number of the mutant."""
    report = tmp_path / "fuzz.json"
    keep = tmp_path / "keep"
    make_mutant = Fuzzer.mutant
    numbers: list[int] = []

    def record_number(self: Fuzzer, number: int) -> tuple[str, Mutant, Random]:
        numbers.append(number)
        return make_mutant(self, number)

    def load_with_fault(source: Path) -> SigLipVisionModel:
        if numbers:
            misbehave(numbers[-1], source.parent if source.suffix else source)
        return load(source)

    monkeypatch.setattr(trial, "SECONDS", 0.5)
    monkeypatch.setattr(Fuzzer, "mutant", record_number)
    monkeypatch.setattr(SigLipVisionModel, "from_hf", load_with_fault)
    mutants = ["--count", "12", "--seed", "3", "--hub-share", "0"]
    assert run.main([*mutants, "--json", str(report), "--keep", str(keep)]) == 1
    failures = json.loads(report.read_text())["failed"]
    errors = {failure["number"]: failure["error"] for failure in failures}
    assert errors[1] == "process died: exit code 3"
    assert errors[3] == "process died: signal 9"
    assert "KeyError: 'a'" in errors[4]
    assert errors[5] == "no result after 0.5 seconds"
    assert "MiB since the first mutant; " in errors[6]
    assert errors[7] == "printed: hm\n"
    assert errors[8] == "warned: hm"
    assert errors[9] == "checkpoint folder modified: files were changed or left behind"
    assert len(errors) == 8
    printed = capfd.readouterr().out
    assert "FAILED: --seed 3 --hub-share 0.0 --only 5\n" in printed
    assert "HANDLED 4 of 12" in printed
    assert {path.name for path in keep.iterdir()} == {"4", "5", "6", "7", "8", "9"}
    assert (keep / "9" / "checkpoint" / "left").read_text() == "behind"


def test_reproducible_by_number(
    fuzzer: Fuzzer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same_seed, other_seed = (Fuzzer(seed, tmp_path) for seed in (0, 1))
    mutants = [fuzzer.mutant(number)[:2] for number in range(30)]
    assert mutants == [same_seed.mutant(number)[:2] for number in range(30)]
    assert mutants != [other_seed.mutant(number)[:2] for number in range(30)]
    result = fuzzer.run(7)
    assert run.main(["--only", "7", "--hub-share", "0"]) == (result.outcome == "FAILED")
    assert (
        f"{result.outcome}: --seed 0 --hub-share 0.0 --only 7\n  {result.mutation}\n"
        in capsys.readouterr().out
    )

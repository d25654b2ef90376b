"""scripts/fuzz: a short run.

And whatever a loader may do wrong is seen, and told with the mutant's number.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.fuzz import run as fuzz
from scripts.fuzz import trial as fuzz_trial
from scripts.fuzz.trial import Fuzzer, Result
from siglip_port import CheckpointError, SigLipVisionConfig, SigLipVisionModel
from siglip_port.checkpoint.formats import Header, parse_header
from siglip_port.checkpoint.formats import weights_file as files
from siglip_port.checkpoint.key_rules import Layout
from siglip_port.hub import chunked_download, partial_download
from tests.helpers.hub_server import Hub

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Fuzzer:
    return Fuzzer(0, tmp_path_factory.mktemp("room"))


def some(fuzzer: Fuzzer, row: str, count: int) -> Iterator[Result]:
    """What becomes of the first mutants of a row."""
    numbers = (number for number in range(10_000) if fuzzer.mutant(number)[0] == row)
    return (fuzzer.run(next(numbers)) for _ in range(count))


def test_short_campaign(tmp_path: Path) -> None:
    """Nothing fails; and the damage is real.

    Most of it has to be refused, some of it makes another tower.
    """
    report = tmp_path / "fuzz.json"
    command = [
        sys.executable,
        "scripts/fuzz/run.py",
        "--count",
        "150",
        "--hub-share",
        "0.08",
        "--json",
        str(report),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert "HANDLED 150 of 150" in done.stdout
    found = json.loads(report.read_text())
    rows = found["rows"]
    groups = {
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
    assert rows.keys() == groups | {"hub ranges", "hub faults", "hub cache", "all"}
    assert (rows["all"]["tried"], rows["all"]["FAILED"], found["failed"]) == (150, 0, [])
    assert rows["all"]["(unchanged)"] < 5
    assert all(
        rows["all"][outcome] > 10 for outcome in ("refused", "identical", "as the file says")
    )


# --- loaders that are wrong -----------------------------------------------------------------------

Patch = pytest.MonkeyPatch
load = SigLipVisionModel.from_hf
config_of = SigLipVisionConfig.from_hf


def without_check_of_size(patch: Patch) -> None:
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
    patch.setattr(files, "safe_open", no_memory)  # which would refuse such files itself


def without_strictness(patch: Patch) -> None:
    patch.setattr(Layout, "reason_to_ignore", lambda *_: "whatever it is")


def with_defaults_for_what_is_wrong(patch: Patch) -> None:
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


def with_old_weights(patch: Patch) -> None:
    """As from a cache that goes by the names of tensors."""
    kept: dict[object, Any] = {}

    def from_hf(source: Path) -> SigLipVisionModel:
        model = load(source)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        kind = model.config, next(iter(state.values())).dtype
        model.load_state_dict(kept.setdefault(kind, state), assign=True)
        return model

    patch.setattr(SigLipVisionModel, "from_hf", from_hf)


def with_a_fresh_tower_for_a_damaged_one(patch: Patch) -> None:
    def from_hf(source: Path) -> SigLipVisionModel:
        try:
            return load(source)
        except CheckpointError:
            return SigLipVisionModel(
                SigLipVisionConfig(embed_dim=8, num_attention_heads=2, num_encoder_blocks=1)
            )

    patch.setattr(SigLipVisionModel, "from_hf", from_hf)


def with_two_tensors_exchanged(patch: Patch) -> None:
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
    ("make_wrong", "row", "error"),
    [
        (
            without_check_of_size,
            "data",
            "loaded, although model.*safetensors: Error while deserializing",
        ),
        (without_strictness, "header", "loaded, although tensors that nobody knows"),
        (with_defaults_for_what_is_wrong, "config", "loaded, although (layer_norm_)?eps is"),
        (with_old_weights, "data", "SILENTLY DIFFERENT: the bits of"),
        (with_a_fresh_tower_for_a_damaged_one, "files", "loaded, although there are no weights"),
        (with_two_tensors_exchanged, "preprocessor", "SILENTLY DIFFERENT: the bits of"),
    ],
)
def test_broken_loader_detected(
    make_wrong: Callable[[Patch], None], row: str, error: str, fuzzer: Fuzzer, monkeypatch: Patch
) -> None:
    make_wrong(monkeypatch)
    for result in some(fuzzer, row, 150):
        if result.outcome == "FAILED" and re.search(error, result.error):
            break
    else:
        pytest.fail("nothing was noticed")
    monkeypatch.undo()
    assert fuzzer.run(result.number).outcome != "FAILED"


def test_damaged_cache_detected(hub: Hub, tmp_path: Path, monkeypatch: Patch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(fuzz_trial, "_our_hub", lambda _: hub)
    monkeypatch.setattr(chunked_download, "CHUNK_BYTES", 512)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    fuzzer = Fuzzer(4, tmp_path, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(
            partial_download.VisionDownload, "is_complete", lambda download: download.path.exists()
        )
        different = (
            r for r in some(fuzzer, "hub cache", 100) if r.error.startswith("SILENTLY DIFFERENT")
        )
        result = next(different)
    assert "-tower-" in result.what
    assert fuzzer.run(result.number).outcome != "FAILED"


@pytest.mark.filterwarnings(
    "ignore:.*multi-threaded.*fork:DeprecationWarning"
)  # the tests' Hub is idle
def test_failures_reported(
    tmp_path: Path, monkeypatch: Patch, capfd: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "fuzz.json"
    kept = tmp_path / "kept"
    mutant = Fuzzer.mutant
    now = Counter[str]()

    def noted(self: Fuzzer, number: int) -> Any:  # noqa: ANN401
        now["number"] = number
        return mutant(self, number)

    def bad(source: Path) -> SigLipVisionModel:
        match now["number"]:
            case 1:
                os._exit(3)
            case 3:
                os.kill(os.getpid(), signal.SIGKILL)
            case 4:
                raise KeyError("a")
            case 5:
                threading.Event().wait()
            case 6:
                b"x" * (fuzz_trial.MEMORY + (200 << 20))
            case 7:
                print("hm")
            case 8:
                warnings.warn("hm", stacklevel=1)
            case 9:
                Path(source.parent if source.suffix else source, "left").write_text("behind")
        return load(source)

    monkeypatch.setattr(fuzz_trial, "SECONDS", 0.5)
    monkeypatch.setattr(Fuzzer, "mutant", noted)
    monkeypatch.setattr(SigLipVisionModel, "from_hf", bad)
    options = [
        "--count",
        "12",
        "--seed",
        "3",
        "--hub-share",
        "0",
        "--json",
        str(report),
        "--keep",
        str(kept),
    ]
    assert fuzz.main(options) == 1
    found = json.loads(report.read_text())
    errors = {failed["number"]: failed["error"] for failed in found["failed"]}
    assert errors[1] == "the process died: exit code 3"
    assert errors[3] == "the process died: signal 9"
    assert "KeyError: 'a'" in errors[4]
    assert errors[5] == "nothing in 0.5 seconds"
    assert "MiB of memory more than before the first mutant" in errors[6]
    assert errors[7] == "printed: hm\n"
    assert errors[8] == "warned: hm"
    assert errors[9] == "files have been changed or left behind in the checkpoint's folder"
    assert len(errors) == 8
    printed = capfd.readouterr().out
    assert "FAILED: --seed 3 --hub-share 0.0 --only 5\n" in printed
    assert "HANDLED 4 of 12" in printed
    assert {path.name for path in kept.iterdir()} == {"4", "5", "6", "7", "8", "9"}
    assert (kept / "9" / "checkpoint" / "left").read_text() == "behind"


def test_reproducible_by_number(
    fuzzer: Fuzzer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again, other = (Fuzzer(seed, tmp_path) for seed in (0, 1))
    mutants = [fuzzer.mutant(number)[:2] for number in range(30)]
    assert mutants == [again.mutant(number)[:2] for number in range(30)]
    assert mutants != [other.mutant(number)[:2] for number in range(30)]
    result = fuzzer.run(7)
    assert fuzz.main(["--only", "7", "--hub-share", "0"]) == (result.outcome == "FAILED")
    assert (
        f"{result.outcome}: --seed 0 --hub-share 0.0 --only 7\n  {result.what}\n"
        in capsys.readouterr().out
    )

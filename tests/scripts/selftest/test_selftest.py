"""The self-test's own test.

It must succeed where the gates have their power, and fail where one has lost it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import compare_origin
from siglip_port.parity import gates, mutants, selftest
from siglip_port.parity.mutation import Mutant
from siglip_port.parity.results import Finding, GateResult
from siglip_port.parity.selftest import Report, Result, examine, examine_harness, examine_shapes
from siglip_port.parity.siglip import cases as proof
from siglip_port.parity.siglip.cases import Case

SMALL = replace(
    proof.ODD,
    num_encoder_blocks=6,
    embed_dim=72,
    num_attention_heads=4,
    image_size=45,
    patch_size=7,
)
BY_NAME = {mutant.name: mutant for mutant in (*mutants.CATALOGUE, *mutants.LEGAL, *mutants.HARNESS)}
# One of each gate, and of each way to write a mutant down.
FEW = [
    "left_in_training",
    "eps_ignored",
    "k_bias_missing_once",
    "batch_leak",
    "gelu_exact",
    "input_bgr",
    "scale_none",
]


@pytest.fixture(scope="module")
def cases() -> Iterator[list[Case]]:
    with selftest.cases() as made:
        yield made


@pytest.mark.parametrize(
    "name", [*FEW, "ln_fast_variance", "split_interleaved", "as_it_is", "fused_qkv", "no_grad"]
)
def test_mutants_are_judged(cases: list[Case], name: str) -> None:
    result = examine(BY_NAME[name], cases)
    assert result.passed, result


@pytest.mark.parametrize(
    "name", ["float32_ln", "one_by_one", "linear_patches", "in_place_stream", "mlp_in_chunks"]
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_legal_variants_pass_beside_each_attention(name: str, attention: str) -> None:
    with selftest.cases(seed=7) as made:
        for case in made:
            case.attentions = (attention,)
        result = examine(BY_NAME[name], made)
    assert result.passed, result


@pytest.mark.parametrize(
    "name", ["naflex_mask_ignored", "naflex_positions_swapped", "interp_antialias"]
)
def test_pictures_of_other_shapes(name: str) -> None:
    assert examine_shapes(BY_NAME[name]).passed
    unchanged = dataclasses.replace(BY_NAME[name], edits=())
    assert not examine_shapes(unchanged).noticed


@pytest.mark.parametrize(
    "gate", ["environment", "config", "weights", "liveness", "semantics", "interface", "rounding"]
)
def test_a_gate_that_is_off_is_found_out(
    cases: list[Case], gate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gate has mutants of its own: that others notice them too does not hide it."""
    own = next(m for m in mutants.CATALOGUE if m.gate == gate and m.subject == "port")
    assert examine(own, cases).passed
    monkeypatch.setattr(
        proof if gate == "interface" else gates, gate, lambda *_, **__: GateResult(gate, 1, "off")
    )
    result = examine(own, cases)
    assert not result.passed
    assert (
        Report([result])
        .failures[0]
        .startswith(f"{own.name}: must be noticed by {gate}, was noticed by ")
    )


def test_a_wrong_name_is_found_out(cases: list[Case]) -> None:
    result = examine(dataclasses.replace(BY_NAME["ln_eps_once"], guilty="4.ln2"), cases)
    assert result.noticed
    assert not result.named
    assert "named wrongly: semantics: encoder.layers.5.layer_norm2" in Report([result]).failures[0]


def test_a_false_alarm_is_found_out(cases: list[Case]) -> None:
    result = examine(dataclasses.replace(BY_NAME["ln_eps_once"], kind="legal"), cases)
    assert Report(alarms=[("seed 1", result)]).failures == [
        "false alarm: ln_eps_once (seed 1): semantics, rounding "
    ]


@pytest.mark.parametrize(
    "name", ["bound_wide", "weights_close", "dead_models", "nan_passes", "no_forcing"]
)
def test_mistakes_of_the_harness_are_found_out(name: str) -> None:
    assert examine_harness(BY_NAME[name], SMALL)


def test_a_harmless_change_of_the_harness_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    harmless = Mutant(
        "harmless",
        "a bound twice as wide",
        guilty="ln_eps_once as_it_is softmax_bf16",
        edits=(("parity/gates", "FLOAT64_BOUND = 1e-10", "FLOAT64_BOUND = 2e-10"),),
        subject="harness",
    )
    assert examine_harness(harmless, SMALL) == ""
    assert Report(harness={"harmless": ""}).failures == [
        "mistake in the harness not noticed: harmless"
    ]


@pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)  # since Python 3.12
def test_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a short catalogue: exit code 0, and 3 where a gate has lost its power."""
    few = [BY_NAME[name] for name in ("ln_eps_once", "interp_nearest", "ln_bf16")]
    monkeypatch.setattr(mutants, "CATALOGUE", few)
    monkeypatch.setattr(mutants, "LEGAL", [BY_NAME["as_it_is"]])
    monkeypatch.setattr(mutants, "HARNESS", [BY_NAME["one_output"]])
    threads = torch.get_num_threads()
    assert compare_origin.main(["--selftest", "--json", str(tmp_path / "self.json")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        "POWER: notices 3 of 3 mistakes, names the place of 3 of 3, 0 false alarms in 1 "
        "runs of legal variants; 1 of 1 mistakes in the harness itself are found out"
    )
    found = json.loads((tmp_path / "self.json").read_text())
    assert found["passed"] is True
    assert found["mistakes"][0]["noticed"].keys() == {"semantics"}
    assert torch.get_num_threads() == threads
    monkeypatch.setattr(gates, "FLOAT64_BOUND", 1e-2)
    assert compare_origin.main(["--selftest"]) == 3
    out = capsys.readouterr().out
    assert "ln_eps_once: must be noticed by semantics, was noticed by nothing" in out
    assert out.splitlines()[-1].startswith("LOST POWER: ")


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)  # since Python 3.12
def test_on_all_cores_it_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the catalogue; and a gate that is off is off in every process."""
    few = ("gelu_exact_once", "input_bgr", "left_in_training", "interp_nearest", "eps_ignored")
    monkeypatch.setattr(mutants, "CATALOGUE", [BY_NAME[name] for name in few])
    monkeypatch.setattr(mutants, "HARNESS", [BY_NAME["weights_close"]])
    monkeypatch.setattr(gates, "config", lambda *_: GateResult("config", 1, "off"))
    monkeypatch.setattr(mutants, "LEGAL", [BY_NAME["as_it_is"]])
    args, told = argparse.Namespace(full=False, device="cpu"), list[str]()

    def progress(items: Iterator[object], what: str, total: int) -> Iterator[object]:
        told.append(f"{what}: {total}")
        return items

    def found(processes: int) -> Report:
        with proof.random_case(SMALL, "N1", gates=proof.ALL_GATES[:-1]) as made:
            monkeypatch.setattr(selftest, "cases", lambda *_, **__: contextlib.nullcontext([made]))
            return selftest.examine_all(args, progress, processes)

    one, two = found(1), found(2)
    assert selftest.as_json(one) == selftest.as_json(two)
    assert repr(one) == repr(two)  # as text, since NaN is not equal to itself
    assert [r.mutant.pixels for r in two.results] == [m.pixels for m in mutants.CATALOGUE]
    assert [failure.split(":")[0] for failure in two.failures] == ["eps_ignored"]
    assert told == ["mistakes: 5", "legal variants, seed 1234: 1", "mistakes in the harness: 1"] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_ctrl_c_ends_all_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def press(_: object) -> str:
        os.kill(os.getppid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # a terminal sends it to every process
        return ""

    monkeypatch.setattr(mutants, "CATALOGUE", [])
    monkeypatch.setattr(mutants, "LEGAL", [])
    monkeypatch.setattr(mutants, "HARNESS", mutants.HARNESS[:1])
    monkeypatch.setattr(selftest, "cores", lambda _: 2)
    monkeypatch.setattr(selftest, "examine_harness", lambda mutant, _: press(mutant))
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored by what a script runs in the background
    try:
        assert compare_origin.main(["--selftest"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "interrupted: nothing was compared\n"
    assert not multiprocessing.active_children()


def test_the_census(tmp_path: Path) -> None:
    text = selftest.census_text(tmp_path / "absent.json")
    assert [line.split(":")[0] for line in text.splitlines()[::2]] == list(gates.MEANING)
    report = Report([Result(BY_NAME["ln_eps_once"], {"semantics": Finding("differs")})])
    (tmp_path / "found.json").write_text(json.dumps(selftest.as_json(report)))
    assert "  notices 1 of 1 mistakes, alone: ln_eps_once" in selftest.census_text(
        tmp_path / "found.json"
    )


def test_calibration(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(mutants, "LEGAL", [BY_NAME["as_it_is"], BY_NAME["hand_written_ln"]])
    monkeypatch.setattr(mutants, "ROUNDING", [BY_NAME["ln_bf16"]])
    assert compare_origin.main(["--calibrate"]) == 0
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .startswith("HOLDS: 3 x the reference's own distance from float64")
    )
    monkeypatch.setattr(mutants, "ROUNDING", [dataclasses.replace(BY_NAME["as_it_is"], kind="bug")])
    assert compare_origin.main(["--calibrate"]) == 3
    assert capsys.readouterr().out.splitlines()[-1].startswith("DOES NOT HOLD: ")

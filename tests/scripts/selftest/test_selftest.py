"""The self-test's own test.

It must succeed where the gates have their power, and fail where one has lost it.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import compare_origin
from scripts.selftest import catalog, harness, runner
from scripts.selftest.examination import (
    Result,
    examine,
    examine_images,
    examine_shapes,
    make_cases,
)
from scripts.selftest.harness import examine_harness
from scripts.selftest.mutant import HarnessMutant
from scripts.selftest.mutant import replace as replace_attribute
from scripts.selftest.report import Report, to_json
from scripts.selftest.runner import SMALL, SelfTest
from siglip_port.parity import bounds, gates
from siglip_port.parity.results import Finding, GateResult
from siglip_port.parity.siglip import interface
from siglip_port.parity.siglip.cases import ALL_GATES, Case
from siglip_port.parity.siglip.census import SUMMARY, census, summarize

BY_NAME = {mutant.name: mutant for mutant in (*catalog.MUTANTS, *catalog.EQUIVALENT)}
HARNESS = {mutant.name: mutant for mutant in catalog.HARNESS}

forks = pytest.mark.skipif(sys.platform != "linux", reason="forks")
multi_threaded = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"  # since Python 3.12
)

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def cases() -> Iterator[list[Case]]:
    with make_cases(config=SMALL) as checkpoints:
        yield checkpoints


# One of each gate, and of each way to break the port.
@pytest.mark.parametrize(
    "name",
    [
        "left_in_training",
        "eps_ignored",
        "k_bias_missing_once",
        "batch_leak",
        "gelu_exact",
        "input_bgr",
        "scale_none",
        "ln_fast_variance",
        "split_interleaved",
        "as_it_is",
        "fused_qkv",
        "no_grad",
    ],
)
def test_mutants_are_judged(cases: list[Case], name: str) -> None:
    result = examine(BY_NAME[name], cases)
    assert result.passed, result


def test_a_mutant_does_not_leak_into_the_next(cases: list[Case]) -> None:
    first = cases[:1]
    for name in ("rows_norms_swapped", "act_ignored", "ln_gain_missing", "pooled_half"):
        assert examine(BY_NAME[name], first).passed
    assert not examine(BY_NAME["as_it_is"], first).detected


def test_equivalent_variants_pass_beside_one_attention_alone(cases: list[Case]) -> None:
    beside_eager = [replace(case, attentions=("eager",), reference_runs={}) for case in cases]
    assert examine(BY_NAME["float32_ln"], beside_eager).passed


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["float32_ln", "one_by_one", "linear_patches", "in_place_stream", "mlp_in_chunks"]
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equivalent_variants_pass_beside_each_attention(name: str, attention: str) -> None:
    with make_cases(seed=7) as checkpoints:
        for case in checkpoints:
            case.attentions = (attention,)
        result = examine(BY_NAME[name], checkpoints)
    assert result.passed, result


@pytest.mark.parametrize(
    "name", ["naflex_mask_ignored", "naflex_positions_swapped", "interp_antialias"]
)
def test_images_of_other_shapes(name: str) -> None:
    assert examine_shapes(BY_NAME[name]).passed
    assert not examine_shapes(replace(BY_NAME[name], patch=None)).detected


@pytest.mark.parametrize(
    "name",
    [
        "image_patches_few",
        pytest.param("image_float64", marks=pytest.mark.slow),
        pytest.param("image_palette_alpha", marks=pytest.mark.slow),
    ],
)
def test_images(name: str) -> None:
    """The finest ones."""
    assert examine_images(BY_NAME[name]).passed
    assert not examine_images(replace(BY_NAME[name], patch=None)).detected


GATES = {
    "environment": (gates, "check_environment"),
    "config": (gates, "check_config"),
    "weights": (gates, "check_weights"),
    "sensitivity": (gates, "check_sensitivity"),
    "numerics": (gates, "check_numerics"),
    "interface": (interface, "check_interface"),
    "rounding": (gates, "check_rounding"),
}


@pytest.mark.parametrize("gate", ALL_GATES)
def test_a_gate_that_is_off_is_found_out(
    cases: list[Case], gate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gate has mutants of its own: that others detect them too does not hide it."""
    own = next(m for m in catalog.MUTANTS if m.gate == gate and m.subject == "port")
    judged = cases[1:2] if gate == "rounding" else cases[:1]
    assert examine(own, judged).passed
    monkeypatch.setattr(*GATES[gate], lambda *_, **__: GateResult(gate, 1, "off"))
    result = examine(own, judged)
    assert not result.passed
    failure = Report([result]).failures[0]
    assert failure.startswith(f"{own.name}: must be detected by {gate}, was detected by ")


def test_a_false_location_is_found_out(cases: list[Case]) -> None:
    result = examine(replace(BY_NAME["ln_eps_once"], locations="4.ln2"), cases[:1])
    assert result.detected
    assert not result.located
    assert "named wrongly: numerics: encoder.layers.5.layer_norm2" in Report([result]).failures[0]


def test_a_false_alarm_is_found_out(cases: list[Case]) -> None:
    result = examine(replace(BY_NAME["ln_eps_once"], is_equivalent=True), cases)
    assert Report(alarms=[("seed 1", result)]).failures == [
        "false alarm: ln_eps_once (seed 1): numerics, rounding "
    ]


@pytest.mark.parametrize(
    "name", ["bound_wide", "weights_close", "dead_models", "nan_passes", "no_forcing"]
)
def test_bugs_of_the_harness_are_found_out(name: str) -> None:
    """All of them are in the self-test."""
    assert examine_harness(HARNESS[name], SMALL)


def test_a_harmless_change_of_the_harness_is_not() -> None:
    harmless = HarnessMutant(
        "harmless",
        "a bound twice as wide",
        ("ln_eps_once", "as_it_is", "softmax_bf16"),
        replace_attribute(bounds, "FLOAT64_BOUND", 2e-10),
    )
    assert examine_harness(harmless, SMALL) == ""
    assert Report(harness={"harmless": ""}).failures == [
        "bug in the harness not detected: harmless"
    ]


@pytest.mark.slow
def test_every_bug_of_the_harness_is_judged_on_mutants_that_a_sound_one_judges_rightly() -> None:
    shown_by = {name: None for mutant in catalog.HARNESS for name in mutant.shown_by}
    sound = HarnessMutant("sound", "nothing", tuple(shown_by), lambda stack: None)
    assert examine_harness(sound, SMALL) == ""


Shorten = Callable[..., None]


@pytest.fixture
def shorten(monkeypatch: pytest.MonkeyPatch, cases: list[Case]) -> Shorten:
    """Shortens the catalog, and makes the models small."""

    def shorten(mutants: list[str], equivalent: list[str], bugs: list[str]) -> None:
        monkeypatch.setattr(catalog, "MUTANTS", [BY_NAME[name] for name in mutants])
        monkeypatch.setattr(catalog, "EQUIVALENT", [BY_NAME[name] for name in equivalent])
        monkeypatch.setattr(catalog, "HARNESS", [HARNESS[name] for name in bugs])

    small = contextlib.nullcontext(cases)
    monkeypatch.setattr(runner, "make_cases", lambda *_, **__: small)
    return shorten


@multi_threaded
@pytest.mark.fresh_process
def test_the_command(
    shorten: Shorten,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On a short catalog: exit code 0, and 3 where a gate has lost its power."""
    shorten(["ln_eps_once", "interp_nearest", "ln_bf16"], ["as_it_is"], ["one_output"])
    threads = torch.get_num_threads()
    assert compare_origin.main(["--selftest", "--json", str(tmp_path / "self.json")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        "POWER: detects 3 of 3 bugs, names the place of 3 of 3, 0 false alarms in 1 "
        "runs of equivalent variants; 1 of 1 bugs in the harness itself are found out"
    )
    written = json.loads((tmp_path / "self.json").read_text())
    assert written["passed"] is True
    assert written["mistakes"][0]["noticed"].keys() == {"numerics"}
    assert torch.get_num_threads() == threads
    monkeypatch.setattr(bounds, "FLOAT64_BOUND", 1e-2)
    assert compare_origin.main(["--selftest"]) == 3
    out = capsys.readouterr().out
    assert "ln_eps_once: must be detected by numerics, was detected by nothing" in out
    assert out.splitlines()[-1].startswith("LOST POWER: ")


@pytest.mark.slow
@multi_threaded
@pytest.mark.fresh_process
def test_in_full(
    shorten: Shorten, cases: list[Case], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shorten(["gelu_exact", "ln_bf16"], ["as_it_is"], ["one_output"])
    before = [case.attentions for case in cases]
    assert compare_origin.main(["--selftest", "--full", "--json", str(tmp_path / "all.json")]) == 0
    assert "(and says what 2 look like), 0 false alarms in 16 runs" in capsys.readouterr().out
    runs = [run["run"] for run in json.loads((tmp_path / "all.json").read_text())["false_alarms"]]
    assert runs[:4] == [
        "seed 1234, 1 threads",
        "seed 1234, 2 threads",
        "seed 1234, sdpa alone",
        "seed 1234, eager alone",
    ]
    for case, attentions in zip(cases, before, strict=True):
        case.attentions = attentions
        case.reference_runs = {}


@forks
@multi_threaded
@pytest.mark.fresh_process
@pytest.mark.slow
def test_on_all_cores_it_finds_the_same(
    shorten: Shorten, cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the catalog; and a gate that is off is off in every process."""
    names = ["gelu_exact_once", "input_bgr", "left_in_training", "interp_nearest", "eps_ignored"]
    shorten(names, ["as_it_is"], ["weights_close"])
    monkeypatch.setattr(gates, "check_config", lambda *_: GateResult("config", 1, "off"))
    shown: list[str] = []

    def progress(items: Iterator[Any], what: str, total: int) -> Iterator[Any]:
        shown.append(f"{what}: {total}")
        return items

    one = SelfTest("cpu", False, progress, 1).run()
    two = SelfTest("cpu", False, progress, 2).run()
    assert to_json(one) == to_json(two)
    assert repr(one) == repr(two)  # as text, since NaN is not equal to itself
    assert [result.mutant for result in two.results] == catalog.MUTANTS
    assert [result.mutant.edit for result in two.results] == [m.edit for m in catalog.MUTANTS]
    assert [failure.split(":")[0] for failure in two.failures] == ["eps_ignored"]
    expected = ["mistakes: 5", "equivalent variants, seed 1234: 1", "bugs in the harness: 1"]
    assert shown == expected * 2


@forks
@multi_threaded
@pytest.mark.fresh_process
def test_ctrl_c_ends_all_processes(
    shorten: Shorten, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def press(*_: object) -> str:
        os.kill(os.getppid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # a terminal sends it to every process
        return ""

    shorten([], [], ["itself"])
    monkeypatch.setattr(runner, "count_processes", lambda _: 2)
    monkeypatch.setattr(harness, "examine_harness", press)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored by what a script runs in the background
    try:
        assert compare_origin.main(["--selftest"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "interrupted: nothing was compared\n"
    assert not multiprocessing.active_children()


def test_recorded_census_is_that_of_the_recorded_selftest() -> None:
    """`python -m siglip_port.parity.siglip.census docs/selftest.json` writes it."""
    recorded = json.loads((ROOT / "docs" / "selftest.json").read_text())
    assert json.loads(SUMMARY.read_text()) == summarize(recorded)


def test_the_census() -> None:
    report = Report([Result(BY_NAME["ln_eps_once"], {"numerics": Finding("differs")})])
    text = census(summarize(to_json(report)))
    assert [line.split(":")[0] for line in text.splitlines()[:-1:3]] == list(gates.MEANING)
    assert "  detects 1 of 1 bugs, alone: ln_eps_once" in text


def test_calibration(
    cases: list[Case], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts.selftest import calibration

    small = contextlib.nullcontext(cases)
    monkeypatch.setattr(calibration, "make_cases", lambda *_, **__: small)
    variants = [BY_NAME["as_it_is"], BY_NAME["hand_written_ln"]]
    monkeypatch.setattr(catalog, "EQUIVALENT", variants)
    monkeypatch.setattr(catalog, "ROUNDING", [BY_NAME["ln_bf16"]])
    assert compare_origin.main(["--calibrate"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("HOLDS: 3x the reference's own rounding error")
    monkeypatch.setattr(catalog, "ROUNDING", [replace(BY_NAME["as_it_is"], is_equivalent=False)])
    assert compare_origin.main(["--calibrate"]) == 3
    assert capsys.readouterr().out.splitlines()[-1].startswith("DOES NOT HOLD: ")

"""Tests of the self-test: it passes with the gates intact, and fails if one is disabled."""

from __future__ import annotations

import contextlib
import itertools
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
    MutantResult,
    examine,
    examine_images,
    make_models,
)
from scripts.selftest.harness import examine_harness
from scripts.selftest.mutant import HarnessMutant
from scripts.selftest.mutant import replace as replace_attribute
from scripts.selftest.report import SCHEMA, Report, to_json
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
def models() -> Iterator[list[list[Case]]]:
    with make_models(odd=SMALL) as models:
        yield models


# One mutant per gate and per way to break the port.
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
def test_mutants_are_judged(models: list[list[Case]], name: str) -> None:
    result = examine(BY_NAME[name], models)
    assert result.passed, result


def test_mutant_does_not_leak_into_next(models: list[list[Case]]) -> None:
    first = models[:1]
    for name in ("rows_norms_swapped", "act_ignored", "ln_gain_missing", "pooled_half"):
        assert examine(BY_NAME[name], first).passed
    assert not examine(BY_NAME["as_it_is"], first).detected


def test_equivalent_variants_pass_with_eager_attention(models: list[list[Case]]) -> None:
    eager_models = []
    for cases in models:
        eager_models.append(
            [replace(case, attentions=("eager",), reference_runs={}) for case in cases]
        )
    assert examine(BY_NAME["float32_ln"], eager_models).passed


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["float32_ln", "one_by_one", "linear_patches", "in_place_stream", "mlp_in_chunks"]
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equivalent_variants_pass_with_each_attention(name: str, attention: str) -> None:
    with make_models(seed=7) as models:
        for case in itertools.chain.from_iterable(models):
            case.attentions = (attention,)
        result = examine(BY_NAME[name], models)
    assert result.passed, result


@pytest.mark.parametrize(
    "name", ["naflex_mask_ignored", "naflex_positions_swapped", "interp_antialias"]
)
def test_shape_mutants_are_detected(models: list[list[Case]], name: str) -> None:
    assert examine(BY_NAME[name], models, stops=True).passed
    assert not examine(replace(BY_NAME[name], patch=None), models).detected


@pytest.mark.parametrize(
    "name",
    [
        "image_patches_few",
        pytest.param("image_float64", marks=pytest.mark.slow),
        pytest.param("image_palette_alpha", marks=pytest.mark.slow),
    ],
)
def test_preprocessing_mutants_are_detected(name: str) -> None:
    """The mutants with the smallest effect."""
    assert examine_images(BY_NAME[name]).passed
    assert not examine_images(replace(BY_NAME[name], patch=None)).detected


GATES = {
    "environment": (gates, "check_environment"),
    "config": (gates, "check_config"),
    "weights": (gates, "check_weights"),
    "sensitivity": (gates, "check_sensitivity"),
    "numerics": (gates, "check_numerics"),
    "gradients": (gates, "check_gradients"),
    "calls": (gates, "check_calls"),
    "interface": (interface, "check_interface"),
    "rounding": (gates, "check_rounding"),
}


@pytest.mark.parametrize("gate", ALL_GATES)
def test_disabled_gate_is_detected(
    models: list[list[Case]], gate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gate has mutants of its own; detection by other gates does not count."""
    mutant = next(m for m in catalog.MUTANTS if m.gate == gate and m.subject == "port")
    numbers = {"rounding": 2, "calls": 1}
    first = [models[numbers.get(gate, 0)]]
    assert examine(mutant, first).passed
    monkeypatch.setattr(*GATES[gate], lambda *_, **__: GateResult(gate, 1, "off"))
    result = examine(mutant, first)
    assert not result.passed
    failure = Report([result]).failures[0]
    assert failure.startswith(f"{mutant.name}: expected detection by {gate}, got ")


def test_false_location_is_failure(models: list[list[Case]]) -> None:
    result = examine(replace(BY_NAME["ln_eps_once"], locations="4.ln2"), models[:1])
    assert result.detected
    assert not result.located
    assert "false locations: numerics: encoder.layers.5.layer_norm2" in Report([result]).failures[0]


def test_false_alarm_is_failure(models: list[list[Case]]) -> None:
    result = examine(replace(BY_NAME["ln_eps_once"], is_equivalent=True), models)
    assert Report(variant_runs=[("seed 1", result)]).failures == [
        "false alarm: ln_eps_once (seed 1): numerics, rounding"
    ]


@pytest.mark.parametrize(
    "name", ["bound_wide", "weights_close", "dead_models", "nan_passes", "no_forcing"]
)
def test_harness_mutants_are_detected(name: str) -> None:
    """A sample; the self-test runs all of them."""
    assert examine_harness(HARNESS[name], SMALL)


def test_harmless_harness_mutant_is_missed() -> None:
    harmless = HarnessMutant(
        "harmless",
        "a bound twice as wide",
        ("ln_eps_once", "as_it_is", "softmax_bf16"),
        replace_attribute(bounds, "FLOAT64_BOUND", 2e-10),
    )
    assert examine_harness(harmless, SMALL) == ""
    assert Report(harness={"harmless": ""}).failures == ["harness mutant missed: harmless"]


@pytest.mark.slow
def test_intact_harness_judges_probes_correctly() -> None:
    probes = {name: None for mutant in catalog.HARNESS for name in mutant.probes}
    intact = HarnessMutant("intact", "no change", tuple(probes), lambda stack: None)
    assert examine_harness(intact, SMALL) == ""


Shorten = Callable[..., None]


@pytest.fixture
def shorten(monkeypatch: pytest.MonkeyPatch, models: list[list[Case]]) -> Shorten:
    """Function that shortens the catalog; the models are small."""

    def shorten(mutants: list[str], equivalent: list[str], bugs: list[str]) -> None:
        monkeypatch.setattr(catalog, "MUTANTS", [BY_NAME[name] for name in mutants])
        monkeypatch.setattr(catalog, "EQUIVALENT", [BY_NAME[name] for name in equivalent])
        monkeypatch.setattr(catalog, "HARNESS", [HARNESS[name] for name in bugs])

    small = contextlib.nullcontext(models)
    monkeypatch.setattr(runner, "make_models", lambda *_, **__: small)
    return shorten


@multi_threaded
@pytest.mark.fresh_process
def test_selftest_command(
    shorten: Shorten,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A short catalog: exit code 0, and 3 with a bound that is too wide."""
    shorten(["ln_eps_once", "interp_nearest", "ln_bf16"], ["as_it_is"], ["one_output"])
    threads = torch.get_num_threads()
    assert compare_origin.main(["--selftest", "--json", str(tmp_path / "self.json")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        "PASSED: 3 of 3 mutants detected, 3 of 3 located, 0 false alarms in 2 runs of "
        "equivalent variants, 1 of 1 harness mutants detected"
    )
    report = json.loads((tmp_path / "self.json").read_text())
    assert report["schema"] == SCHEMA
    assert report["passed"] is True
    assert report["mutants"][0]["detected_by"].keys() == {"numerics"}
    runs = [(one["run"], one["false_alarm"]) for one in report["equivalent_variants"]]
    assert [alarm for _, alarm in runs] == [False, False]
    assert runs[0][0] == "entrances"
    assert report["harness_mutants"].keys() == {"one_output"}
    assert torch.get_num_threads() == threads
    monkeypatch.setattr(bounds, "FLOAT64_BOUND", 1e-2)
    assert compare_origin.main(["--selftest"]) == 3
    out = capsys.readouterr().out
    assert "ln_eps_once: expected detection by numerics, got " in out
    assert out.splitlines()[-1].startswith("FAILED: ")


@pytest.mark.slow
@multi_threaded
@pytest.mark.fresh_process
def test_full_selftest(
    shorten: Shorten,
    models: list[list[Case]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(runner, "SEEDS", (1234,))
    shorten(["gelu_exact", "ln_bf16"], ["as_it_is"], ["one_output"])
    cases = list(itertools.chain.from_iterable(models))
    before = [case.attentions for case in cases]
    assert compare_origin.main(["--selftest", "--full", "--json", str(tmp_path / "all.json")]) == 0
    assert "2 of 2 located (2 with a hint), 0 false alarms in 5 runs" in capsys.readouterr().out
    report = json.loads((tmp_path / "all.json").read_text())
    runs = [variant["run"] for variant in report["equivalent_variants"]]
    assert runs == [
        "entrances",
        "seed 1234, 1 threads",
        "seed 1234, 2 threads",
        "seed 1234, sdpa only",
        "seed 1234, eager only",
    ]
    for case, attentions in zip(cases, before, strict=True):
        case.attentions = attentions
        case.reference_runs = {}


@forks
@multi_threaded
@pytest.mark.fresh_process
@pytest.mark.slow
def test_results_do_not_depend_on_number_of_processes(
    shorten: Shorten, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results are in catalog order, and a monkeypatched gate is patched in every process."""
    names = ["gelu_exact_once", "input_bgr", "left_in_training", "interp_nearest", "eps_ignored"]
    shorten(names, ["as_it_is"], ["weights_close"])
    monkeypatch.setattr(gates, "check_config", lambda *_: GateResult("config", 1, "off"))
    descriptions: list[str] = []

    def progress(items: Iterator[Any], description: str, total: int) -> Iterator[Any]:
        descriptions.append(f"{description}: {total}")
        return items

    serial = SelfTest("cpu", False, progress, 1).run()
    parallel = SelfTest("cpu", False, progress, 2).run()
    assert to_json(serial) == to_json(parallel)
    assert repr(serial) == repr(parallel)  # as text, since NaN is not equal to itself
    assert [result.mutant for result in parallel.results] == catalog.MUTANTS
    assert [result.mutant.edit for result in parallel.results] == [m.edit for m in catalog.MUTANTS]
    assert [failure.split(":")[0] for failure in parallel.failures] == ["eps_ignored"]
    expected = [
        "mutants: 5",
        "equivalent variants, entrances: 1",
        "equivalent variants, seed 1234: 1",
        "harness mutants: 1",
    ]
    assert descriptions == expected * 2


@forks
@multi_threaded
@pytest.mark.fresh_process
def test_ctrl_c_ends_all_processes(
    shorten: Shorten, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def press_ctrl_c(*_: object) -> str:
        os.kill(os.getppid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # a terminal sends SIGINT to every process
        return ""

    shorten([], [], ["itself"])
    monkeypatch.setattr(runner, "count_processes", lambda _: 2)
    monkeypatch.setattr(harness, "examine_harness", press_ctrl_c)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # shells ignore SIGINT in background jobs
    try:
        assert compare_origin.main(["--selftest"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "interrupted: no verdict\n"
    assert not multiprocessing.active_children()


def test_recorded_census_matches_recorded_selftest() -> None:
    """`python -m siglip_port.parity.siglip.census docs/selftest.json` writes it."""
    recorded = json.loads((ROOT / "docs" / "selftest.json").read_text())
    assert json.loads(SUMMARY.read_text()) == summarize(recorded)


def test_census() -> None:
    report = Report([MutantResult(BY_NAME["ln_eps_once"], {"numerics": Finding("differs")})])
    text = census(summarize(to_json(report)))
    assert [line.split(":")[0] for line in text.splitlines()[:-1:3]] == list(gates.MEANING)
    assert "  detected 1 and located 1 of its 1 mutants" in text


def test_calibration(
    models: list[list[Case]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    from scripts.selftest import calibration

    small = contextlib.nullcontext(models)
    monkeypatch.setattr(calibration, "make_models", lambda *_, **__: small)
    variants = [BY_NAME["as_it_is"], BY_NAME["hand_written_ln"]]
    monkeypatch.setattr(catalog, "EQUIVALENT", variants)
    monkeypatch.setattr(catalog, "ROUNDING", [BY_NAME["ln_bf16"]])
    assert compare_origin.main(["--calibrate", "--json", str(tmp_path / "a.json")]) == 0
    recorded = json.loads((tmp_path / "a.json").read_text())
    assert recorded["smallest_bug_name"] == "ln_bf16"
    assert max(recorded["equivalent_variants"].values()) < 1 < recorded["smallest_bug"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("BOUNDS HOLD: 3x the reference's own rounding error")
    monkeypatch.setattr(catalog, "ROUNDING", [replace(BY_NAME["as_it_is"], is_equivalent=False)])
    assert compare_origin.main(["--calibrate"]) == 3
    assert capsys.readouterr().out.splitlines()[-1].startswith("BOUNDS DO NOT HOLD: ")

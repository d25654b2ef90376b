"""The self-test: every mutant of the catalogue goes through the real gates, and what they make of it is counted.

A gate that is off, or has lost power, lets a mutant pass that it must notice: then the self-test
fails.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import json
import math
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from siglip_port.atomic import write_text
from siglip_port.checkpoint import preprocessor_config as processors
from siglip_port.config import SigLipVisionConfig
from siglip_port.parity import bounds, gates, mutants, observe, taps
from siglip_port.parity.mutation import Mutant, edited
from siglip_port.parity.results import Finding, GateResult, Measurement
from siglip_port.parity.sides import Side
from siglip_port.parity.siglip import cases as proof
from siglip_port.parity.siglip import pixels
from siglip_port.parity.siglip import reference as references
from siglip_port.parity.siglip.cases import Case
from siglip_port.parity.siglip.sample_images import synthetic_photograph
from siglip_port.parity.siglip.taps import siglip_taps
from siglip_port.text import format_table
from siglip_port.threads import torch_threads


@dataclass
class Result:
    """What the gates made of one mutant.

    Attributes:
        mutant: the mutant.
        kills: gate -> what it found, for every gate that noticed it, in the order of the gates.
        innocent: places that were named and are not the mutant's.
        error: what the port raised, where it could not even run.
    """

    mutant: Mutant
    kills: dict[str, Finding] = field(default_factory=dict)
    innocent: list[str] = field(default_factory=list)
    error: str = ""

    @property
    def noticed(self) -> bool:
        """Whether any gate noticed it."""
        return bool(self.kills)

    @property
    def named(self) -> bool:
        """Whether what was named first is the mutant's place, and nothing else is named by the other gates."""
        return self.noticed and not self.innocent

    @property
    def passed(self) -> bool:
        """Whether the gates did what they must.

        Legal variants pass, all others are noticed by their gate and named.
        """
        if self.mutant.kind == "legal":
            return not self.noticed and not self.error
        return self.mutant.gate in self.kills and self.named


@contextlib.contextmanager
def built(mutant: Mutant) -> Iterator[Callable[..., tuple[Any, Any, ModuleType]]]:
    """Gives a function that loads the mutated port from a checkpoint.

    (model, how to run it, its key map).
    """

    def load(source: str, **how: Any) -> tuple[Any, Any, ModuleType]:  # noqa: ANN401
        port = modules["siglip_port.model"].SigLipVisionModel.from_hf(source, **how)
        if mutant.change is not None:
            with torch.no_grad():
                mutant.change(port)
        return port, run, modules["siglip_port.checkpoint.layouts"]

    def run(port: Any, pixel_values: Tensor) -> Mapping[str, Tensor]:
        return proof.port_outputs(
            port, mutant.pixels(pixel_values) if mutant.pixels else pixel_values
        )

    with edited(mutant.edits) as modules:
        yield load


def examine(
    mutant: Mutant, cases: Iterable[Case], only: tuple[str, ...] | None = None, explained: int = 1
) -> Result:
    """Runs one mutant through the gates of some cases.

    `explained` is how many of the taps that differ get a hint.
    """
    result = Result(mutant)
    rounded: list[GateResult] = []
    with built(mutant) as load:
        for case in cases:
            torch.manual_seed(0)  # for those that draw
            try:
                port, run, table = load(case.source, device=case.inputs.device)
                for gate in replace(case, gates=only or case.gates).check(
                    port, run, max_hints=explained
                ):
                    if not gate.passed:
                        name = gate.name.split()[0]
                        result.kills.setdefault(name, gate.findings[0])
                        if name == "rounding":
                            rounded.append(gate)
                        else:
                            result.innocent += innocent(gate.name, gate.findings, mutant)
            except (RuntimeError, ValueError) as error:  # it cannot even run
                result.error = f"{type(error).__name__}: {error}"
                result.kills.setdefault("run", Finding(result.error))
    if rounded and "semantics" not in result.kills:  # which has the better address
        # So has the dtype that notices it most clearly: in one that hardly does, errors of many
        # steps have added up before they are beyond the bound, and where that happens depends on
        # the machine.
        clearest = max(rounded, key=_share_of_gate)
        result.innocent += innocent(clearest.name, clearest.findings, mutant)
    return result


def innocent(gate: str, findings: tuple[Finding, ...], mutant: Mutant) -> list[str]:
    """Which of the named places are not the mutant's. Only the first of liveness counts.

    It names outputs as well.
    """
    if gate == "liveness":
        return []
    named = [finding.reference or finding.port for finding in findings]
    return [f"{gate}: {name}" for name in named if not mutants.is_guilty(name, mutant.guilty)]


@contextlib.contextmanager
def cases(seed: int = 1234, device: str = "cpu", *, full: bool = False) -> Iterator[list[Case]]:
    """What mutants are tried on: N1 for all gates but rounding.

    For that one, L7 for float32, S1 for the narrow dtypes.

    Args:
        seed: of the weights.
        device: where to.
        full: L8 too.
    """
    with (
        contextlib.ExitStack() as stack,
        proof.random_case(
            proof.ODD, "N1", seed, gates=proof.ALL_GATES[:-1], device=device
        ) as first,
        proof.random_case(proof.ODD, "L7", seed, gates=("rounding",), device=device) as second,
        proof.random_case(
            proof.ODD, "S1", seed, gates=("rounding",), dtypes=proof.LOW_DTYPES[1:], device=device
        ) as third,
    ):
        made = [first, second, third]
        if full:
            made.append(
                stack.enter_context(
                    proof.random_case(proof.ODD, "L8", seed, gates=("rounding",), device=device)
                )
            )
        yield made


def examine_shapes(mutant: Mutant) -> Result:
    """Runs a mutant on pictures of other shapes than the tower's own.

    Packed patches, or one other size.
    """
    result = Result(mutant)
    assert mutant.subject in ("naflex", "resized")
    with built(mutant) as load, tempfile.TemporaryDirectory(prefix="siglip_port-") as folder:
        reference, inputs = references.small_reference(mutant.subject, Path(folder))
        try:
            model, _, table = load(
                folder, interpolation=None if mutant.subject == "naflex" else "hf"
            )
            port = Side(model, _shaped)
            # What is inside the reference's nn.MultiheadAttention is worked out again without
            # masks, and to packed patches the port applies the weights of its convolution, not the
            # convolution.
            skipped = ("head.attention:",) + (
                ("embeddings.patch_embedding",) if mutant.subject == "naflex" else ()
            )
            points = {a: b for a, b in siglip_taps(True).items() if not a.startswith(skipped)}
            pairs = taps.expand(points, reference.module, model)
            truth = observe.run_reference(
                reference, inputs, [tap.reference for tap in pairs], torch.float32
            )
            found = [
                gates.check_weights(
                    proof.tensors_by_reference_name(model), reference.module.state_dict()
                ),
                gates.check_sensitivity(port, reference, inputs),
                gates.check_numerics(port, truth, pairs, max_hints=1),
            ]
        except (RuntimeError, ValueError) as error:  # it cannot even run
            result.error = f"{type(error).__name__}: {error}"
            result.kills.setdefault("run", Finding(result.error))
            return result
    for gate in found:
        if not gate.passed:
            result.kills[gate.name] = gate.findings[0]
            result.innocent += innocent(gate.name, gate.findings, mutant)
    return result


def _shaped(model: Any, inputs: Any) -> dict[str, Tensor]:  # noqa: ANN401
    tokens = model(**inputs)
    return {"tokens": tokens, "pooled": model.pool(tokens, inputs.get("pixel_attention_mask"))}


def examine_images(mutant: Mutant) -> Result:
    """Runs a mutant of the image processor on pictures of all kinds, as SigLIP and as NaFlex towers have them."""
    result = Result(mutant)
    with edited(mutant.edits):
        image = importlib.import_module("siglip_port.image_processing")
        for config in (
            SigLipVisionConfig(image_size=64),
            SigLipVisionConfig(image_size=64, naflex=True),
        ):
            theirs = references.image_processors(config)
            ours = {
                name: image.ImageProcessor.from_config(processors.default(config), name)
                for name in theirs
            }
            gate = pixels.check_pixels(ours, theirs, synthetic_photograph(), max_hints=0)
            if not gate.passed:
                result.kills.setdefault(gate.name, gate.findings[0])
                result.innocent += innocent(gate.name, gate.findings, mutant)
    return result


def examine_harness(mutant: Mutant, config: SigLipVisionConfig) -> str:
    """Makes a mistake in a copy of the harness, and has it judge the mutants (or the port) that show it.

    Returns:
        What shows that the copy is broken; empty if nothing does.
    """
    with edited(mutant.edits, harness=True):
        theirs = importlib.import_module("siglip_port.parity.selftest")
        catalogue = importlib.import_module("siglip_port.parity.mutants")
        known = {m.name: m for m in (*catalogue.CATALOGUE, *catalogue.LEGAL)}
        judged = [known[name] for name in mutant.guilty.split()]
        try:
            with contextlib.ExitStack() as stack:
                wanted = {"rounding": "L7"}
                made = [
                    stack.enter_context(
                        theirs.proof.random_case(
                            config,
                            recipe,
                            gates=theirs.proof.ALL_GATES[:-1] if recipe == "N1" else ("rounding",),
                        )
                    )
                    for recipe in dict.fromkeys(wanted.get(m.gate, "N1") for m in judged)
                ]
                wrong = [m.name for m in judged if not theirs.examine(m, made).passed]
        except (ValueError, RuntimeError) as error:
            return str(error)
    return f"misjudged: {', '.join(wrong)}" if wrong else ""


# --- all of them, on all cores --------------------------------------------------------------------


Work = Callable[[Mutant], Any]
_given: tuple[Work, Sequence[Mutant]]
"""In a process of `each`: what it does, and with which mutants."""


def each(work: Work, of: Sequence[Mutant], processes: int = 1) -> Iterator[Any]:
    """What `work` makes of each mutant, in their order.

    Args:
        work: makes a `Result` or text of a mutant.
        of: the mutants.
        processes: how many to do this in. They are forked from this one, so that they have all that
            it has, functions without a name and changes made for a test included; only a mutant's
            number goes in, and plain data out.
    """
    if processes == 1:
        yield from map(work, of)
        return
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, fork, initializer=_begin, initargs=(work, of)) as pool:
        for mutant, found in zip(of, pool.map(_do, range(len(of))), strict=True):
            yield replace(found, mutant=mutant) if isinstance(found, Result) else found


def _begin(work: Work, of: Sequence[Mutant]) -> None:
    global _given
    _given = work, of
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that asked
    ctypes.CDLL(None).prctl(
        1, signal.SIGKILL
    )  # PR_SET_PDEATHSIG: to end with it, however that ends


def _do(number: int) -> Any:  # noqa: ANN401
    work, of = _given
    found = work(of[number])
    if isinstance(found, Result):
        found.mutant = replace(found.mutant, change=None, pixels=None)  # which cannot be sent
    return found


def cores(device: str) -> int:
    """In how many processes to work: as many as there are cores, up to 8.

    One where forking them is not safe.
    """
    if (
        sys.platform != "linux" or device != "cpu"
    ):  # torch's devices, and much of macOS, do not survive a fork
        return 1
    return min(len(os.sched_getaffinity(0)), 8)


# --- the whole ------------------------------------------------------------------------------------


@dataclass
class Report:
    """What the self-test found.

    Attributes:
        results: of all mistakes.
        alarms: of all legal variants, by what they were run with.
        harness: the harness's own mistakes, and what showed each; empty where nothing did.
        full: whether every mistake went through all gates, and got hints.
    """

    results: list[Result] = field(default_factory=list)
    alarms: list[tuple[str, Result]] = field(default_factory=list)
    harness: dict[str, str] = field(default_factory=dict)
    full: bool = False

    @property
    def failures(self) -> list[str]:
        """All that is not as it must be, one line each."""
        lines = []
        for result in self.results:
            if not result.passed:
                seen = f"noticed by {', '.join(result.kills) or 'nothing'}"
                named = (
                    f"; named wrongly: {', '.join(result.innocent[:3])}" if result.innocent else ""
                )
                lines.append(
                    f"{result.mutant.name}: must be noticed by {result.mutant.gate}, was "
                    f"{seen}{named}"
                )
        lines += [
            f"false alarm: {r.mutant.name} ({how}): {', '.join(r.kills)} {r.error}"
            for how, r in self.alarms
            if not r.passed
        ]
        lines += [
            f"mistake in the harness not noticed: {name}"
            for name, shown in self.harness.items()
            if not shown
        ]
        return lines

    def census(self) -> list[list[str]]:
        """One row a gate: what it must notice, and does.

        Of all that were tried on it, what it noticed, and alone.
        """
        rows = [["gate", "must notice", "does", "of all", "alone"]]
        for gate in ("pixels", *proof.ALL_GATES, "run"):
            own = [r for r in self.results if r.mutant.gate == gate]
            noticed = [r for r in self.results if gate in r.kills]
            alone = [r for r in noticed if len(r.kills) == 1]
            if own or noticed:
                does = sum(gate in r.kills for r in own)
                rows.append([gate, f"{len(own)}", f"{does}", f"{len(noticed)}", f"{len(alone)}"])
        return rows

    def summary(self) -> str:
        """The figures in one line."""
        noticed, named = sum(r.noticed for r in self.results), sum(r.named for r in self.results)
        hinted = sum(any(f.hint for f in r.kills.values()) for r in self.results)
        alarms = sum(not r.passed for _, r in self.alarms)
        shown = sum(map(bool, self.harness.values()))
        n = len(self.results)
        hints = f" (and says what {hinted} look like)" if self.full else ""
        return (
            f"notices {noticed} of {n} mistakes, names the place of {named} of {n}{hints}, "
            f"{alarms} false alarms in "
            f"{len(self.alarms)} runs of legal variants; {shown} of {len(self.harness)} mistakes "
            "in the harness itself "
            "are found out"
        )


Progress = Callable[..., Iterator[Any]]


def run(args: argparse.Namespace, progress: Progress) -> bool:
    """The whole self-test.

    Prints what it found, and returns whether the gates have the power they must have.

    In full, every mistake goes through all gates; else, through those of the weights that it is
    made for.

    Args:
        args: of compare_origin.py: `device`, `full` and `json` count.
        progress: passes items on, and shows how far it is.
    """
    with torch_threads(1):
        report = examine_all(args, progress)
    if args.json is not None:
        write_text(args.json, json.dumps(as_json(report), indent=1) + "\n")
    print("\n".join(format_table(report.census())))
    print("\n".join(["", *report.failures] if report.failures else [""]))
    print(f"{'LOST POWER' if report.failures else 'POWER'}: {report.summary()}")
    return not report.failures


def examine_all(
    args: argparse.Namespace, progress: Progress, processes: int | None = None
) -> Report:
    """Runs all mutants, all legal variants and all mistakes of the harness, on all cores or in so many `processes`."""
    report = Report(full=args.full)
    seeds = (1234, 1, 2, 3) if args.full else (1234,)

    def follow(work: Work, of: Sequence[Mutant], what: str) -> Iterator[Any]:
        return progress(each(work, of, processes or cores(args.device)), what, len(of))

    for seed in seeds:
        with cases(seed, args.device, full=args.full) as made:

            def judge(mutant: Mutant, made: list[Case] = made) -> Result:
                if mutant.subject != "port":
                    return (
                        examine_images(mutant)
                        if mutant.subject == "images"
                        else examine_shapes(mutant)
                    )
                few = made if args.full else made[1:] if mutant.gate == "rounding" else made[:1]
                return examine(mutant, few, None, int(args.full))

            def allow(mutant: Mutant, made: list[Case] = made) -> Result:
                return examine(mutant, made)

            if seed == seeds[0]:
                report.results += follow(judge, mutants.CATALOGUE, "mistakes")
            for threads in (1, 2) if args.full else (torch.get_num_threads(),):
                with torch_threads(threads):
                    for result in follow(allow, mutants.LEGAL, f"legal variants, seed {seed}"):
                        report.alarms.append((f"seed {seed}, {threads} threads", result))
            if args.full:
                for attention in ("sdpa", "eager"):
                    for case in made:
                        case.attentions, case.reference_runs = (attention,), {}
                    for result in follow(allow, mutants.LEGAL, f"legal variants, {attention}"):
                        report.alarms.append((f"seed {seed}, {attention} alone", result))
    small = replace(
        proof.ODD,
        num_encoder_blocks=6,
        embed_dim=72,
        num_attention_heads=4,
        image_size=45,
        patch_size=7,
    )
    shown = follow(
        lambda mutant: examine_harness(mutant, small), mutants.HARNESS, "mistakes in the harness"
    )
    report.harness = {
        mutant.name: found for mutant, found in zip(mutants.HARNESS, shown, strict=True)
    }
    return report


def as_json(report: Report) -> dict[str, object]:
    """The report for programs: one entry a mistake, with all that noticed it."""
    return {
        "schema": 1,
        "machine": f"{platform.system()} {platform.machine()}, torch {torch.__version__}, transformers "
        f"{references.VERSION}, Python {platform.python_version()}",
        "passed": not report.failures,
        "summary": report.summary(),
        "mistakes": [
            {
                "name": r.mutant.name,
                "what": r.mutant.what,
                "source": r.mutant.source,
                "must": r.mutant.gate,
                "noticed": {gate: str(finding) for gate, finding in r.kills.items()},
                "named": r.named,
            }
            for r in report.results
        ],
        "false_alarms": [
            {"name": r.mutant.name, "run": how, "passed": r.passed} for how, r in report.alarms
        ],
        "harness": report.harness,
    }


def census_text(recorded: Path) -> str:
    """What each gate means, and what it alone noticed in the recorded run of the self-test."""
    text = []
    found = json.loads(recorded.read_text(encoding="utf-8")) if recorded.is_file() else None
    for gate, meaning in gates.MEANING.items():
        text += [f"{gate}: {meaning.text}", f"  bound: {meaning.bound}"]
        if found is not None:
            noticed = [m for m in found["mistakes"] if gate in m["noticed"]]
            alone = [m["name"] for m in noticed if len(m["noticed"]) == 1]
            text.append(
                f"  notices {len(noticed)} of {len(found['mistakes'])} mistakes, alone: "
                f"{', '.join(alone) or 'none'}"
            )
    if found is not None:
        text.append(
            f"(counts: `compare_origin.py --selftest --json`, recorded on {found['machine']})"
        )
    return "\n".join(text)


def _shares(mutant: Mutant, made: list[Case]) -> dict[str, tuple[float, str]]:
    """The largest share of its bound that a mutant takes up in each rounding gate, and where."""
    shares: dict[str, tuple[float, str]] = {}
    with built(mutant) as load:
        for case in made:
            port, run, table = load(case.source, device=case.inputs.device)
            with contextlib.suppress(RuntimeError):  # an autocast that meets bfloat16 weights
                for gate in replace(case, gates=("rounding",)).check(port, run):
                    share, place = max((_share(m), m.reference) for m in gate.measurements)
                    shares[gate.name] = share, f"{mutant.name} at {place}, {case.weights}"
    return shares


def _share(measurement: Measurement) -> float:
    """How much of its bound on rounding an error takes up.

    Of that on all elements, or on the worst one.
    """
    return max(measurement.ratio / bounds.ROUNDING_FACTOR, measurement.worst)


def _share_of_gate(gate: GateResult) -> float:
    return max(map(_share, gate.measurements), default=math.inf)


def calibrate(args: argparse.Namespace, progress: Progress) -> bool:
    """Measures on this device what the bounds on rounding rest on, and says whether they hold here.

    They hold where the coarsest legal variant stays below them, and the finest mistake of rounding
    above.
    """
    legal: dict[str, tuple[float, str]] = {}
    finest: dict[str, tuple[float, str]] = {}
    for seed in (1234, 1, 2, 3) if args.full else (1234, 1):
        with cases(seed, args.device) as made:
            for mutant in progress(iter([*mutants.LEGAL, *mutants.ROUNDING]), f"seed {seed}"):
                shares = _shares(mutant, made)
                if mutant.kind == "legal":
                    for gate, found in shares.items():
                        legal[gate] = max(legal.get(gate, (0.0, "")), found)
                else:
                    finest[mutant.name] = min(
                        finest.get(mutant.name, (math.inf, "")), max(shares.values())
                    )
    weakest = min(finest.values())
    rows = [["", "share of the bound", "of"]]
    rows += [
        [f"coarsest legal variant, {gate}", f"{share:.2f}", who]
        for gate, (share, who) in legal.items()
    ]
    rows.append(["finest mistake", f"{weakest[0]:.2f}", weakest[1]])
    print("\n".join(format_table(rows)))
    holds = max(legal.values())[0] < 1 < weakest[0]
    print(f"{'HOLDS' if holds else 'DOES NOT HOLD'}: {bounds.ROUNDING_ORIGIN}")
    return holds

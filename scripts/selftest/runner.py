"""The self-test: runs every mutant through the gates and counts detections and false alarms.

It fails if a gate misses a mutant that it must detect, or if an equivalent variant is detected.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from scripts.selftest import catalog, harness
from scripts.selftest.examination import (
    MutantResult,
    examine,
    examine_entrances,
    examine_images,
    make_entrance_models,
    make_models,
)
from scripts.selftest.mutant import HarnessMutant, Mutant
from scripts.selftest.parallel import Item, Outcome, count_processes, each
from scripts.selftest.report import Report, to_json
from siglip_port.atomic import write_text
from siglip_port.parity.siglip.cases import ODD, Case
from siglip_port.parity.siglip.entrances.subject import Expected
from siglip_port.text import format_table
from siglip_port.threads import torch_threads

Progress = Callable[..., Iterator[Any]]
"""Progress display: (items, description, total) -> items."""

SEEDS = (1234, 1)
ATTENTIONS = ("sdpa", "eager")

SMALL = replace(
    ODD,
    num_encoder_blocks=6,
    embed_dim=72,
    num_attention_heads=4,
    image_size=45,
    patch_size=7,
)
"""Architecture for harness mutants."""


class Options(Protocol):
    """Options of the command that the self-test uses."""

    @property
    def device(self) -> str:
        """Device of the models."""

    @property
    def full(self) -> bool:
        """Whether every mutant goes through all gates, and variants run with both seeds."""

    @property
    def json(self) -> Path | None:
        """File for the JSON report, or None."""


def run(options: Options, progress: Progress) -> bool:
    """Run the self-test and print the results.

    Every mutant runs on the small models of the default command; unless `options.full` is set, only
    until its own gate detects it.

    Returns:
        Whether all mutants were detected and located, without false alarms.
    """
    with torch_threads(1):
        report = SelfTest(options.device, options.full, progress).run()
    if options.json is not None:
        write_text(options.json, json.dumps(to_json(report), indent=1) + "\n")
    failures = report.failures
    print("\n".join(format_table(report.census())))
    print("\n".join(["", *failures]))
    print(f"{'FAILED' if failures else 'PASSED'}: {report.summary()}")
    return not failures


def run_references(models: list[list[Case]]) -> None:
    """Run the reference of every case, once for all processes that are forked later."""
    for case in itertools.chain.from_iterable(models):
        for dtype in case.dtypes:
            case.reference_run(dtype)


class SelfTest:
    """One run over the whole catalog.

    Args:
        device: Device of the models.
        full: Whether every mutant goes through all gates, and variants run with both seeds.
        progress: Progress display.
        processes: Number of processes; None for one per core.
    """

    def __init__(
        self, device: str, full: bool, progress: Progress, processes: int | None = None
    ) -> None:
        self.device = device
        self.full = full
        self.progress = progress
        self.processes = processes or count_processes(device)
        self.report = Report(full=full)

    def run(self) -> Report:
        """Run all mutants, equivalent variants and harness mutants."""
        seeds = SEEDS if self.full else SEEDS[:1]
        for seed in seeds:
            with make_models(seed, self.device) as models:
                run_references(models)
                if seed == seeds[0]:
                    self.run_on_entrances(models)
                self.run_variants(models, seed)
        self.run_harness_mutants()
        return self.report

    def run_on_entrances(self, models: list[list[Case]]) -> None:
        """Run the mutants, and the variants on the entrances."""
        with make_entrance_models() as entrance_models:
            self.run_mutants(models, entrance_models)

            def judge(mutant: Mutant) -> MutantResult:
                return examine_entrances(mutant, entrance_models)

            # Edits of a loaded model are lost in copies of it.
            patched = [mutant for mutant in catalog.EQUIVALENT if mutant.edit is None]
            for result in self.follow(judge, patched, "equivalent variants, entrances"):
                self.report.variant_runs.append(("entrances", result))

    def run_mutants(self, models: list[list[Case]], entrance_models: list[Expected]) -> None:
        """Run every mutant on the models of its subject."""

        def judge(mutant: Mutant) -> MutantResult:
            if mutant.subject == "entrances":
                return examine_entrances(mutant, entrance_models, stops=not self.full)
            if mutant.subject == "images":
                return examine_images(mutant)
            if self.full:
                return examine(mutant, models)
            return examine(mutant, models, with_hints=False, stops=True)

        self.report.results += self.follow(judge, catalog.MUTANTS, "mutants")

    def run_variants(self, models: list[list[Case]], seed: int) -> None:
        """Run the equivalent variants; in full, with 1 and 2 threads and each attention."""

        def judge(mutant: Mutant) -> MutantResult:
            return examine(mutant, models)

        def run(settings: str, label: str) -> None:
            description = f"equivalent variants, {label}"
            for result in self.follow(judge, catalog.EQUIVALENT, description):
                self.report.variant_runs.append((f"seed {seed}, {settings}", result))

        for threads in (1, 2) if self.full else (torch.get_num_threads(),):
            with torch_threads(threads):
                run(f"{threads} threads", f"seed {seed}")
        if not self.full:
            return
        for attention in ATTENTIONS:
            for case in itertools.chain.from_iterable(models):
                case.attentions = (attention,)
                case.reference_runs = {}
            run_references(models)
            run(f"{attention} only", attention)

    def run_harness_mutants(self) -> None:
        """Run the harness mutants."""

        def judge(mutant: HarnessMutant) -> str:
            return harness.examine_harness(mutant, SMALL)

        evidence = self.work(judge, catalog.HARNESS, "harness mutants")
        for mutant, text in zip(catalog.HARNESS, evidence, strict=True):
            self.report.harness[mutant.name] = text

    def follow(
        self, judge: Callable[[Mutant], MutantResult], mutants: Sequence[Mutant], description: str
    ) -> Iterator[MutantResult]:
        """Yield the results of mutants, in order."""
        for mutant, result in zip(mutants, self.work(judge, mutants, description), strict=True):
            result.mutant = mutant  # the one from a worker lacks its functions
            yield result

    def work(
        self, judge: Callable[[Item], Outcome], items: Sequence[Item], description: str
    ) -> Iterator[Outcome]:
        """Yield `judge(item)` for each item, in parallel."""
        return self.progress(each(judge, items, self.processes), description, len(items))

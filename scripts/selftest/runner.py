"""The self-test: every mutant goes through the real gates, and what they make of it is counted.

A gate that is off, or has lost power, lets a mutant pass that it must detect: then the self-test
fails.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from scripts.selftest import catalog, harness
from scripts.selftest.examination import (
    Result,
    examine,
    examine_images,
    examine_shapes,
    make_cases,
)
from scripts.selftest.mutant import HarnessMutant, Mutant
from scripts.selftest.parallel import Item, Outcome, count_processes, each
from scripts.selftest.report import Report, to_json
from siglip_port.atomic import write_text
from siglip_port.parity.siglip.cases import ODD, Case
from siglip_port.text import format_table
from siglip_port.threads import torch_threads

Progress = Callable[..., Iterator[Any]]
"""Called with items, what they are, and how many: passes them on, and shows how far it is."""

SEEDS = (1234, 1, 2, 3)
ATTENTIONS = ("sdpa", "eager")

SMALL = replace(
    ODD,
    num_encoder_blocks=6,
    embed_dim=72,
    num_attention_heads=4,
    image_size=45,
    patch_size=7,
)
"""What mutants of the harness are tried on."""


class Options(Protocol):
    """What the self-test reads of the command's options."""

    @property
    def device(self) -> str:
        """Where to run the models."""

    @property
    def full(self) -> bool:
        """Whether every mutant goes through all gates, with all seeds."""

    @property
    def json(self) -> Path | None:
        """A file for the report; None for none."""


def run(options: Options, progress: Progress) -> bool:
    """Run the self-test, and print what it found.

    Unless in full, every mutant goes through the gates of the weights alone that it is made for.

    Returns:
        Whether the gates have the power they must have.
    """
    with torch_threads(1):
        report = SelfTest(options.device, options.full, progress).run()
    if options.json is not None:
        write_text(options.json, json.dumps(to_json(report), indent=1) + "\n")
    failures = report.failures
    print("\n".join(format_table(report.census())))
    print("\n".join(["", *failures]))
    print(f"{'LOST POWER' if failures else 'POWER'}: {report.summary()}")
    return not failures


class SelfTest:
    """One run over the whole catalog.

    Args:
        device: where to run the models.
        full: whether every mutant goes through all gates, with all seeds.
        progress: passes items on, and shows how far it is.
        processes: how many to work in; None for one a core.
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
        """Run all mutants, all equivalent variants, and all mutants of the harness."""
        seeds = SEEDS if self.full else SEEDS[:1]
        for seed in seeds:
            with make_cases(seed, self.device, full=self.full) as cases:
                if seed == seeds[0]:
                    self.run_mutants(cases)
                self.run_variants(cases, seed)
        self.run_harness_mutants()
        return self.report

    def run_mutants(self, cases: list[Case]) -> None:
        """Run all mutants of the port."""

        def judge(mutant: Mutant) -> Result:
            if mutant.subject == "images":
                return examine_images(mutant)
            if mutant.subject != "port":
                return examine_shapes(mutant)
            if self.full:
                return examine(mutant, cases)
            own = cases[1:] if mutant.gate == "rounding" else cases[:1]
            return examine(mutant, own, max_hints=0)

        self.report.results += self.follow(judge, catalog.MUTANTS, "mistakes")

    def run_variants(self, cases: list[Case], seed: int) -> None:
        """Run all equivalent variants; in full by threads, and beside each attention alone."""

        def allow(mutant: Mutant) -> Result:
            return examine(mutant, cases)

        def run(how: str, what: str) -> None:
            for result in self.follow(allow, catalog.EQUIVALENT, f"equivalent variants, {what}"):
                self.report.alarms.append((f"seed {seed}, {how}", result))

        for threads in (1, 2) if self.full else (torch.get_num_threads(),):
            with torch_threads(threads):
                run(f"{threads} threads", f"seed {seed}")
        if not self.full:
            return
        for attention in ATTENTIONS:
            for case in cases:
                case.attentions = (attention,)
                case.reference_runs = {}
            run(f"{attention} alone", attention)

    def run_harness_mutants(self) -> None:
        """Run all mutants of the harness."""

        def judge(mutant: HarnessMutant) -> str:
            return harness.examine_harness(mutant, SMALL)

        shown = self.work(judge, catalog.HARNESS, "bugs in the harness")
        for mutant, text in zip(catalog.HARNESS, shown, strict=True):
            self.report.harness[mutant.name] = text

    def follow(
        self, judge: Callable[[Mutant], Result], mutants: Sequence[Mutant], what: str
    ) -> Iterator[Result]:
        """Yield the results of mutants, in their order."""
        for mutant, result in zip(mutants, self.work(judge, mutants, what), strict=True):
            result.mutant = mutant  # that of another process has lost its functions
            yield result

    def work(
        self, judge: Callable[[Item], Outcome], items: Sequence[Item], what: str
    ) -> Iterator[Outcome]:
        """Yield what `judge` makes of items, in all processes."""
        return self.progress(each(judge, items, self.processes), what, len(items))

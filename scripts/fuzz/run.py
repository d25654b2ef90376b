"""Fuzzes checkpoint loading: a damaged checkpoint is refused, or loaded as its files describe it.

    uv run scripts/fuzz/run.py --count 100000      37 minutes on 2 cores (Linux)

A mutant is a damaged checkpoint; seed and number determine it, and a failure is printed with the
arguments that repeat it. `SigLipVisionModel.from_hf` loads each mutant, in worker processes that
are replaced when they die; a share of the mutants comes from a Hub server on loopback, through the
client of huggingface_hub. Outcomes:

- refused: `CheckpointError`.
- identical: the tensors and configuration of the intact checkpoint, which the files still describe.
- as described: another model, the one that the files describe according to the libraries of the
  file formats (`oracle.py`).
- FAILED: anything else: another exception, a timeout, more memory than `trial.MEMORY`, a dead
  process, a warning, output, a loaded pickle, a file changed or left behind, intact files refused,
  invalid files loaded, a model that differs from what the files describe.

Changed bytes in the ranges of a partial download cannot be detected, since the Hub publishes hashes
of whole files only. Faults in transit are therefore limited to headers, files that are
downloaded whole, and the cache.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from scripts.fuzz import trial
from scripts.fuzz.trial import OUTCOMES, Fuzzer, TrialResult

ADDRESS_SPACE = 4 * 2**30
"""Bytes that a process may reserve beyond its start; a larger allocation fails."""

LIMITS = "Changed bytes from the Hub: only in headers, files downloaded whole, and the cache."


@dataclass(frozen=True)
class Options:
    """Options of a worker process.

    Attributes:
        seed: seed of all mutants.
        hub_share: share of mutants that are loaded from the Hub, 0 to 1.
        keep: folder for the files of mutants that fail; None to discard them.
        deadline: time to stop at, in seconds of `time.monotonic()`.
    """

    seed: int
    hub_share: float
    keep: Path | None
    deadline: float


@dataclass
class Worker:
    """A running process, and the numbers of the mutants whose results are pending."""

    process: multiprocessing.process.BaseProcess
    numbers: Sequence[int]
    last_heard: float

    def cause_of_death(self) -> str:
        """Return how the process ended."""
        self.process.join()
        code = self.process.exitcode or 0
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def work(pipe: Connection, numbers: Sequence[int], options: Options) -> None:
    """Send one result per mutant through a pipe, then None; runs in a worker process."""
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with tempfile.TemporaryDirectory() as scratch:
        workspace = Path(scratch, "workspace")
        workspace.mkdir()
        fuzzer = Fuzzer(options.seed, workspace, options.hub_share, options.keep)
        for number in numbers:
            if time.monotonic() > options.deadline:
                break
            pipe.send(fuzzer.run(number))
    pipe.send(None)


class Campaign:
    """Runs all mutants in worker processes.

    A process that dies loses one mutant and is replaced.

    Args:
        count: number of mutants.
        options: options of every process.
        cores: number of processes.
    """

    def __init__(self, count: int, options: Options, cores: int) -> None:
        self.options = options
        self.workers: dict[Connection, Worker] = {}
        for core in range(min(cores, count)):
            self.start(range(core, count, cores))

    def start(self, numbers: Sequence[int]) -> None:
        """Start a process for a sequence of mutants."""
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(sender, numbers, self.options), daemon=True)
        process.start()
        sender.close()
        self.workers[receiver] = Worker(process, numbers, time.monotonic())

    def results(self) -> Iterator[TrialResult]:
        """Yield results in the order in which they arrive."""
        while self.workers:
            for pipe in wait(list(self.workers), timeout=1):
                assert isinstance(pipe, Connection)
                result = self.receive(pipe)
                if result is not None:
                    yield result
            for worker in self.workers.values():
                # A load that blocks the alarm signal, which enforces the time limit.
                if time.monotonic() - worker.last_heard > 60 + 3 * trial.SECONDS:
                    worker.process.kill()

    def receive(self, pipe: Connection) -> TrialResult | None:
        """Receive the next result of a process; None if there are no more."""
        worker = self.workers[pipe]
        try:
            result: TrialResult | None = pipe.recv()
        except EOFError:
            del self.workers[pipe]
            number, *rest = worker.numbers
            if rest:
                self.start(rest)
            error = f"process died: {worker.cause_of_death()}"
            return TrialResult(number, "(dead)", "FAILED", True, 0, "", error)
        worker.last_heard = time.monotonic()
        if result is None:
            worker.process.join()
            del self.workers[pipe]
        else:
            worker.numbers = worker.numbers[1:]
        return result


def run_one(number: int, options: Options) -> TrialResult:
    """Run one mutant in this process."""
    with tempfile.TemporaryDirectory() as scratch:
        workspace = Path(scratch, "workspace")
        workspace.mkdir()
        return Fuzzer(options.seed, workspace, options.hub_share, options.keep).run(number)


def summarize(results: Sequence[TrialResult], seconds: float) -> dict[str, Any]:
    """Count mutants and outcomes for each row of the summary table."""
    rows = {name: count_outcomes(results, name) for name in sorted({r.row for r in results})}
    rows["all"] = count_outcomes(results)
    return {
        "rows": rows,
        "handled": sum(result.outcome != "FAILED" for result in results),
        "tried": len(results),
        "per second": round(len(results) / seconds, 1),
        "peak MiB": max((result.peak for result in results), default=0) // 2**20,
    }


def count_outcomes(results: Sequence[TrialResult], row: str | None = None) -> dict[str, int]:
    """Count the outcomes of the results of a row, or of all results."""
    selected = [result for result in results if row in (None, result.row)]
    counts = {"tried": len(selected)}
    for outcome in OUTCOMES:
        counts[outcome] = sum(result.outcome == outcome for result in selected)
    counts["(unchanged)"] = sum(not result.changed for result in selected)
    return counts


def format_summary(summary: Mapping[str, Any]) -> list[str]:
    """Format a summary as the lines to print."""
    rows = [("damaged part", *summary["rows"]["all"])]
    for name, counts in summary["rows"].items():
        rows.append((name, *(f"{count:,}" for count in counts.values())))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append(" | ".join(cells))
    verdict = f"HANDLED {summary['handled']} of {summary['tried']}"
    speed = f"{summary['per second']} per second"
    memory = f"peak memory {summary['peak MiB']} MiB per process"
    return [*lines, f"{verdict}, {speed}, {memory}", LIMITS]


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description="Load damaged checkpoints and check every outcome."
    )
    count_help = "Number of mutants. [default: 1000; unlimited with --seconds]"
    share_help = "Share of mutants loaded from a Hub server on loopback. [default: %(default)s]"
    keep_help = "Folder for the files of mutants that fail."
    parser.add_argument("--count", type=int, help=count_help)
    parser.add_argument("--seconds", type=float, help="Time limit in seconds.")
    parser.add_argument("--seed", type=int, default=0, help="Seed. [default: %(default)s]")
    parser.add_argument("--hub-share", type=float, default=0.1, help=share_help)
    parser.add_argument("--only", type=int, help="Run only the mutant with this number.")
    parser.add_argument("--json", type=Path, help="Write the results to this file.")
    parser.add_argument("--keep", type=Path, help=keep_help)
    return parser


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if not 0 <= options.hub_share <= 1:
        parser.error(f"--hub-share must be between 0 and 1, got {options.hub_share}")
    for name, minimum in (("count", 1), ("seconds", 1), ("only", 0)):
        value = getattr(options, name)
        if value is not None and value < minimum:
            parser.error(f"--{name} must be at least {minimum}, got {value}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the fuzzer; return 0 if every mutant was handled, else 1."""
    args = parse_arguments(arguments)
    start = time.monotonic()
    deadline = start + (args.seconds or float("inf"))
    options = Options(args.seed, args.hub_share, args.keep, deadline)
    if args.only is not None:
        running = iter([run_one(args.only, options)])
    else:
        count = args.count or (10**9 if args.seconds else 1000)
        running = Campaign(count, options, os.cpu_count() or 1).results()
    results = []
    for result in running:
        results.append(result)
        if result.outcome == "FAILED" or args.only is not None:
            flags = f"--seed {args.seed} --hub-share {args.hub_share} --only {result.number}"
            print(f"{result.outcome}: {flags}\n  {result.mutation}\n  {result.error}", flush=True)
    summary = summarize(results, time.monotonic() - start)
    print("\n".join(format_summary(summary)))
    failed = [asdict(result) for result in results if result.outcome == "FAILED"]
    if args.json is not None:
        report = {**summary, "seed": args.seed, "failed": failed}
        args.json.write_text(json.dumps(report, indent=2))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

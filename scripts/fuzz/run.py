"""Damaged checkpoints, by the ten thousands.

Each is refused in words, or loaded as what its files say. Nothing else.

`uv run scripts/fuzz/run.py --count 100000` takes half an hour on 2 cores (Linux). Mutant number 5
of seed 0 is always the same: a failure is printed with the arguments that repeat it alone. Each
mutant is loaded by the real `SigLipVisionModel.from_hf`, in processes that may die without ending
the campaign; a share of them from a Hub of our own on loopback, by the real client. What may come
of it:

- refused: `CheckpointError`.
- identical: the bits and the configuration of the intact checkpoint, which are what the files still
  say.
- as the file says: another model, which the files describe, as the libraries of the file formats
  read them (`oracle.py`).
- FAILED: anything else. Another exception, a hang, more memory than `trial.MEMORY`, a dead process,
  a warning, a word on the terminal, a pickle loaded, a file changed or left behind, intact files
  refused, files loaded that say nothing legal, a model that is not what they say.

Bytes of the encoder's own ranges that are altered on their way from the Hub cannot be detected by
anybody, since the Hub tells the hash of whole files only: such faults are made in headers, in files
fetched whole, and in the cache.
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
from scripts.fuzz.trial import OUTCOMES, Fuzzer, Result

# Bytes that a process may reserve in addition: a larger demand fails instead of being met.
ADDRESS_SPACE = 4 * 2**30

LIMITS = (
    "Of bytes altered on their way from the Hub: those of headers, of files fetched whole, and in "
    "the cache only."
)


@dataclass(frozen=True)
class Options:
    """What a process is to do.

    Attributes:
        seed: of all mutants.
        hub_share: of mutants that come from the Hub.
        keep: where to put the files of mutants that fail; None for nowhere.
        deadline: when to stop, as of `time.monotonic()`.
    """

    seed: int
    hub_share: float
    keep: Path | None
    deadline: float


@dataclass
class Worker:
    """A process that is under way, and which numbers it has not told of yet."""

    process: multiprocessing.process.BaseProcess
    numbers: Sequence[int]
    last_heard: float

    def cause_of_death(self) -> str:
        """Return how the process ended."""
        self.process.join()
        code = self.process.exitcode or 0
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def work(pipe: Connection, numbers: Sequence[int], options: Options) -> None:
    """Send one result for every number, as a process of its own."""
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with tempfile.TemporaryDirectory() as scratch:
        room = Path(scratch, "room")
        room.mkdir()
        fuzzer = Fuzzer(options.seed, room, options.hub_share, options.keep)
        for number in numbers:
            if time.monotonic() > options.deadline:
                break
            pipe.send(fuzzer.run(number))
    pipe.send(None)


class Campaign:
    """Runs all mutants, in one process a core.

    A process that dies costs one mutant, and is replaced.

    Args:
        count: of mutants.
        options: of every process.
        cores: how many processes.
    """

    def __init__(self, count: int, options: Options, cores: int) -> None:
        self.options = options
        self.workers: dict[Connection, Worker] = {}
        for core in range(min(cores, count)):
            self.start(range(core, count, cores))

    def start(self, numbers: Sequence[int]) -> None:
        """Start a process for these mutants."""
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(sender, numbers, self.options), daemon=True)
        process.start()
        sender.close()
        self.workers[receiver] = Worker(process, numbers, time.monotonic())

    def results(self) -> Iterator[Result]:
        """Yield results as they come."""
        while self.workers:
            for pipe in wait(list(self.workers), timeout=1):
                assert isinstance(pipe, Connection)
                result = self.receive(pipe)
                if result is not None:
                    yield result
            for worker in self.workers.values():
                # deaf to the alarm
                if time.monotonic() - worker.last_heard > 60 + 3 * trial.SECONDS:
                    worker.process.kill()

    def receive(self, pipe: Connection) -> Result | None:
        """Receive the result of a process; None where it has no more."""
        worker = self.workers[pipe]
        try:
            result: Result | None = pipe.recv()
        except EOFError:
            del self.workers[pipe]
            number, *rest = worker.numbers
            if rest:
                self.start(rest)
            error = f"the process died: {worker.cause_of_death()}"
            return Result(number, "(dead)", "FAILED", True, 0, "", error)
        worker.last_heard = time.monotonic()
        if result is None:
            worker.process.join()
            del self.workers[pipe]
        else:
            worker.numbers = worker.numbers[1:]
        return result


def run_one(number: int, options: Options) -> Result:
    """Run one mutant in this process."""
    with tempfile.TemporaryDirectory() as scratch:
        room = Path(scratch, "room")
        room.mkdir()
        return Fuzzer(options.seed, room, options.hub_share, options.keep).run(number)


def summarize(results: Sequence[Result], seconds: float) -> dict[str, Any]:
    """Count, for every row, how many mutants were tried, and which outcome they had."""
    rows = {name: count_outcomes(results, name) for name in sorted({r.row for r in results})}
    rows["all"] = count_outcomes(results)
    return {
        "rows": rows,
        "handled": sum(result.outcome != "FAILED" for result in results),
        "tried": len(results),
        "per second": round(len(results) / seconds, 1),
        "peak MiB": max((result.peak for result in results), default=0) // 2**20,
    }


def count_outcomes(results: Sequence[Result], row: str | None = None) -> dict[str, int]:
    """Count the outcomes of a row, or of all."""
    own = [result for result in results if row in (None, result.row)]
    counts = {"tried": len(own)}
    for outcome in OUTCOMES:
        counts[outcome] = sum(result.outcome == outcome for result in own)
    counts["(unchanged)"] = sum(not result.changed for result in own)
    return counts


def format_summary(summary: Mapping[str, Any]) -> list[str]:
    """Return the lines that are printed of a summary."""
    rows = [("damaged", *summary["rows"]["all"])]
    for name, counts in summary["rows"].items():
        rows.append((name, *(f"{count:,}" for count in counts.values())))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append(" | ".join(cells))
    verdict = f"HANDLED {summary['handled']} of {summary['tried']}"
    speed = f"{summary['per second']} a second"
    memory = f"peak memory {summary['peak MiB']} MiB a process"
    return [*lines, f"{verdict}, {speed}, {memory}", LIMITS]


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description="Loads damaged checkpoints, and judges what comes of it."
    )
    count_help = "how many (1000; with --seconds, as many as can be)"
    share_help = "share of mutants that come from a Hub on loopback"
    only_help = "the number of one mutant, to be run in this process"
    keep_help = "where to put the files of mutants that fail, or of that of --only"
    parser.add_argument("--count", type=int, help=count_help)
    parser.add_argument("--seconds", type=float, help="when to stop")
    parser.add_argument("--seed", type=int, default=0, help="of the mutants")
    parser.add_argument("--hub-share", type=float, default=0.1, help=share_help)
    parser.add_argument("--only", type=int, help=only_help)
    parser.add_argument("--json", type=Path, help="where to write the figures to")
    parser.add_argument("--keep", type=Path, help=keep_help)
    return parser


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line, and check it."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if not 0 <= options.hub_share <= 1:
        parser.error(f"--hub-share must lie from 0 to 1, got {options.hub_share}")
    for name, least in (("count", 1), ("seconds", 1), ("only", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} must be at least {least}, got {value}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 where every mutant was handled, else 1."""
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
            again = f"--seed {args.seed} --hub-share {args.hub_share} --only {result.number}"
            print(f"{result.outcome}: {again}\n  {result.what}\n  {result.error}", flush=True)
    summary = summarize(results, time.monotonic() - start)
    print("\n".join(format_summary(summary)))
    failed = [asdict(result) for result in results if result.outcome == "FAILED"]
    if args.json is not None:
        report = {**summary, "seed": args.seed, "failed": failed}
        args.json.write_text(json.dumps(report, indent=2))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

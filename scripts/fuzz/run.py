"""Damaged checkpoints, by the ten thousands.

Each is refused in words, or loaded as what its files say. Nothing else.

`uv run scripts/fuzz/run.py --count 100000` takes half an hour on 2 cores (Linux). Mutant number 5
of seed 0 is always the
same: a failure is printed with the arguments that repeat it alone. Each mutant is loaded by the
    real
`SigLipVisionModel.from_hf`, in processes that may die without ending the campaign; a share of them
from a Hub of our own on loopback, by the real client. What may come of it:

- refused: `CheckpointError`.
- identical: the bits and the configuration of the intact checkpoint, which are what the files still
  say.
- as the file says: another tower, which the files describe, as the libraries of the file formats
  read them (`oracle.py`).
- FAILED: anything else. Another exception, a hang, more memory than `trial.MEMORY`, a dead process,
  a warning, a word on the terminal, a pickle loaded, a file changed or left behind, intact files
  refused, files loaded that say nothing legal, a tower that is not what they say.

Bytes of the tower's own ranges that are altered on their way from the Hub cannot be noticed by
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

ROOT = Path(__file__).resolve().parents[2]

ADDRESSES = (
    4 * 2**30
)  # bytes that a process may reserve in addition: a larger demand fails instead of being met

LIMITS = "Of bytes altered on their way from the Hub: those of headers, of files fetched whole, and in the cache only."


def _work(pipe: Connection, numbers: Sequence[int], options: argparse.Namespace) -> None:
    """A process: sends one result for every number."""
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with tempfile.TemporaryDirectory() as scratch:
        room = Path(scratch, "room")
        room.mkdir()
        fuzzer = Fuzzer(options.seed, room, options.hub_share, options.keep)
        for number in numbers:
            if time.monotonic() > options.end:
                break
            pipe.send(fuzzer.run(number))
    pipe.send(None)


@dataclass
class _Worker:
    """A process that is under way, and which numbers it has not told of yet."""

    process: multiprocessing.process.BaseProcess
    numbers: Sequence[int]
    heard: float


def campaign(options: argparse.Namespace, cores: int) -> Iterator[Result]:
    """Runs all mutants, in one process a core.

    A process that dies costs one mutant, and is replaced.
    """
    context, workers = multiprocessing.get_context("fork"), dict[Connection, _Worker]()

    def start(numbers: Sequence[int]) -> None:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(theirs, numbers, options), daemon=True)
        process.start()
        theirs.close()
        workers[ours] = _Worker(process, numbers, time.monotonic())

    for core in range(min(cores, options.count)):
        start(range(core, options.count, cores))
    while workers:
        for ready in wait(list(workers), timeout=1):
            assert isinstance(ready, Connection)
            worker = workers[ready]
            try:
                result = ready.recv()
            except EOFError:
                worker.process.join()
                del workers[ready]
                code, (number, *rest) = worker.process.exitcode or 0, worker.numbers
                why = f"signal {-code}" if code < 0 else f"exit code {code}"
                yield Result(number, "(dead)", "FAILED", True, 0, "", f"the process died: {why}")
                if rest:
                    start(rest)
                continue
            worker.heard = time.monotonic()
            if result is None:
                worker.process.join()
                del workers[ready]
            else:
                worker.numbers = worker.numbers[1:]
                yield result
        for worker in workers.values():
            if time.monotonic() - worker.heard > 60 + 3 * trial.SECONDS:  # deaf to the alarm
                worker.process.kill()


def figures(results: Sequence[Result], seconds: float) -> dict[str, Any]:
    """What is reported: for every row, how many mutants were tried, had which outcome, and were not damaged at all."""
    rows = {
        name: [r for r in results if r.row == name] for name in sorted({r.row for r in results})
    } | {"all": results}
    counts = {
        name: {
            "tried": len(own),
            **{outcome: sum(r.outcome == outcome for r in own) for outcome in OUTCOMES},
            "(unchanged)": sum(not r.changed for r in own),
        }
        for name, own in rows.items()
    }
    return {
        "rows": counts,
        "handled": sum(r.outcome != "FAILED" for r in results),
        "tried": len(results),
        "per second": round(len(results) / seconds, 1),
        "peak MiB": max((r.peak for r in results), default=0) // 2**20,
    }


def table(found: Mapping[str, Any]) -> list[str]:
    """The lines that are printed of `figures`."""
    rows = [
        (name, *(f"{count:,}" for count in counts.values()))
        for name, counts in found["rows"].items()
    ]
    rows.insert(0, ("damaged", *found["rows"]["all"]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    verdict = f"HANDLED {found['handled']} of {found['tried']}"
    return [
        *lines,
        f"{verdict}, {found['per second']} a second, peak memory {found['peak MiB']} MiB a process",
        LIMITS,
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0 where every mutant was handled, else 1."""
    parser = argparse.ArgumentParser(
        description="Loads damaged checkpoints, and judges what comes of it."
    )
    parser.add_argument(
        "--count", type=int, help="how many (1000; with --seconds, as many as can be)"
    )
    parser.add_argument("--seconds", type=float, help="when to stop")
    parser.add_argument("--seed", type=int, default=0, help="of the mutants")
    parser.add_argument(
        "--hub-share",
        type=float,
        default=0.1,
        help="share of mutants that come from a Hub on loopback",
    )
    parser.add_argument(
        "--only", type=int, help="the number of one mutant, to be run in this process"
    )
    parser.add_argument("--json", type=Path, help="where to write the figures to")
    parser.add_argument(
        "--keep",
        type=Path,
        help="where to put the files of mutants that fail, or of that of --only",
    )
    options = parser.parse_args(arguments)
    if not 0 <= options.hub_share <= 1:
        parser.error(f"--hub-share must lie from 0 to 1, got {options.hub_share}")
    for name in ("count", "seconds", "only"):
        value, least = getattr(options, name), 0 if name == "only" else 1
        if value is not None and value < least:
            parser.error(f"--{name} must be at least {least}, got {value}")
    options.count = options.count or (10**9 if options.seconds else 1000)
    began = time.monotonic()
    options.end = began + (options.seconds or float("inf"))
    with tempfile.TemporaryDirectory() as scratch:
        room = Path(scratch, "room")
        room.mkdir()
        if options.only is None:
            running = campaign(options, os.cpu_count() or 1)
        else:
            running = iter(
                [Fuzzer(options.seed, room, options.hub_share, options.keep).run(options.only)]
            )
        results = []
        for result in running:
            results.append(result)
            if result.outcome == "FAILED" or options.only is not None:
                again = (
                    f"--seed {options.seed} --hub-share {options.hub_share} --only {result.number}"
                )
                print(f"{result.outcome}: {again}\n  {result.what}\n  {result.error}", flush=True)
    seconds = time.monotonic() - began
    found = figures(results, seconds)
    print("\n".join(table(found)))
    failed = [asdict(result) for result in results if result.outcome == "FAILED"]
    if options.json is not None:
        options.json.write_text(
            json.dumps({**found, "seed": options.seed, "failed": failed}, indent=2)
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

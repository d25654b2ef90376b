"""Runs of `embed` in a separate process, which a test can stop."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

EMBED_PROGRAM = """
import signal, sys
# Tests that a shell started in the background inherit that SIGINT is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from siglip_port import SigLipVisionModel
from siglip_port.embed import embed

def on_progress(progress):
    print(progress.done, flush=True)
    sys.stdin.readline()

photos, output_dir, model = sys.argv[1:]
options = {"engine": "eager", "batch_size": 4, "shard_size": 12, "num_workers": 2}
embed([photos], output_dir, SigLipVisionModel.from_hf(model), on_progress=on_progress, **options)
"""
"""Arguments: images, output, checkpoint. Prints the row count per batch, and waits for a line."""


def embed_until(
    rows: int,
    kind: signal.Signals,
    arguments: Sequence[str | Path],
    delay: float | None = None,
) -> int:
    """Run `EMBED_PROGRAM` for a number of rows, then send it a signal.

    Args:
        rows: Number of rows before the signal.
        kind: Signal.
        arguments: Arguments of the program.
        delay: Delay of the signal in seconds while the program continues; None to send the signal
            while it waits.

    Returns:
        Exit code of the program.
    """
    command = [sys.executable, "-c", EMBED_PROGRAM, *arguments]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= rows and delay is None:
                process.send_signal(kind)
                break
            process.stdin.write("\n")
            process.stdin.flush()
            if int(line) >= rows and delay is not None:
                time.sleep(delay)
                process.send_signal(kind)
                break
        return wait_for_end(process, kind)


def wait_for_end(process: subprocess.Popen[str], kind: signal.Signals) -> int:
    """Wait for the end of a process that got a signal; return its exit code.

    Python loses an interrupt that arrives where it ignores exceptions, such as in a destructor, so
    the signal is repeated if the process goes on.
    """
    for _ in range(3):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=60)
        process.send_signal(kind)
    process.kill()
    return process.wait()


def process_ids_naming(folder: Path) -> list[str]:
    """Return the ids of processes whose command line contains a folder."""
    ids = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in (process / "cmdline").read_bytes():
                ids.append(process.name)
    return ids

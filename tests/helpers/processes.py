"""Embedding runs in a separate process, which a test stops at a chosen point."""

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
# Tests started in the background by a shell inherit an ignored SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
from siglip_port import SigLipVisionModel
from siglip_port.embed import embed

def wait(progress):
    print(progress.done, flush=True)
    sys.stdin.readline()

photos, output, model = sys.argv[1:]
options = {"engine": "eager", "batch_size": 4, "shard_size": 12, "num_workers": 2}
embed([photos], output, SigLipVisionModel.from_hf(model), on_progress=wait, **options)
"""
"""Arguments: images, output, checkpoint. Prints the row count and reads a line after each batch."""


def embed_until(
    rows: int,
    kind: signal.Signals,
    arguments: Sequence[str | Path],
    delay: float | None = None,
) -> int:
    """Run `EMBED_PROGRAM` until `rows` rows are done, then send it a signal.

    Args:
        rows: rows after which to send the signal.
        kind: the signal.
        arguments: arguments of the program.
        delay: seconds that the program continues before the signal; None to send it while the
            program waits.

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
        return process.wait()


def process_ids_naming(folder: Path) -> list[str]:
    """List the ids of the processes whose command line contains a folder."""
    ids = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in (process / "cmdline").read_bytes():
                ids.append(process.name)
    return ids

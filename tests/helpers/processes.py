"""Runs over many images in a process of their own, which a test stops where it wants."""

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
# Where the shell started the tests in the background, they inherit that Ctrl-C is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from siglip_port import SigLipVisionModel
from siglip_port.embed import embed

def report(progress):
    print(progress.done, flush=True)
    sys.stdin.readline()

photos, out, model = sys.argv[1:]
options = {"form": "eager", "batch_size": 4, "shard_size": 12, "workers": 2}
embed([photos], out, SigLipVisionModel.from_hf(model), report=report, **options)
"""
"""Arguments: images, output, checkpoint. Prints the rows after each batch, and waits for a line."""


def embed_until(
    rows: int,
    kind: signal.Signals,
    arguments: Sequence[str | Path],
    delay: float | None = None,
) -> int:
    """Run `EMBED_PROGRAM` until so many rows are done, and send it a signal.

    Args:
        rows: that are done.
        kind: of the signal.
        arguments: of the program.
        delay: seconds that it goes on before the signal; None to send that while it waits.

    Returns:
        Its exit code.
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
    """The processes whose command line names a folder."""
    ids = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in (place / "cmdline").read_bytes():
                ids.append(place.name)
    return ids

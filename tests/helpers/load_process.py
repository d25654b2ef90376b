"""Loads from the Hub in subprocesses, which a test may stop.

They are forked from a server process that has imported torch.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from siglip_port import SigLipVisionModel
from siglip_port.hub import chunked_download

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


class ForkedProcess:
    """A function running in a subprocess.

    Args:
        function: Module-level function.
        arguments: Arguments of the function.
    """

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._output, output = CONTEXT.Pipe(duplex=False)
        self.process = CONTEXT.Process(target=run, args=(output, function, arguments))
        self.process.start()
        output.close()

    def kill(self) -> None:
        self.process.kill()

    def interrupt(self) -> None:
        """Send SIGINT, as Ctrl-C does."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGINT)

    def wait(self, seconds: float = 120) -> tuple[int | None, str]:
        """Wait for the process to end, and kill it after `seconds`.

        Returns:
            Exit code, and the text of stdout and stderr.
        """
        chunks = iter(lambda: os.read(self._output.fileno(), 1 << 16), b"")
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
        return self.process.exitcode, b"".join(chunks).decode()


def run(output: Connection, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
    # SIGINT is ignored, and inherited as such, if a shell started the tests in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output.fileno(), stream.fileno())
    output.close()
    function(*arguments)


def load_in_chunks(name: str, cache: Path, max_file_bytes: int | None = None) -> None:
    """Load a model in small chunks, and print the sum of its weights.

    Args:
        name: Hub id.
        cache: Hub cache.
        max_file_bytes: Limit of the kernel on the size of a file; None for no limit.
    """
    if max_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    chunked_download.CHUNK_BYTES = 4096
    model = SigLipVisionModel.from_hf(name, cache_dir=cache)
    print(sum(float(tensor.double().sum()) for tensor in model.state_dict().values()))

"""Loads from the Hub in processes of their own, which a test may stop.

They are forked from one that has imported torch, and does nothing else.
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
    """A function in a process of its own.

    Args:
        function: of a module.
        arguments: of the function.
    """

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._output, output = CONTEXT.Pipe(duplex=False)
        self.process = CONTEXT.Process(target=run, args=(output, function, arguments))
        self.process.start()
        output.close()

    def kill(self) -> None:
        self.process.kill()

    def interrupt(self) -> None:
        """Send what Ctrl-C sends."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGINT)

    def wait(self, seconds: float = 120) -> tuple[int | None, str]:
        """Wait for its end.

        Returns:
            Its exit code, and what it has printed, errors included.
        """
        chunks = iter(lambda: os.read(self._output.fileno(), 1 << 16), b"")
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
        return self.process.exitcode, b"".join(chunks).decode()


def run(output: Connection, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
    # Where the shell started the tests in the background, they inherit that Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output.fileno(), stream.fileno())
    output.close()
    function(*arguments)


def load_in_chunks(name: str, cache: Path, max_file_bytes: int | None = None) -> None:
    """Load a model in small chunks, and print a number that says which it is.

    Args:
        name: the Hub id.
        cache: the Hub's cache.
        max_file_bytes: beyond which the kernel lets no file grow; None for any size.
    """
    if max_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    chunked_download.CHUNK_BYTES = 4096
    model = SigLipVisionModel.from_hf(name, cache_dir=cache)
    print(sum(float(tensor.double().sum()) for tensor in model.state_dict().values()))

"""The program of the reference's process: computes what `reference_process` asks for.

It is run by its path, and imports the harness and transformers, but no code of the port: not even
`siglip_port/__init__.py`, in whose place there is an empty package. So nothing that the port
patches, at import or later, reaches the reference.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import sys
import threading
import traceback
import types
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any, BinaryIO

PACKAGE = Path(__file__).parents[2]
"""Folder of `siglip_port`."""


HARNESS = ("parity", "text")
"""Modules of the package that this process may import."""


def is_harness(module_name: str) -> bool:
    """Return whether this process may import a module: all but those of the port."""
    package, _, path = module_name.partition(".")
    return package != PACKAGE.name or path.partition(".")[0] in HARNESS


class PortGuard(MetaPathFinder):
    """Import hook that refuses modules of the port."""

    def find_spec(
        self, fullname: str, path: object = None, target: types.ModuleType | None = None
    ) -> None:
        """Raise ImportError for a module of the port; called for every import."""
        if not is_harness(fullname):
            raise ImportError(
                f"{fullname} is code of the port, which the reference's process does not import"
            )


def is_portable(module_name: str) -> bool:
    """Return whether the other process may import a module to unpickle an error."""
    return module_name.partition(".")[0] != "transformers"


def take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Take stdin and stdout for messages; what is printed goes to stderr, and stdin is empty."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return requests, replies


def extend_path(entries: list[str]) -> None:
    """Append folders to the module search path, and put an empty package in place of the port."""
    for entry in entries:
        if entry not in sys.path:
            sys.path.append(entry)
    package = types.ModuleType(PACKAGE.name)
    package.__path__ = [str(PACKAGE)]
    sys.modules[PACKAGE.name] = package
    sys.meta_path.insert(0, PortGuard())


def read_requests(stream: BinaryIO, requests: queue.Queue[Any]) -> None:
    """Read all requests, and end the process at the end of the pipe: the other side has ended."""
    from siglip_port.parity import transport

    while True:
        try:
            requests.put(transport.receive(stream, is_harness))
        except EOFError:
            os._exit(0)
        except Exception as error:  # a request that cannot be unpickled: the next one may be
            requests.put(error)


class Server:
    """Objects of this process, and functions that are called on them.

    Args:
        replies: Pipe to the other process.
        folder: Folder for large tensors.
    """

    def __init__(self, replies: BinaryIO, folder: Path) -> None:
        self.replies = replies
        self.folder = folder
        self.objects: dict[int, object] = {}

    def answer(self, request: Any) -> None:  # noqa: ANN401 (a Request, or an error of reading it)
        """Compute the result of a request, and send it or the error."""
        from siglip_port.parity import transport

        try:
            if isinstance(request, Exception):
                raise request
            reply = (self.compute(request), None)
            transport.send(self.replies, reply, self.folder)
        except BrokenPipeError:
            os._exit(0)
        except Exception as error:  # any error is the other side's to handle
            portable = transport.portable(error, is_portable)
            portable.add_note(f"In the reference's process:\n{traceback.format_exc()}")
            transport.send(self.replies, (None, portable), self.folder)

    def compute(self, request: Any) -> object:  # noqa: ANN401 (a Request)
        """Call the function of a request."""
        import torch

        for key in request.released:
            del self.objects[key]
        torch.set_num_threads(request.threads)
        arguments = request.arguments
        if request.target is not None:
            arguments = (self.objects[request.target], *arguments)
        result = request.function(*arguments, **request.options)
        if request.keep_as is None:
            return result
        self.objects[request.keep_as] = result
        return None


def main() -> None:
    """Answer requests until the other process ends."""
    # Ctrl-C reaches every process of a terminal; the other one closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stream, replies = take_pipes()
    greeting: dict[str, Any] = pickle.load(stream)
    extend_path(greeting["path"])
    server = Server(replies, Path(greeting["folder"]))
    requests: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=read_requests, args=(stream, requests), daemon=True).start()
    while True:
        server.answer(requests.get())


if __name__ == "__main__":
    main()

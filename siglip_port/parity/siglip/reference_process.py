"""The reference in a process of its own, which nothing that the port patches can reach.

Calls are pickled; see `reference_server` for the other side and `siglip_port.parity.transport` for
the messages.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import pickle
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor

from siglip_port.parity import transport
from siglip_port.parity.sides import ReferenceHost
from siglip_port.parity.siglip import reference
from siglip_port.parity.siglip.reference import ReferenceHandle

if TYPE_CHECKING:  # this module is imported in the process of the reference, too
    from siglip_port.config import SigLipVisionConfig
    from siglip_port.image_processing import Backend

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

SERVER = Path(__file__).with_name("reference_server.py")

KILLED = -9
"""Exit code of a process that was killed, on Linux usually for lack of memory."""


class ReferenceProcessError(RuntimeError):
    """The reference's process ended, or cannot be asked."""


class References(Protocol):
    """Place where references are loaded: this process, or another one."""

    def call(
        self,
        function: Callable[Parameters, Result],
        *arguments: Parameters.args,
        **options: Parameters.kwargs,
    ) -> Result:
        """Return `function(*arguments, **options)`, computed at that place."""

    def create(
        self,
        function: Callable[Parameters, Any],
        *arguments: Parameters.args,
        **options: Parameters.kwargs,
    ) -> ReferenceHost:
        """Keep `function(*arguments, **options)` at that place; return a host for it."""

    def load(
        self,
        source: str | Path,
        **options: Any,  # noqa: ANN401 (those of `reference.load`)
    ) -> ReferenceHandle:
        """Load a reference at that place: see `reference.load`."""


@dataclass(frozen=True)
class LocalHost:
    """An object of this process."""

    target: Any

    def compute(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Return `function(target, *arguments)`."""
        return function(self.target, *arguments)


class InThisProcess:
    """References in this process, for tests and for modules that are changed in place."""

    def call(
        self,
        function: Callable[Parameters, Result],
        *arguments: Parameters.args,
        **options: Parameters.kwargs,
    ) -> Result:
        """Call a function."""
        return function(*arguments, **options)

    def create(
        self,
        function: Callable[Parameters, Any],
        *arguments: Parameters.args,
        **options: Parameters.kwargs,
    ) -> ReferenceHost:
        """Call a function and keep its result."""
        return LocalHost(function(*arguments, **options))

    def load(
        self,
        source: str | Path,
        **options: Any,  # noqa: ANN401 (those of `reference.load`)
    ) -> ReferenceHandle:
        """Load a reference."""
        return reference.load(source, **options)


IN_THIS_PROCESS = InThisProcess()


@dataclass(frozen=True)
class Request:
    """Call of a function in the reference's process.

    Attributes:
        function: Function of a module that does not belong to the port.
        arguments: Positional arguments, after the target.
        options: Keyword arguments.
        threads: Number of CPU threads of torch.
        target: Key of the kept object that is the first argument; None for none.
        keep_as: Key under which to keep the result; None to return it.
        released: Keys of objects that are no longer needed.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    threads: int
    target: int | None
    keep_as: int | None
    released: list[int]


class RemoteHost:
    """An object in the reference's process; it is freed with this one.

    Args:
        process: The reference's process.
        key: Key of the object there.
    """

    def __init__(self, process: ReferenceProcess, key: int) -> None:
        self.process = process
        self.key = key
        weakref.finalize(self, process.released.append, key)

    def compute(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Return `function(object, *arguments)`: see `siglip_port.parity.sides.ReferenceHost`."""
        result = self.process.request(function, arguments, target=self.key)
        return cast(Result, result)


class ReferenceProcess:
    """A process for references, clean of everything that this process patches.

    It starts importing transformers at once. Use it as a context manager.

    Args:
        scratch: Folder for large tensors.
    """

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.released: list[int] = []
        self._keys = itertools.count()
        self._process = subprocess.Popen(
            # -P: modules next to the program must not shadow packages.
            [sys.executable, "-P", str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._is_preloading = False
        greeting = {"path": sys.path, "folder": str(scratch)}
        self._send(lambda stream: stream.write(pickle.dumps(greeting)))
        preload = Request(reference.preload, (), {}, 1, None, None, [])
        self._send(lambda stream: transport.send(stream, preload, self.scratch))
        self._is_preloading = True

    def __enter__(self) -> ReferenceProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):  # a request that it did not read
                stream.close()

    def call(
        self,
        function: Callable[Parameters, Result],
        *arguments: Parameters.args,
        **options: Parameters.kwargs,
    ) -> Result:
        """Return `function(*arguments, **options)`, computed in the process.

        Raises:
            ReferenceProcessError: The process ended, or something cannot be pickled.
            Exception: Any error of the function.
        """
        return cast(Result, self.request(function, arguments, options))

    def create(
        self,
        function: Callable[Parameters, Any],
        *arguments: Parameters.args,
        **options: Parameters.kwargs,
    ) -> ReferenceHost:
        """Keep `function(*arguments, **options)` in the process; return a host for it.

        Raises:
            ReferenceProcessError: The process ended, or something cannot be pickled.
            Exception: Any error of the function.
        """
        key = next(self._keys)
        self.request(function, arguments, options, keep_as=key)
        return RemoteHost(self, key)

    def load(
        self,
        source: str | Path,
        **options: Any,  # noqa: ANN401 (those of `reference.load`)
    ) -> ReferenceHandle:
        """Load a reference in the process: see `reference.load`."""
        return RemoteReference(self.create(reference.load_side, source, **options))

    def request(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        options: dict[str, Any] | None = None,
        *,
        target: int | None = None,
        keep_as: int | None = None,
    ) -> object:
        """Send a request and return its result: see `call`, `create` and `RemoteHost`."""
        if self._is_preloading:
            self._is_preloading = False
            self._receive()
        released = list(self.released)
        threads = torch.get_num_threads()
        request = Request(function, arguments, options or {}, threads, target, keep_as, released)
        self._send(lambda stream: self._send_request(stream, request))
        del self.released[: len(released)]
        return self._receive()

    def _send_request(self, stream: Any, request: Request) -> None:  # noqa: ANN401 (a pipe)
        try:
            transport.send(stream, request, self.scratch)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ReferenceProcessError(
                f"{request.function!r} cannot be called in the reference's process ({error}); use "
                "a function of a module, and arguments that can be pickled"
            ) from error

    def _send(self, write: Callable[[Any], object]) -> None:
        try:
            write(self._process.stdin)
            assert self._process.stdin is not None
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def _receive(self) -> object:
        assert self._process.stdout is not None
        try:
            result, error = transport.receive(cast(BinaryIO, self._process.stdout))
        except EOFError:
            raise self._ended() from None
        if error is not None:
            raise error
        return result

    def _ended(self) -> ReferenceProcessError:
        code = self._process.wait()
        advice = "its messages are above"
        if code == KILLED:
            advice = "it was killed, probably for lack of memory: free some, or use fewer threads"
        return ReferenceProcessError(f"the reference's process ended (exit code {code}); {advice}")


class RemoteReference(ReferenceHandle):
    """A reference that was loaded through `References`.

    Args:
        host: Place of the reference, whose target is a `Side`.
    """

    def __init__(self, host: ReferenceHost) -> None:
        self.host = host

    def side(self) -> ReferenceHost:
        """Return the place of the reference."""
        return self.host


def load_processors(
    references: References,
    config: SigLipVisionConfig,
    source: str | Path | None = None,
    **options: Any,  # noqa: ANN401 (those of `reference.image_processors`)
) -> dict[Backend, Callable[[object], dict[str, Tensor]]]:
    """Load the reference's image processors; they are functions of this process.

    Args:
        references: Place of the processors.
        config: Configuration of the model, for its image size.
        source: Checkpoint; None for the defaults.
        options: Options of `reference.image_processors`.

    Returns:
        Functions image -> batch of one by name, by backend.
    """
    fields = reference.fields_of(config)
    host = references.create(reference.image_processors, fields, source, **options)
    processors: dict[Backend, Callable[[object], dict[str, Tensor]]] = {}
    for backend in host.compute(reference.backends_of):
        processors[backend] = functools.partial(host.compute, reference.process_with, backend)
    return processors


@contextlib.contextmanager
def start() -> Iterator[ReferenceProcess]:
    """Start a process for references, and end it with the context."""
    with (
        tempfile.TemporaryDirectory(prefix="siglip_port-reference-") as scratch,
        ReferenceProcess(Path(scratch)) as process,
    ):
        yield process

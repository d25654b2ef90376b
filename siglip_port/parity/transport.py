"""Messages between two processes of one machine: pickles whose large tensors are in a file.

Pickling copies a tensor several times, and a pipe copies it again; a file is written once and
mapped into the memory of the receiver.
"""

from __future__ import annotations

import io
import itertools
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

INLINE_BYTES = 1 << 20
"""Tensors of a message that are no larger in all are sent within it."""

ALIGNMENT = 64
"""Bytes between possible starts of tensors."""

LENGTH = struct.Struct("<Q")

_NUMBERS = itertools.count()


class StoredTensor(NamedTuple):
    """Place of a tensor in the memory that is sent with a message."""

    start: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    device: str


@dataclass(frozen=True)
class Message:
    """Parts of a message.

    Attributes:
        content: Pickle, with a `StoredTensor` for each tensor.
        memory: Memory of the tensors; empty if it is in a file.
        file: Path of that file; empty for none.
    """

    content: bytes
    memory: bytes
    file: str


class Pickler(pickle.Pickler):
    """Pickler that collects tensors instead of pickling them.

    Args:
        stream: Stream for the pickle.
    """

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream, pickle.HIGHEST_PROTOCOL)
        self.tensors: dict[int, Tensor] = {}
        self.places: dict[int, StoredTensor] = {}
        self.num_bytes = 0

    def persistent_id(self, obj: object) -> StoredTensor | None:
        """Return the place of a tensor, and None for everything else; called by `pickle`."""
        if not isinstance(obj, Tensor):
            return None
        if id(obj) not in self.places:
            self.places[id(obj)] = self.add(obj)
        return self.places[id(obj)]

    def add(self, tensor: Tensor) -> StoredTensor:
        """Append a tensor to the memory."""
        self.tensors[id(tensor)] = tensor
        start = self.num_bytes
        num_bytes = tensor.numel() * tensor.element_size()
        self.num_bytes += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        return StoredTensor(start, num_bytes, tensor.dtype, tuple(tensor.shape), str(tensor.device))

    def write_memory(self, stream: BinaryIO) -> None:
        """Write the memory of all tensors, one after the other."""
        for key, tensor in self.tensors.items():
            place = self.places[key]
            stream.write(memory_of(tensor))
            stream.write(bytes(-place.num_bytes % ALIGNMENT))


class Unpickler(pickle.Unpickler):
    """Unpickler of a message.

    Args:
        stream: Stream of the pickle.
        memory: Memory of its tensors, uint8.
        is_allowed: Function that returns whether a module may be imported.
    """

    def __init__(self, stream: BinaryIO, memory: Tensor, is_allowed: Callable[[str], bool]) -> None:
        super().__init__(stream)
        self.memory = memory
        self.is_allowed = is_allowed

    def persistent_load(self, pid: Any) -> Tensor:  # noqa: ANN401 (as declared by `pickle`)
        """Return a tensor: a view of the memory."""
        place = StoredTensor(*pid)
        if not place.num_bytes:
            return torch.empty(place.shape, dtype=place.dtype, device=place.device)
        part = self.memory[place.start : place.start + place.num_bytes]
        return part.view(place.dtype).reshape(place.shape).to(place.device)

    def find_class(self, module_name: str, global_name: str) -> Any:  # noqa: ANN401 (any object)
        """Import an object of a module; called by `pickle`."""
        if not self.is_allowed(module_name):
            raise pickle.UnpicklingError(
                f"{module_name}.{global_name} must not be imported in this process; pass data "
                "without it"
            )
        return super().find_class(module_name, global_name)


def memory_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, in the order of its elements."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def send(stream: BinaryIO, content: object, folder: Path) -> None:
    """Write a message to a stream.

    Nothing is written if the content cannot be pickled.

    Args:
        stream: Pipe to the other process.
        content: Any object that can be pickled.
        folder: Folder for large tensors, which both processes can access.

    Raises:
        OSError: The folder has too little space, or the other process has ended.
    """
    pickled = io.BytesIO()
    pickler = Pickler(pickled)
    pickler.dump(content)
    memory = io.BytesIO()
    path = ""
    if pickler.num_bytes > INLINE_BYTES:
        path = write_file(pickler, folder)
    else:
        pickler.write_memory(memory)
    message = pickle.dumps(Message(pickled.getvalue(), memory.getvalue(), path))
    stream.write(LENGTH.pack(len(message)))
    stream.write(message)
    stream.flush()


def write_file(pickler: Pickler, folder: Path) -> str:
    """Write the memory of the tensors of a message to a new file; return its path."""
    path = folder / f"tensors-{os.getpid()}-{next(_NUMBERS)}"
    try:
        with path.open("xb") as stream:
            pickler.write_memory(stream)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(
            f"{folder}: {pickler.num_bytes / 1e6:.0f} MB of tensors cannot be written ({error}); "
            "set TMPDIR to a folder with more free space"
        ) from error
    return str(path)


def receive(stream: BinaryIO, is_allowed: Callable[[str], bool] = lambda _: True) -> Any:  # noqa: ANN401
    """Read a message from a stream.

    Args:
        stream: Pipe from the other process.
        is_allowed: Function that returns whether a module may be imported.

    Raises:
        EOFError: The other process closed the pipe or has ended.
    """
    (length,) = LENGTH.unpack(read_bytes(stream, LENGTH.size))
    message: Message = pickle.loads(read_bytes(stream, length))
    memory = torch.empty(0, dtype=torch.uint8)
    if message.file:
        memory = read_file(Path(message.file))
    elif message.memory:
        memory = torch.frombuffer(bytearray(message.memory), dtype=torch.uint8)
    return Unpickler(io.BytesIO(message.content), memory, is_allowed).load()


def read_bytes(stream: BinaryIO, length: int) -> bytes:
    """Read exactly this many bytes."""
    content = stream.read(length)
    if len(content) < length:
        raise EOFError("the other process closed the pipe")
    return content


def read_file(path: Path) -> Tensor:
    """Read and delete a file of tensors, uint8."""
    if os.name == "nt":  # a file that is mapped cannot be deleted there
        memory = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    else:
        size = path.stat().st_size
        memory = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    path.unlink()
    return memory


def portable(error: BaseException, is_allowed: Callable[[str], bool]) -> BaseException:
    """Return an error that the other process can unpickle, of the same type if possible.

    Args:
        error: Error of this process.
        is_allowed: Function that returns whether the other process may import a module.
    """
    for base in type(error).__mro__:
        if not is_allowed(base.__module__):
            continue
        candidate = error if base is type(error) else base(str(error))
        if can_be_pickled(candidate):
            return candidate
    return RuntimeError(str(error))


def can_be_pickled(error: object) -> bool:
    """Return whether an error survives pickling: its constructor may need other arguments."""
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:  # whatever the constructor raises
        return False

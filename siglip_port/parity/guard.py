"""A port that raises is different, not a comparison that failed.

An error of the port becomes a finding of the gate that ran it, with the innermost module; the other
gates run. Errors of the reference, of arguments and of the machine are raised.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import TypeVar

import torch
from torch import nn

from siglip_port.parity.gates import MEANING
from siglip_port.parity.results import Finding, GateResult
from siglip_port.parity.sides import PORT_ERRORS, CallError
from siglip_port.parity.taps import Point, Tap

Port = TypeVar("Port")
Result = TypeVar("Result")

OUT_OF_MEMORY = ("out of memory", "can't allocate memory")
"""Parts of the messages of devices whose errors are a plain RuntimeError."""

MACHINE_ERRORS = (MemoryError, torch.OutOfMemoryError, OSError, ImportError)
"""Errors outside the port's own code that say nothing about the port."""


@dataclass(frozen=True)
class Guard:
    """Runs gates on a port, and turns its errors into findings.

    Attributes:
        port: Port.
        reference_names: Modules of the port -> modules of the reference, such as those with taps.
    """

    port: object
    reference_names: Mapping[str, str] = field(default_factory=dict)

    def run(self, gate: str, *checks: Callable[[], GateResult]) -> GateResult:
        """Return the result of a gate; a failure if the port raises an error.

        Args:
            gate: Name of the gate, with its dtype for `rounding`.
            checks: Functions that run it, or its parts.

        Raises:
            Exception: The error of the reference, of an argument or of the machine.
        """
        results = []
        for check in checks:
            try:
                results.append(check())
            except PORT_ERRORS as error:
                if not is_error_of_port(error, self.port):
                    raise
                results.append(failed_gate(gate, self.finding(error)))
        return join(results)

    def attempt(self, function: Callable[[], Result]) -> Result | None:
        """Return the result of a function; None if the port raises an error.

        For what is not a gate: the gates report the error.
        """
        try:
            return function()
        except PORT_ERRORS as error:
            if not is_error_of_port(error, self.port):
                raise
            return None

    def finding(self, error: BaseException) -> Finding:
        """Return the finding for an error of the port."""
        path = innermost_module(error, self.port)
        message = f"the port raises {describe(error)}"
        if not path or not str(error):
            message += f" ({place_in_code(error)})"
        return Finding(message, self.reference_name(path), path, kind="error")

    def reference_name(self, path: str) -> str:
        """Return the reference's name of a module of the port, or of the nearest one around it."""
        while path and path not in self.reference_names:
            path = path.rpartition(".")[0]
        return self.reference_names.get(path, "")


def guard_with_taps(port: object, taps: Iterable[Tap]) -> Guard:
    """Return the guard of a port whose modules are named by taps."""
    names: dict[str, str] = {}
    for tap in taps:
        names.setdefault(Point.parse(tap.port).path, Point.parse(tap.reference).path)
    return Guard(port, names)


def load(load_port: Callable[[], Port]) -> Port | GateResult:
    """Load a port from a checkpoint that was written for the comparison, so that it must succeed.

    Returns:
        The port; if loading raises an error, the gate `weights`, which failed.

    Raises:
        Exception: The error of the machine.
    """
    try:
        return load_port()
    except PORT_ERRORS as error:
        if is_out_of_memory(error) or isinstance(error, MACHINE_ERRORS):
            raise
        message = f"loading the port raises {describe(error)} ({place_in_code(error)})"
        return failed_gate("weights", Finding(message, kind="error"))


def join(results: list[GateResult]) -> GateResult:
    """Join the results of the parts of a gate."""
    first, *others = results
    for other in others:
        first = replace(
            first,
            checked=first.checked + other.checked,
            findings=first.findings + other.findings,
            measurements=first.measurements + other.measurements,
        )
    return first


def failed_gate(gate: str, finding: Finding) -> GateResult:
    """Return the result of a gate that could not run to its end."""
    meaning = MEANING[gate.split()[0]]
    return GateResult(gate, 1, meaning.bound, (finding,))


def describe(error: BaseException) -> str:
    """Return the type and the first line of an error."""
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])


def place_in_code(error: BaseException) -> str:
    """Return file, line and function of the innermost frame of an error that is not in torch."""
    frames = traceback.extract_tb(error.__traceback__)
    torch_folder = str(Path(torch.__file__).parent)
    own = [frame for frame in frames if not frame.filename.startswith(torch_folder)]
    frame = own[-1] if own else frames[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}, in {frame.name}"


def is_error_of_port(error: BaseException, port: object) -> bool:
    """Return whether the port, or something that it returned, caused an error.

    An error is the port's if it was raised within one of its modules, or if a gate failed on its
    results: the reference, whose results pass the same code, did not fail there.
    """
    if is_out_of_memory(error) or isinstance(error, CallError):
        return False
    paths = module_paths(port)
    for frame in frames_of(error):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in paths:
            return True
        if is_reference(frame):
            return False
    return not isinstance(error, MACHINE_ERRORS)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device has too little memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def is_reference(frame: FrameType) -> bool:
    """Return whether a frame is that of `ReferenceHost.compute`, in which the reference runs."""
    owner = frame.f_locals.get("self")
    is_method = owner is not None and not isinstance(owner, nn.Module)
    return is_method and frame.f_code.co_name == "compute"


def innermost_module(error: BaseException, port: object) -> str:
    """Return the path of the innermost module of the port that was running; empty for none."""
    paths = module_paths(port)
    path = ""
    for frame in frames_of(error):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            path = paths.get(id(owner), path)
    return path


def module_paths(port: object) -> dict[int, str]:
    """Return the path of every module by its identity; the outermost one is `model`.

    A port that is no module has none.
    """
    if not isinstance(port, nn.Module):
        return {}
    return {id(module): path or "model" for path, module in port.named_modules()}


def frames_of(error: BaseException) -> Iterator[FrameType]:
    """Yield the frames of an error's traceback, outermost first."""
    step: TracebackType | None = error.__traceback__
    while step is not None:
        yield step.tb_frame
        step = step.tb_next

"""Runs a load and reports any side effects."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from scripts.fuzz.npz_edits import TRAP
from siglip_port import CheckpointError, SigLipVisionModel


class HangError(BaseException):
    """The time limit was exceeded. Not an `Exception`, so that no loader catches it."""


class Guarded(NamedTuple):
    """The result of a load.

    Attributes:
        model: the model; None if it was refused.
        problem: failure or side effect; empty if there is none.
    """

    model: SigLipVisionModel | None
    problem: str


def run_guarded(load: Callable[[], SigLipVisionModel], seconds: float) -> Guarded:
    """Run a load with a time limit in seconds."""
    model = None
    output = io.StringIO()
    try:
        with (
            warnings.catch_warnings(record=True) as records,
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
            time_limit(seconds),
        ):
            warnings.simplefilter("always")
            with contextlib.suppress(CheckpointError):
                model = load()
    except HangError:
        return Guarded(None, f"no result after {seconds:g} seconds")
    except Exception:
        return Guarded(None, traceback.format_exc())
    if os.environ.pop(TRAP, ""):
        return Guarded(None, "a pickle was loaded")
    if records:
        return Guarded(None, f"warned: {records[0].message}")
    if output.getvalue():
        return Guarded(model, f"printed: {output.getvalue()}")
    return Guarded(model, "")


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise HangError after a number of seconds."""

    def ring(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak_memory() -> int:
    """Return the peak resident memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

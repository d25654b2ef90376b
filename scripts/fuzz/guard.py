"""Runs a load, and tells what it does beside loading or refusing."""

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
    """It has taken too long. Not an `Exception`, which a loader might take for its own."""


class Guarded(NamedTuple):
    """What became of a load.

    Attributes:
        model: None if it was refused.
        problem: what went wrong, if it was neither loaded nor refused; else empty.
    """

    model: SigLipVisionModel | None
    problem: str


def run_guarded(load: Callable[[], SigLipVisionModel], seconds: float) -> Guarded:
    """Load, for so many seconds at the most."""
    model = None
    output = io.StringIO()
    try:
        with (
            warnings.catch_warnings(record=True) as caught,
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
            time_limit(seconds),
        ):
            warnings.simplefilter("always")
            with contextlib.suppress(CheckpointError):
                model = load()
    except HangError:
        return Guarded(None, f"nothing in {seconds:g} seconds")
    except Exception:
        return Guarded(None, traceback.format_exc())
    if os.environ.pop(TRAP, ""):
        return Guarded(None, "a pickle was loaded")
    if caught:
        return Guarded(None, f"warned: {caught[0].message}")
    if output.getvalue():
        return Guarded(model, f"printed: {output.getvalue()}")
    return Guarded(model, "")


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise HangError after so many seconds."""

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
    """Return the most memory that this process has had so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

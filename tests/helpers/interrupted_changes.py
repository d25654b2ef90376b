"""Interrupt `atomic.Transaction` between two changes to a folder."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from siglip_port.atomic import Transaction


class StopError(Exception):
    """An interruption."""


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int, *, killed: bool) -> None:
    """Raise StopError in place of the n-th change; `killed` leaves the folder as it is then."""
    steps = iter(range(10**6))

    def stopping(change: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: object) -> None:
            if next(steps) == number:
                raise StopError
            change(*arguments)

        return run

    for name in ("move", "remove"):
        monkeypatch.setattr(Transaction, name, stopping(getattr(Transaction, name)))
    if killed:
        monkeypatch.setattr(Transaction, "undo", lambda transaction: None)

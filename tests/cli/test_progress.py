"""Progress is shown on a terminal, and nowhere else."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator

import pytest

from siglip_port.cli import progress
from siglip_port.cli.embed import describe_progress
from siglip_port.cli.progress import status_line, track
from siglip_port.embed import Progress

CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Screen:
    """Output of a pseudo-terminal."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def read(self) -> str:
        """Return the output since the last call, as plain text."""
        sys.stderr.flush()
        written = b""
        with contextlib.suppress(BlockingIOError):
            while True:
                written += os.read(self.descriptor, 4096)
        return CONTROLS.sub("", written.decode())

    def lines(self) -> list[str]:
        """Return the lines since the last call, each of which overwrites the previous one."""
        return [line.strip() for line in re.split(r"[\r\n]+", self.read())]


@contextlib.contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Screen]:
    """Make stderr a terminal of 60 columns; no fixture, since pytest resets stderr per phase."""
    screen, descriptor = os.openpty()
    os.set_blocking(screen, False)
    with os.fdopen(descriptor, "w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        patch.setenv("COLUMNS", "60")
        patch.setenv("TERM", "xterm")
        yield Screen(screen)
    os.close(screen)


def test_track(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as screen:
        assert list(track(iter("abc"), "loading model [L7]")) == list("abc")
        lines = screen.lines()
    counts = [line.removesuffix(" 0:00:00") for line in lines if line]
    assert list(dict.fromkeys(counts)) == [f"loading model [L7] {count}/?" for count in range(4)]
    assert lines[-1] == ""  # it is erased


def test_track_total(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as screen:
        assert list(track(iter("abc"), "mutants", 261)) == list("abc")
        assert "mutants   3/261 0:00:00" in screen.lines()


def test_track_erases_after_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Iterator[str]:
        yield "a"
        raise ValueError("broken")

    with terminal(monkeypatch) as screen:
        with pytest.raises(ValueError, match="broken"):
            list(track(fail(), "loading model"))
        assert screen.lines()[-1] == ""


def test_status_line_fits_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrapped lines could not be overwritten."""
    monkeypatch.setattr(progress, "REFRESH_SECONDS", -1.0)
    run = Progress(
        total=10_000, done=5000, failed=47, processed=100, seconds=10.0, model_seconds=9.0
    )
    text = describe_progress(run)
    assert text == (
        "5,000/10,000 images, 47 failed, 10.0 images/s, 8 min left: model 90%, waiting 0%, "
        "writing 0%, decoding 0%, preprocessing 0%"
    )
    with terminal(monkeypatch) as screen:
        with status_line() as show:
            show(text)
            assert screen.lines()[-1] == text[:60].strip()
        assert screen.lines()[-1] == ""


def test_status_line_is_not_drawn_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as screen:
        with status_line() as show:
            for number in range(1000):
                show(f"number {number}")
        lines = screen.lines()
    assert "number 0" in lines
    assert len(lines) < 50


def test_nothing_without_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(iter("abc"), "loading model")) == list("abc")
    with status_line() as show:
        show("listing images")
    assert capsys.readouterr() == ("", "")


def test_nothing_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as screen:
        monkeypatch.setitem(sys.modules, "rich", None)
        assert list(track(iter("abc"), "loading model")) == list("abc")
        with status_line() as show:
            show("listing images")
        assert screen.read() == ""

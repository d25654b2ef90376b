"""The generated blocks of README.md and docs/."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from scripts import docs


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "CONTRIBUTING.md", "docs/a.md"):
        (tmp_path / name).write_text("unchanged\n")
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setattr(docs, "BLOCKS", {"count": lambda: "3 gates\n"})
    return tmp_path


def call(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["docs.py", *arguments])
    return docs.main()


def test_update_and_check(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = root / "docs" / "a.md"
    page.write_text("A\n<!-- generated: count -->\n2 gates\n<!-- end -->\nB\n")
    assert call("--check", monkeypatch=monkeypatch) == 1
    assert capsys.readouterr().out == "out of date: docs/a.md; run: uv run scripts/docs.py\n"
    assert "2 gates" in page.read_text()
    assert call(monkeypatch=monkeypatch) == 0
    assert page.read_text() == "A\n<!-- generated: count -->\n3 gates\n<!-- end -->\nB\n"
    assert call("--check", monkeypatch=monkeypatch) == 0
    assert (root / "README.md").read_text() == "unchanged\n"


def test_unknown_block(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "README.md").write_text("<!-- generated: other -->\n<!-- end -->\n")
    with pytest.raises(KeyError, match="other"):
        call(monkeypatch=monkeypatch)


def test_checkpoints() -> None:
    """Every published checkpoint is in the table."""
    table = docs.checkpoints()
    for size in ("base, 93 M", "large, 316 M", "so400m, 428 M", "giant-opt, 1,163 M"):
        assert size in table
    assert table.count("patch16-naflex") == 2
    assert "medsiglip" in table


def test_commands() -> None:
    assert docs.commands().count("| `siglip-port ") == 8


RECORDED = {
    "machine": "a machine",
    "summary": "a summary",
    "mutants": [
        {"gate": "pixels", "source": "a/b#1", "detected_by": ["pixels"], "located": True},
        {"gate": "pixels", "source": "variant", "detected_by": ["numerics"], "located": False},
        {"gate": "numerics", "source": "a/b#2", "detected_by": ["numerics"], "located": True},
        {"gate": "numerics", "source": "c/d#3", "detected_by": [], "located": False},
    ],
    "equivalent_variants": [
        {"name": "x", "false_alarm": False},
        {"name": "x", "false_alarm": True},
        {"name": "y", "false_alarm": False},
    ],
}
"""A recorded self-test in which all counts differ."""


def test_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs, "read_json", lambda _: RECORDED)
    text = docs.proof()
    assert "plants 4 bugs in the port, 3 of them with a public source" in text
    assert "The gates detect 2 and locate 2, with 1 false alarms in 3 runs of 2 equivalent" in text


def test_selftest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs, "read_json", lambda _: RECORDED)
    table = docs.selftest()
    assert "on a machine: a summary." in table
    assert "| gate | its mutants | detected | located |" in table
    assert "| pixels | 2 | 1 | 1 |" in table
    assert "| numerics | 2 | 1 | 1 |" in table

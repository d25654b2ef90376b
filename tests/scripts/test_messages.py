"""scripts/messages.py: the messages in source code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from scripts import messages

SOURCE = '''
"""A docstring is no message."""
import logging
import typer

UNREADABLE = "the file cannot be read"
log = logging.getLogger("a name")

def load(path: str, count: int, option: Annotated[str, typer.Option(help="Batch size.")]) -> str:
    """Nor is this one."""
    if not path:
        raise ValueError(f"{path!r} must have at least {count:,} bytes, " + "got none")
    advice = f"pass another of {count}" if count else "pass a path"
    if count:
        raise TypeError(f"{path}: {UNREADABLE}") from None
    log.warning("%s is fetched again", path)
    raise RuntimeError(advice)

def report(path: str) -> str:
    typer.echo(path)
    print("written", f"to {path}")
    name = "no message"
    raise typer.BadParameter(UNREADABLE)

def describe(path: str) -> str:
    return f"{path} does not exist"

def suffix() -> str:
    return ".npz"
'''


def test_find_messages() -> None:
    result = messages.find_messages(ast.parse(SOURCE))
    assert [(message.kind, message.text) for message in result] == [
        ("help", "Batch size."),
        ("ValueError", "{path} must have at least {count} bytes, got none"),
        ("TypeError", "{path}: the file cannot be read"),
        ("warning", "%s is fetched again"),
        ("RuntimeError", "<pass another of {count}|pass a path>"),
        ("print", "written to {path}"),
        ("BadParameter", "the file cannot be read"),
        ("return", "{path} does not exist"),
    ]


def test_main(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "module.py"
    file.write_text(f"{SOURCE}\nprint('one line\\nanother line')\n")
    (tmp_path / "empty.py").touch()
    assert messages.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"\n{file}\n     9  help: Batch size.\n")
    assert printed.endswith("print: one line\n        another line\n")
    assert "empty.py" not in printed


def test_default_is_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert messages.main([]) == 0
    printed = capsys.readouterr().out
    assert "\nsiglip_port/extras.py\n" in printed
    assert "MissingExtraError: {package} is not installed; run: pip install" in printed

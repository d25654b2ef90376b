"""Help texts: length, form and names of options; what `--help` imports."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command

from siglip_port.cli import exit_codes, verify
from siglip_port.cli.app import app
from tests.helpers.commands import run

MAX_LENGTH = 60
"""Characters of a summary or help text."""

LITERALS = {"auto", "cpu", "cuda", "dtype", "eager", "fastest", "hub", "local", "random"}
"""Words in lower case that a help text may start with: names and values that a user types."""

SHARED_OPTIONS = {"--revision", "--offline"}
CHECKPOINT_OPTIONS = SHARED_OPTIONS | {"--layout", "--prefix"}
OPTIONS = {
    "inspect": CHECKPOINT_OPTIONS | {"--json"},
    "extract": CHECKPOINT_OPTIONS | {"--dtype", "--format"},
    "export": CHECKPOINT_OPTIONS | {"--format"},
    "embed": SHARED_OPTIONS
    | {
        "--output", "-o", "--model", "--dtype", "--device", "--engine", "--threads", "--batch-size",
        "--shard-size", "--num-workers", "--tokens", "--normalize", "--output-dtype", "--format",
        "--backend", "--executor", "--address", "--json", "--preprocessing",
    },
    "search": {"--top-k", "-k", "--model", "--offline", "--json"},
    "plot": SHARED_OPTIONS | {"--output", "-o", "--model", "--preprocessing"},
    "list": {"--json"},
}  # fmt: skip
"""Options that a command has at least."""

HEAVY_PACKAGES = ("torch", "numpy", "transformers", "PIL")

COMMANDS: dict[str, Any] = dict(get_command(app).commands)  # type: ignore[attr-defined]


class ParserBuilt(Exception):  # noqa: N818 (carries a result)
    """The parser of `verify`, built but not run."""


def verify_parser() -> argparse.ArgumentParser:
    """Return the parser of `verify` as its `main` builds it."""

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        raise ParserBuilt(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(ParserBuilt) as built:
            verify.main([])
    parser = built.value.args[0]
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


def help_texts() -> Iterator[tuple[str, str]]:
    """Yield the name and help text of every command, argument and option."""
    for name, command in COMMANDS.items():
        yield name, command.help.partition("\n\n")[0].replace("\n", " ")
        for parameter in command.params:
            yield f"{name} {parameter.opts[0]}", parameter.help or ""
    parser = verify_parser()
    yield "verify (argparse)", parser.description or ""
    for action in parser._actions:
        if action.dest != "help":
            yield f"verify {action.option_strings[0]}", action.help or ""


TEXTS = dict(help_texts())


@pytest.mark.parametrize("name", TEXTS)
def test_help_text(name: str) -> None:
    """Help is short, capitalized (except literal values), and ends with a period or `]`."""
    text = TEXTS[name]
    assert 0 < len(text) <= MAX_LENGTH, text
    assert text.endswith((".", "]")), text
    first_word = re.split(r"[\s,:;]", text)[0].strip("`'")
    assert first_word[:1].isupper() or first_word in LITERALS, text


@pytest.mark.parametrize("command", COMMANDS)
def test_no_exit_codes_in_commands(command: str) -> None:
    """The help of the group lists them once."""
    assert "exit code" not in COMMANDS[command].help.lower()


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_80_columns(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = run(*command.split(), "--help").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    after_usage = lines[lines.index("") :]
    cut_off = [line for line in after_usage if re.search(r"[^ ]\.\.\.$", line)]
    assert cut_off == []


def test_group_help_lists_summaries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = run("--help").stdout.splitlines()
    for command in COMMANDS:
        assert f"  {command:<8} {TEXTS[command]}" in lines


def test_group_help_lists_exit_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    printed = run("--help").stdout
    assert "siglip-port COMMAND --help" in printed
    assert "python -m siglip_port" in printed
    lines = [f"    {code:<3}  {meaning}" for code, meaning in exit_codes.MEANINGS.items()]
    lines += [f"    {exit_codes.VERIFY_MEANINGS}"]
    assert printed.endswith("\n".join(["  Exit codes:", *lines, ""]))


@pytest.mark.parametrize("command", OPTIONS)
def test_option_names(command: str) -> None:
    names = {name for parameter in COMMANDS[command].params for name in parameter.opts}
    assert OPTIONS[command] - names == set()


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_fast(command: str) -> None:
    """`--help` imports no package that takes seconds."""
    code = f"""
import sys
from siglip_port.cli.main import main
sys.argv[1:] = [*{command.split()}, "--help"]
try:
    main()
except SystemExit as error:
    print("imported:", *({{*{HEAVY_PACKAGES}}} & sys.modules.keys()), error.code)
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert process.stdout.endswith("imported: 0\n"), process.stdout + process.stderr

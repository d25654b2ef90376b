"""Messages offer the options of the command that prints them."""

from __future__ import annotations

import ast
import inspect
import logging
import re
import typing
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import siglip_port
from scripts.messages import find_messages
from siglip_port.checkpoint import CheckpointError, LoadOptions
from siglip_port.checkpoint import inspect as inspect_module
from siglip_port.cli import advice
from siglip_port.cli.app import app
from siglip_port.cli.options import CHECKPOINT_OPTIONS
from siglip_port.cli.verify import OPTIONS as VERIFY_OPTIONS
from siglip_port.embed import Embedder, embed
from siglip_port.embed.search import embed_query
from tests.helpers.commands import run

PACKAGE = Path(siglip_port.__file__).parent

PRINTED = ("checkpoint", "embed", "hub", "optimize")
"""Packages whose messages a command can print, beside the modules at the top."""

NOT_ARGUMENTS = {"dim", "elementwise_affine", "eps", "num_patches", "resample"}
"""Values that messages contain in the form of an argument."""

ARGUMENT = re.compile(r"(?<![\w/{-])([a-z_]+)=(?!=)")

COMMANDS: dict[str, Any] = dict(get_command(app).commands)  # type: ignore[attr-defined]
OPTIONS = {
    name: {option for parameter in command.params for option in parameter.opts}
    for name, command in COMMANDS.items()
} | {"verify": set(VERIFY_OPTIONS)}


def printed_messages() -> list[str]:
    """Return the messages of the package that name an argument."""
    files = [*PACKAGE.glob("*.py")]
    for name in PRINTED:
        files += (PACKAGE / name).rglob("*.py")
    texts = []
    for file in sorted(files):
        for message in find_messages(ast.parse(file.read_text())):
            if ARGUMENT.search(message.text):
                texts.append(message.text)
    return texts


MESSAGES = printed_messages()


def test_messages_are_found() -> None:
    assert len(MESSAGES) > 25
    assert any("pass layout= and prefix=" in text for text in MESSAGES)


@pytest.mark.parametrize("text", MESSAGES)
def test_arguments_are_known(text: str) -> None:
    """A new argument in a message has to be added to `advice`, as an option or not."""
    known = {*advice.OPTIONS, *advice.PYTHON_ONLY, *NOT_ARGUMENTS}
    assert {*ARGUMENT.findall(text)} <= known


@pytest.mark.parametrize("command", OPTIONS)
def test_every_message_of_every_command(command: str) -> None:
    for text in MESSAGES:
        printed = advice.in_options(text, OPTIONS[command])
        for match in ARGUMENT.finditer(printed):
            assert "(in Python)" in printed[match.end() :] or match[1] in NOT_ARGUMENTS, printed
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", printed):
            if option not in text:
                assert option in OPTIONS[command], printed


def test_options_are_those_of_commands() -> None:
    every_option = set().union(*OPTIONS.values())
    assert set(advice.OPTIONS.values()) <= every_option
    assert not {f"--{name.replace('_', '-')}" for name in advice.PYTHON_ONLY} & every_option


def test_arguments_of_functions_are_known() -> None:
    """Every argument that an error of these functions may name."""
    arguments = {*typing.get_type_hints(LoadOptions), *inspect.signature(embed).parameters}
    arguments |= {*inspect.signature(Embedder).parameters}
    arguments |= {*inspect.signature(embed_query).parameters}
    positional = {
        "inputs",
        "output_dir",
        "model",
        "embeddings",
        "image",
        "batch_size",
        "shard_size",
    }
    assert arguments - positional <= {*advice.OPTIONS, *advice.PYTHON_ONLY}


@pytest.mark.parametrize("command", ["inspect", "extract", "export", "embed", "search", "plot"])
def test_every_command_has_checkpoint_options(command: str) -> None:
    assert OPTIONS[command] >= {f"--{name}" for name in CHECKPOINT_OPTIONS}


@pytest.mark.parametrize(
    ("message", "options", "expected"),
    [
        ("pass layout= and prefix=", ["--layout", "--prefix"], "pass --layout and --prefix"),
        (
            "layout='timm', prefix='a b.'; pass",
            ["--layout", "--prefix"],
            "--layout timm --prefix 'a b.'; pass",
        ),
        ("prefix=''", ["--prefix"], "--prefix ''"),
        (
            "or pass config=SigLipVisionConfig(...)",
            ["--config"],
            "or pass --config FILE",
        ),
        ("pass config=; now", ["--layout"], "correct its config.json; now"),
        ("disabled by local_files_only=True; load", ["--offline"], "disabled by --offline; load"),
        ("pass tokens=True", ["--tokens"], "pass --tokens"),
        ("pass tokens=True", [], "pass tokens=True (in Python)"),
        (
            "pass token=; or pass token=False",
            [],
            "set HF_TOKEN; or set HF_HUB_DISABLE_IMPLICIT_TOKEN=1",
        ),
        ("use interpolation='hf'", ["--layout"], "use interpolation='hf' (in Python)"),
        (
            "reduce num_workers= or threads=",
            ["--threads", "--num-workers"],
            "reduce --num-workers or --threads",
        ),
        ("does not support dtype=torch.int8", ["--dtype"], "does not support --dtype int8"),
        ("/data/config=a/prefix=b: no", ["--config", "--prefix"], "/data/config=a/prefix=b: no"),
    ],
)
def test_in_options(message: str, options: list[str], expected: str) -> None:
    assert advice.in_options(message, options) == expected


def test_warnings_are_translated(encoder_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings go to stderr, also those that name an argument."""

    def warn(*_: object, **__: object) -> None:
        logging.getLogger("siglip_port.checkpoint").warning("%s; pass config=", "a=b")
        raise CheckpointError("no; pass layout=")

    monkeypatch.setattr(inspect_module, "inspect_checkpoint", warn)
    stderr = run("inspect", encoder_folder, code=1).stderr
    assert stderr == "a=b; pass --config FILE\nno; pass --layout\n"
    assert not logging.getLogger("siglip_port").handlers

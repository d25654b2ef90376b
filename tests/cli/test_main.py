"""The entry point, usage errors, missing extras, and `siglip-port list`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import typer

import siglip_port
from siglip_port.checkpoint.extract import Format
from siglip_port.checkpoint.registry import PUBLISHED
from siglip_port.cli import checkpoints, exit_codes, main, usage_errors
from siglip_port.cli.options import DEFAULT_MODEL
from siglip_port.parity.siglip.verify_options import DEFAULT_CHECKPOINT
from tests.helpers.commands import run

ROOT = Path(__file__).parents[2]
COMMAND = Path(sys.executable).with_name("siglip-port")
PACKAGE = Path(siglip_port.__file__).parent


def execute(*command: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a subprocess."""
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def test_installed_command(whole_model: Path) -> None:
    result = execute(COMMAND, "inspect", whole_model)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == run("inspect", whole_model).stdout


def test_main_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = str(tmp_path / "absent.safetensors")
    monkeypatch.setattr(sys, "argv", ["siglip-port", "inspect", absent])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == exit_codes.FAILURE
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1


def test_version() -> None:
    """`__version__` is a constant: the package may run without being installed."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert siglip_port.__version__ == pyproject["project"]["version"]
    assert run("--version").stdout == f"siglip-port {siglip_port.__version__}\n"
    for path in PACKAGE.rglob("*.py"):
        assert not re.search(r"""version\(["']siglip.port""", path.read_text()), path


def test_help_lists_all_commands() -> None:
    commands = re.findall(r"^  (\w+)  +[A-Z]", run("--help").stdout, re.MULTILINE)
    assert commands == [
        "inspect", "extract", "export", "embed", "search", "plot", "list", "verify",
    ]  # fmt: skip


def test_without_typer_and_rich() -> None:
    """`verify` works; the other commands name the extra."""
    code = """
import sys
import tomllib
sys.modules["typer"] = sys.modules["rich"] = None
from siglip_port.cli.main import main
for arguments in (["verify", "--list-gates"], ["list"]):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as error:
        print(f"exit code {error.code}")
"""
    result = execute(sys.executable, "-c", code)
    assert result.stdout.startswith("pixels: ")
    assert result.stdout.endswith("\nexit code 0\nexit code 2\n")
    assert result.stderr == "typer is not installed; run: pip install 'siglip-port[cli]'\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["embed", "a", "-o", "b"],
            "pyarrow is not installed; run: pip install 'siglip-port[embed]'",
        ),
        (
            ["search", "a", "b"],
            "pyarrow is not installed; run: pip install 'siglip-port[embed]'",
        ),
        (
            ["plot", "a", "-o", "b"],
            "matplotlib is not installed; run: pip install 'siglip-port[plot]'",
        ),
    ],
)
def test_missing_extra(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("pyarrow", "matplotlib"):
        monkeypatch.setitem(sys.modules, package, None)
    result = run(*arguments, code=2)
    assert (result.stdout, result.stderr) == ("", f"{message}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["extract", "a", "b", "--dtype", "bf16"],
            "Error: Invalid value for '--dtype': must be one of float32, float16, bfloat16, "
            "float64, got 'bf16'",
        ),
        (
            ["embed", "a", "-o", "b", "--batch-size", "0"],
            "Error: Invalid value for '--batch-size': must be at least 1, got 0",
        ),
        (
            ["embed", "a", "-o", "b", "--batch-size", "x"],
            "Error: Invalid value for '--batch-size': must be an integer, got 'x'",
        ),
        (["inspect", "a", "--bogus"], "Error: No such option: --bogus"),
        (["bogus"], "Error: No such command 'bogus'."),
    ],
)
def test_usage_error(arguments: list[str], message: str) -> None:
    result = run(*arguments, code=exit_codes.USAGE_ERROR)
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1] == message


def test_layout_choices() -> None:
    result = run("inspect", "a", "--layout", "b", code=exit_codes.USAGE_ERROR)
    message = (
        r"Invalid value for '--layout': must be one of huggingface, .*, moondream-old, got 'b'"
    )
    assert re.search(message, result.stderr)


def test_file_in_place_of_directory(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    result = run("plot", "a", "-o", file, code=exit_codes.USAGE_ERROR)
    assert f"'{file}' is a file; pass a folder" in result.stderr


@pytest.mark.parametrize(
    ("message", "reworded"),
    [
        ("'c' is not one of 'a', 'b'.", "must be one of a, b, got 'c'"),
        ("0 is not in the range x>=1.", "must be at least 1, got 0"),
        ("'x' is not a valid integer range.", "must be an integer, got 'x'"),
        ("'x' is not a valid integer.", "must be an integer, got 'x'"),
        ("Directory 'x' is a file.", "'x' is a file; pass a folder"),
        ("something else.", "something else."),
    ],
)
def test_messages_of_click_are_reworded(message: str, reworded: str) -> None:
    """Some releases of typer check values with click."""
    error = typer.BadParameter(message)
    usage_errors.reword(error)
    assert error.message == reworded


def test_verify_is_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through `main`, without typer, and through the typer application."""
    monkeypatch.setattr(sys, "argv", ["siglip-port", "verify", "--attn", "flash"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == exit_codes.USAGE_ERROR
    usage = capsys.readouterr().err
    assert usage.startswith("usage: siglip-port verify [options]")
    assert usage.endswith("--attn: must be one of both, sdpa, eager, got 'flash'\n")
    assert run("verify", "--attn", "flash", code=2).stderr == usage
    assert run("verify", "--help").stdout.startswith("usage: siglip-port verify [options]")
    assert run("verify", "--image", "absent.png", code=2).stderr.startswith("could not compare: ")


def test_repeated_constants() -> None:
    """Constants that the command line repeats, since their modules are slow to import."""
    assert DEFAULT_MODEL == DEFAULT_CHECKPOINT == PUBLISHED[0].repo
    hints = get_type_hints(checkpoints.extract)
    assert get_args(hints["format"]) == get_args(Format)


def test_list() -> None:
    rows = json.loads(run("list", "--json").stdout)["published"]
    printed = run("list").stdout.splitlines()
    assert len(rows) == len(printed) - 1 == len(PUBLISHED) == 28
    assert "\n".join(printed[:3]) in (ROOT / "docs" / "cli.md").read_text()
    for row, line, published in zip(rows, printed[1:], PUBLISHED, strict=True):
        assert row["repo"] == published.repo
        assert row["vision_parameters"] == published.vision_parameters
        assert row["vision_bytes"] == published.vision_bytes == 4 * published.vision_parameters
        assert row["share"] == published.vision_parameters / published.total_parameters
        assert (row["embed_dim"], row["patch_size"]) == (
            published.config.embed_dim,
            published.config.patch_size,
        )
        assert row["resample"] == {2: "bilinear", 3: "bicubic"}[published.resample]
        assert line.startswith(f"{published.repo} ")
        image = "any" if row["naflex"] else str(published.config.image_size)
        assert line.split()[1:4] == [row["size"], image, str(row["patch_size"])]
        assert f" {published.vision_parameters:,} " in line
    assert printed[1].split()[-3:] == ["371.5", "MB", "46%"]

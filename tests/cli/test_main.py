"""The command itself: its entry point, what it needs, and `siglip-port list`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import siglip_port
from siglip_port.checkpoint.extract import Format
from siglip_port.checkpoint.registry import PUBLISHED
from siglip_port.cli import checkpoints, main
from siglip_port.cli.options import DEFAULT_MODEL
from siglip_port.parity.siglip.verify_options import DEFAULT_CHECKPOINT
from tests.helpers.commands import run

ROOT = Path(__file__).parents[2]
COMMAND = Path(sys.executable).with_name("siglip-port")
PACKAGE = Path(siglip_port.__file__).parent


def execute(*command: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def test_installed_command(whole_model: Path) -> None:
    result = execute(COMMAND, "inspect", whole_model)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == run("inspect", whole_model).stdout


def test_main_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "nothing.safetensors")
    monkeypatch.setattr(sys, "argv", ["siglip-port", "inspect", missing])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1


def test_version() -> None:
    """One number, in one place: the package may not be installed."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert siglip_port.__version__ == pyproject["project"]["version"]
    assert run("--version").stdout == f"siglip-port {siglip_port.__version__}\n"
    for path in PACKAGE.rglob("*.py"):
        assert not re.search(r"""version\(["']siglip.port""", path.read_text()), path


def test_help_lists_all_commands() -> None:
    listed = re.findall(r"^  (\w+)  +[A-Z]", run("--help").stdout, re.MULTILINE)
    assert listed == [
        "inspect", "extract", "export", "embed", "search", "plot", "list", "verify",
    ]  # fmt: skip


def test_without_the_extra() -> None:
    """`verify` works, and the rest says what is missing."""
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
    ("arguments", "sentence"),
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
def test_missing_extra(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("pyarrow", "matplotlib"):
        monkeypatch.setitem(sys.modules, package, None)
    result = run(*arguments, code=2)
    assert (result.stdout, result.stderr) == ("", f"{sentence}\n")


def test_verify_is_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before typer, and within it."""
    monkeypatch.setattr(sys, "argv", ["siglip-port", "verify", "--attn", "flash"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    usage = capsys.readouterr().err
    assert usage.startswith("usage: siglip-port verify [options]")
    assert run("verify", "--attn", "flash", code=2).stderr == usage
    assert run("verify", "--help").stdout.startswith("usage: siglip-port verify [options]")
    assert run("verify", "--image", "absent.png", code=2).stderr.startswith("could not compare: ")


def test_constants_that_are_repeated() -> None:
    """Where the original would be slow to import."""
    assert DEFAULT_MODEL == DEFAULT_CHECKPOINT == PUBLISHED[0].repo
    hints = get_type_hints(checkpoints.extract)
    assert get_args(hints["format"]) == get_args(Format)


def test_list() -> None:
    rows = json.loads(run("list", "--json").stdout)["published"]
    printed = run("list").stdout.splitlines()
    assert len(rows) == len(printed) - 1 == len(PUBLISHED) == 28
    assert "\n".join(printed) in (ROOT / "docs" / "checkpoints.md").read_text()
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

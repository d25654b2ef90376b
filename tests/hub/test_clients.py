"""Tests with several releases of `huggingface_hub`, in separate processes with an empty cache.

The comparison and the tests of the published weights run against a Hub on loopback, as on a machine
with a fresh clone.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest

from tests.conftest import HUB
from tests.helpers.hub_server import Hub

ROOT = Path(__file__).parents[2]

REQUIREMENT = re.compile(r"huggingface[-_]hub\b.*?>=(?P<release>[\d.]+)")


def lowest_release(requirements: list[str]) -> str:
    """The lowest allowed release of the client."""
    matches = [REQUIREMENT.match(requirement) for requirement in requirements]
    (release,) = {match["release"] for match in matches if match is not None}
    return release if release.count(".") == 2 else f"{release}.0"


PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOWEST = lowest_release(PYPROJECT["project"]["dependencies"])
LOWEST_OF_TRANSFORMERS = lowest_release(requires("transformers") or [])


def install_client(release: str, folder: Path) -> None:
    """Install a release of the client into a folder."""
    package = f"huggingface_hub=={release}"
    command = ["uv", "pip", "install", "--quiet", "--target", str(folder), package]
    subprocess.run(command, check=True)


def run_pytest(
    *arguments: str, release: str | None, folder: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run tests with a release of the client; None for the installed one."""
    hub_variables = {"HF_ENDPOINT": HUB.url, "HF_HOME": str(folder / "home")}
    environment = {**os.environ, **hub_variables, **variables}
    if release is not None:
        install_client(release, folder / "client")
        environment["PYTHONPATH"] = str(folder / "client")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


CLIENTS = [
    pytest.param(None, True, id="installed, xet", marks=pytest.mark.slow),
    *(
        pytest.param(release, xet, marks=pytest.mark.versions)
        for release, xet in (
            (None, False),
            (LOWEST_OF_TRANSFORMERS, True),
            (LOWEST_OF_TRANSFORMERS, False),
        )
    ),
]


@pytest.mark.parametrize(("release", "xet"), CLIENTS)
def test_real_checkpoint_tests(release: str | None, xet: bool, hub: Hub, tmp_path: Path) -> None:
    """With small random weights; transformers computes the expected numbers."""
    from tests.helpers.hub_replicas import serve

    goldens = serve(hub, tmp_path / "served", xet=True)
    result = run_pytest(
        *("-m", "hub", "-n0", "tests/test_real_checkpoint.py"),
        release=release,
        folder=tmp_path,
        SIGLIP_PORT_GOLDENS=str(goldens),
        HF_HUB_DISABLE_XET="" if xet else "1",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^=+ 9 passed", result.stdout, re.MULTILINE), result.stdout


@pytest.mark.versions
def test_lowest_client(tmp_path: Path) -> None:
    # hf_xet raises a DeprecationWarning with an older client
    result = run_pytest(
        *("-W", "ignore::DeprecationWarning", "tests/hub", "--ignore", "tests/hub/test_clients.py"),
        release=LOWEST,
        folder=tmp_path,
        HF_ENDPOINT="",
        HF_HOME="",
    )
    assert result.returncode == 0, result.stdout + result.stderr

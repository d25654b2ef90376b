"""With several releases of the Hub's client.

The comparison, and the tests of the real weights, at a Hub of our own.

All in processes of their own, from an empty cache, as on a machine that has just cloned this.
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


def lowest(requirements: list[str]) -> str:
    """The lowest release of the client that is allowed."""
    (found,) = {
        m[1] for r in requirements if (m := re.match(r"huggingface[-_]hub\b.*?>=([\d.]+)", r))
    }
    return found if found.count(".") == 2 else f"{found}.0"


OURS = lowest(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
THE_REFERENCES = lowest(requires("transformers") or [])


def run(
    *command: str | Path, release: str | None, folder: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs Python with another release of the client than is installed; None for that."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": HUB.url,
        "HF_HOME": str(folder / "home"),
        **variables,
    }
    if release is not None:
        client = folder / "client"
        install = [
            "uv",
            "pip",
            "install",
            "--quiet",
            "--target",
            str(client),
            f"huggingface_hub=={release}",
        ]
        subprocess.run(install, check=True)
        environment["PYTHONPATH"] = str(client)
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("release", "xet"),
    [
        pytest.param(None, True, id="installed, xet"),
        *(
            pytest.param(release, xet, marks=pytest.mark.versions)
            for release, xet in ((None, False), (THE_REFERENCES, True), (THE_REFERENCES, False))
        ),
    ],
)
def test_the_real_weights_tests_at_a_hub_of_our_own(
    release: str | None, xet: bool, hub: Hub, tmp_path: Path
) -> None:
    """The comparison among them.

    With small random weights, whose golden numbers transformers computes.
    """
    from tests.helpers.hub_replicas import serve

    goldens = serve(hub, tmp_path / "served", xet=True)
    done = run(
        *(
            "-m",
            "pytest",
            "-m",
            "hub",
            "-n0",
            "-p",
            "no:cacheprovider",
            "tests/test_real_checkpoint.py",
        ),
        release=release,
        folder=tmp_path,
        SIGLIP_PORT_GOLDENS=str(goldens),
        HF_HUB_DISABLE_XET="" if xet else "1",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^=+ 9 passed", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.versions
def test_the_library_with_the_lowest_client(tmp_path: Path) -> None:
    tests = [f"tests/hub/test_{name}.py" for name in ("repository", "xet", "network_failures")]
    options = (
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::DeprecationWarning",
    )  # by which hf_xet greets an older client
    done = run(
        "-m", "pytest", *options, *tests, release=OURS, folder=tmp_path, HF_ENDPOINT="", HF_HOME=""
    )
    assert done.returncode == 0, done.stdout + done.stderr

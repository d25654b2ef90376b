"""scripts/lock.py: the index-neutral lock pins the same files as the lock that uv writes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from scripts import lock

ROOT = Path(__file__).parents[2]

FULL = """\
version = 1
requires-python = ">=3.11"

[[package]]
name = "numpy"
version = "2.4.6"
source = { registry = "https://index.example/simple" }
sdist = { url = "https://files.example/aa/numpy-2.4.6.tar.gz", hash = "sha256:01", size = 1 }
wheels = [
    { url = "https://files.example/numpy-2.4.6-cp311-none-any.whl", hash = "sha256:02", size = 2 },
]

[[package]]
name = "siglip-port"
version = "0.1.0"
source = { editable = "." }
dependencies = [
    { name = "numpy" },
]

[package.metadata]
requires-dist = [{ name = "numpy", specifier = ">=2" }]

[[package]]
name = "zipp"
version = "3.0"
source = { registry = "https://index.example/simple" }
wheels = [
    { url = "https://files.example/cc/zipp-3.0-py3-none-any.whl", hash = "sha256:03", size = 3 },
]
"""


def test_neutral_form() -> None:
    neutral = lock.neutral(FULL)
    assert "://" not in neutral
    assert 'path = "numpy-2.4.6-cp311-none-any.whl"' in neutral
    assert "siglip-port" not in neutral
    assert "package.metadata" not in neutral
    assert lock.neutral(neutral) == neutral
    assert lock.contents(neutral) == {
        ("numpy", "2.4.6", frozenset({"sha256:01", "sha256:02"})),
        ("zipp", "3.0", frozenset({"sha256:03"})),
    }


@pytest.mark.parametrize(
    ("old", "new"),
    [("2.4.6", "2.4.7"), ("sha256:02", "sha256:09"), ('name = "zipp"', 'name = "zip"')],
)
def test_changed_contents_detected(old: str, new: str) -> None:
    neutral = lock.neutral(FULL)
    assert lock.contents(neutral.replace(old, new)) != lock.contents(neutral)


def test_committed_lock_is_neutral() -> None:
    process = subprocess.run(
        ["git", "show", ":uv.lock"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if process.returncode:
        pytest.skip("not a git checkout")
    assert "://" not in process.stdout
    assert 'name = "torch"' in process.stdout

"""The pytest plugin, in a pytest of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]

TESTS = """
import copy

import pytest
import torch

from siglip_port.parity import assert_parity, randomize


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_layer_norm(eps):
    reference = torch.nn.LayerNorm(8, eps=1e-6).eval()
    randomize(reference)
    port = copy.deepcopy(reference)
    port.eps = eps
    assert_parity(reference, port, torch.randn(3, 4, 8) * 0.1)


def test_nothing():
    pass
"""


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_port.py").write_text(TESTS)
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "siglip_port.pytest_plugin"]
    return subprocess.run(
        [*command, "-p", "xdist", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("workers", ["0", "2"])
def test_reports_of_a_run(tmp_path: Path, workers: str) -> None:
    run = run_pytest(tmp_path, "--parity-report", "report", "-n", workers)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "comparisons: 2, of which equal: 1" in run.stdout
    assert "test_port.py::test_layer_norm[1e-05]: DIFFERENT" in run.stdout

    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["equal"] is False
    names = {section["name"].partition("]")[0] for section in report["sections"]}
    assert names == {"test_port.py::test_layer_norm[1e-06", "test_port.py::test_layer_norm[1e-05"}
    assert report["environment"]["torch"]
    badge = json.loads((tmp_path / "report" / "badge.json").read_text())
    assert badge["color"] == "red"
    assert badge["message"].startswith("different, ")
    assert "differs in float64" in (tmp_path / "report" / "report.md").read_text()
    suite = ElementTree.parse(tmp_path / "report" / "junit.xml").getroot()
    assert int(suite.attrib["failures"]) > 0


def test_run_without_comparisons(tmp_path: Path) -> None:
    run = run_pytest(tmp_path, "--parity-report", "report", "-k", "nothing")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "no test called assert_parity" in run.stdout
    assert not (tmp_path / "report").exists()


def test_run_without_option(tmp_path: Path) -> None:
    run = run_pytest(tmp_path, "-k", "nothing")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "parity" not in run.stdout


def test_plugin_imports_no_torch() -> None:
    program = "import sys, siglip_port.pytest_plugin; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)

"""Shared fixtures: a Hub on loopback, and small checkpoints with random weights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch is imported: waiting threads must not spin, which slows parallel tests down by 10x.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Without bytecode files, every process of a test compiles torch and transformers again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest
import torch
from hypothesis import HealthCheck, settings

from siglip_port import SigLipVisionConfig, SigLipVisionModel
from tests.helpers.checkpoints import SMALL, MakeCheckpoint, edit_tensors
from tests.helpers.hub_cache import NAME, TEXT_MODEL_BYTES
from tests.helpers.hub_server import Hub, Repository
from tests.helpers.sample_images import write_images

if TYPE_CHECKING:
    from siglip_port.parity.siglip.reference_process import ReferenceProcess

torch.set_num_threads(1)  # more threads are slower for small encoders

FRESH_PROCESS = "SIGLIP_PORT_TEST_IN_FRESH_PROCESS"
HUB = Hub()
HOME = tempfile.TemporaryDirectory(prefix="siglip_port-tests-")

# The same examples in every run, however slow the machine.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """Point `huggingface_hub` at the Hub on loopback before its import, unless `-m hub` is set."""
    if "hub" not in config.option.markexpr.replace("not hub", ""):
        assert "huggingface_hub" not in sys.modules, "a conftest.py imports huggingface_hub"
        os.environ["HF_ENDPOINT"] = HUB.url
        os.environ["HF_HOME"] = HOME.name
        os.environ.pop("HF_HUB_OFFLINE", None)
    os.environ["XDG_CACHE_HOME"] = str(Path(HOME.name) / "cache")  # cache of `optimize`


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> object | None:
    """Run tests with the marker `fresh_process` in a separate process."""
    if pyfuncitem.get_closest_marker("fresh_process") is None or FRESH_PROCESS in os.environ:
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"]
    process = subprocess.run(
        [*command, "-m", "", pyfuncitem.nodeid],
        cwd=pyfuncitem.config.rootpath,
        env={**os.environ, FRESH_PROCESS: "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout
    return True


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub on loopback, empty; retries wait only 10 ms."""
    from siglip_port.hub import retry

    monkeypatch.setattr(retry, "BACKOFF_SECONDS", (0.01,) * len(retry.BACKOFF_SECONDS))
    HUB.reset()
    yield HUB
    HUB.reset()


@pytest.fixture
def checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """Create a checkpoint with random weights, written by the reference.

    `checkpoint(config, dtype=...) -> folder`.
    """
    from siglip_port.parity.siglip.reference import write_random_checkpoint

    def make(
        config: SigLipVisionConfig = SMALL,
        *,
        dtype: torch.dtype = torch.float32,
        prefix: str = "",
        name: str = "random_checkpoint",
    ) -> Path:
        folder = tmp_path / name
        write_random_checkpoint(folder, config)
        if dtype != torch.float32 or prefix:
            edit_tensors(folder, lambda t: {prefix + k: v.to(dtype) for k, v in t.items()})
        return folder

    return make


@pytest.fixture(scope="module")
def references() -> Iterator[ReferenceProcess]:
    """A process for references, which takes seconds to start."""
    # Imported late: conftest.py is loaded before the Hub client is pointed at the test Hub.
    from siglip_port.parity.siglip import reference_process

    with reference_process.start() as process:
        yield process


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `SMALL` without weights that are 0 or 1."""
    from siglip_port.parity import randomize

    folder = tmp_path_factory.mktemp("encoder")
    model = SigLipVisionModel(SMALL).eval()
    randomize(model, seed=0)
    model.save_hf(folder)
    return folder


@pytest.fixture
def encoder_copy(encoder_folder: Path, tmp_path: Path) -> Path:
    """A copy of `encoder_folder` that a test may change."""
    return Path(shutil.copytree(encoder_folder, tmp_path / "served"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 images, several of them corrupt: `broken.json` lists these."""
    folder = tmp_path_factory.mktemp("photos")
    assert len(set(write_images(folder, 50, 0.2, 0).values())) >= 3
    return folder


@pytest.fixture(scope="session")
def whole_model(encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`encoder_folder` with a text model and without `preprocessor_config.json`."""
    folder = Path(
        shutil.copytree(encoder_folder, tmp_path_factory.mktemp("whole_model"), dirs_exist_ok=True)
    )
    (folder / "preprocessor_config.json").unlink()
    text_model = torch.ones(TEXT_MODEL_BYTES // 4)
    edit_tensors(folder, lambda t: {**t, "text_model.embeddings.weight": text_model})
    return folder


@pytest.fixture
def folder(hub: Hub, whole_model: Path, tmp_path: Path) -> Path:
    """Folder of a whole model that the Hub serves; a test may change it."""
    folder = Path(shutil.copytree(whole_model, tmp_path / "served"))
    hub.repositories[NAME] = Repository(folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"

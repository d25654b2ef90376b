"""What all tests share.

A Hub of our own, tiny architectures that hide nothing, and checkpoints made on the spot.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before torch is loaded: threads that wait for each other do not spin, since other tests want the
# cores (10 x slower).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Where it is set, every process that a test starts compiles torch and transformers anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest
import torch
from hypothesis import HealthCheck, settings

from siglip_port import SigLipVisionConfig, SigLipVisionModel
from tests.helpers.checkpoints import SMALL, MakeCheckpoint, edit_tensors
from tests.helpers.hub_cache import NAME, TEXT_MODEL_BYTES
from tests.helpers.hub_server import Hub, Repository
from tests.helpers.sample_images import write_images

torch.set_num_threads(1)  # encoders of a few columns are slower with more

FRESH_PROCESS = "SIGLIP_PORT_TEST_IN_FRESH_PROCESS"
HUB = Hub()
HOME = tempfile.TemporaryDirectory(prefix="siglip_port-tests-")

# No test depends on time or chance: the same examples every run, however slow the machine.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """Points the Hub's client at our own Hub, before anything imports it.

    But for the tests that need the real one.
    """
    if "hub" not in config.option.markexpr.replace("not hub", ""):
        assert "huggingface_hub" not in sys.modules, "a conftest.py imports the Hub's client"
        os.environ["HF_ENDPOINT"] = HUB.url
        os.environ["HF_HOME"] = HOME.name
        os.environ.pop("HF_HUB_OFFLINE", None)
    os.environ["XDG_CACHE_HOME"] = str(Path(HOME.name) / "cache")  # what `optimize` keeps


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> object | None:
    """Runs a test that is marked `fresh_process` in a process of its own."""
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
    """Our Hub, empty. Attempts follow each other almost at once."""
    from siglip_port.hub import retry

    monkeypatch.setattr(retry, "BACKOFF_SECONDS", (0.01,) * len(retry.BACKOFF_SECONDS))
    HUB.reset()
    yield HUB
    HUB.reset()


@pytest.fixture
def checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """Makes a checkpoint with random weights, written by the reference.

    `checkpoint(config, dtype=...) -> folder`.
    """
    from siglip_port.parity.siglip.reference import write_random_checkpoint

    def make(
        config: SigLipVisionConfig = SMALL,
        *,
        dtype: torch.dtype = torch.float32,
        prefix: str = "",
        name: str = "made",
    ) -> Path:
        folder = tmp_path / name
        write_random_checkpoint(folder, config)
        if dtype != torch.float32 or prefix:
            edit_tensors(folder, lambda t: {prefix + k: v.to(dtype) for k, v in t.items()})
        return folder

    return make


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `SMALL`, on which nothing is zero and nothing is one."""
    from siglip_port.parity import randomize

    folder = tmp_path_factory.mktemp("tower")
    model = SigLipVisionModel(SMALL).eval()
    randomize(model, seed=0)
    model.save_hf(folder)
    return folder


@pytest.fixture
def copied(encoder_folder: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change.

    `vision_model.` before the names, and made without the reference.
    """
    return Path(shutil.copytree(encoder_folder, tmp_path / "served"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 images, several of them broken: `broken.json` says which."""
    folder = tmp_path_factory.mktemp("photos")
    assert len(set(write_images(folder, 50, 0.2, 0).values())) >= 3
    return folder


@pytest.fixture(scope="session")
def whole_model(encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, and what is beside it in a whole model; without `preprocessor_config.json`."""
    folder = Path(
        shutil.copytree(encoder_folder, tmp_path_factory.mktemp("whole_model"), dirs_exist_ok=True)
    )
    (folder / "preprocessor_config.json").unlink()
    text_model = torch.ones(TEXT_MODEL_BYTES // 4)
    edit_tensors(folder, lambda t: {**t, "text_model.embeddings.weight": text_model})
    return folder


@pytest.fixture
def folder(hub: Hub, whole_model: Path, tmp_path: Path) -> Path:
    """The folder of the repository that the Hub serves, which a test may change."""
    folder = Path(shutil.copytree(whole_model, tmp_path / "served"))
    hub.repositories[NAME] = Repository(folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"

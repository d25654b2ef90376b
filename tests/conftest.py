"""What all tests share: a Hub of our own, tiny architectures that hide nothing, and checkpoints made on the spot."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch is loaded: threads that wait for each other do not spin, since other tests want the cores (10 x slower).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import load_file, save_file
from torch import Tensor

from siglip_port import SigLipVisionConfig, SigLipVisionModel
from tests.hub_server import Hub

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
from make_pictures import make

torch.set_num_threads(1)  # towers of a few columns are slower with more

HUB = Hub()
HOME = tempfile.TemporaryDirectory(prefix="siglip_port-tests-")

# No test depends on time or chance: the same examples every run, however slow the machine.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """Points the Hub's client at our own Hub, before anything imports it; but for the tests that need the real one."""
    if "hub" not in config.option.markexpr.replace("not hub", ""):
        os.environ["HF_ENDPOINT"] = HUB.url
        os.environ["HF_HOME"] = HOME.name
        os.environ.pop("HF_HUB_OFFLINE", None)
    os.environ["XDG_CACHE_HOME"] = str(Path(HOME.name) / "cache")  # what `optimize` keeps


# Widths, heads and sizes that no mistake survives by luck: head_dim differs from the number of heads, 1/sqrt(head_dim)
# is inexact, the picture is no multiple of the patch, and 11 blocks sort differently as numbers and as text.
ODD = SigLipVisionConfig(
    embed_dim=72,
    image_size=45,
    patch_size=7,
    num_attention_heads=4,
    num_encoder_blocks=11,
    mlp_hidden_dim=101,
    pooling_head=True,
)
SMALL = SigLipVisionConfig(
    embed_dim=24,
    image_size=16,
    patch_size=8,
    num_attention_heads=2,
    num_encoder_blocks=3,
    mlp_hidden_dim=40,
    pooling_head=True,
)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Our Hub, empty. Attempts follow each other almost at once."""
    from siglip_port import ranges

    monkeypatch.setattr(ranges, "WAITS", (0.01,) * len(ranges.WAITS))
    HUB.reset()
    yield HUB
    HUB.reset()


MakeCheckpoint = Callable[..., Path]


@pytest.fixture
def checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """Makes a checkpoint with random weights, written by the reference: `checkpoint(config, dtype=...) -> folder`."""
    from siglip_port.parity.references import write_random_checkpoint

    def make(
        config: SigLipVisionConfig = SMALL, *, dtype: torch.dtype = torch.float32, prefix: str = "", name: str = "made"
    ) -> Path:
        folder = tmp_path / name
        write_random_checkpoint(folder, config)
        if dtype != torch.float32 or prefix:
            edit_tensors(folder, lambda t: {prefix + k: v.to(dtype) for k, v in t.items()})
        return folder

    return make


@pytest.fixture(scope="session")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `SMALL`, on which nothing is zero and nothing is one."""
    from siglip_port.parity import randomise

    folder = tmp_path_factory.mktemp("tower")
    model = SigLipVisionModel(SMALL).eval()
    randomise(model, seed=0)
    model.save_hf(folder)
    return folder


@pytest.fixture
def copied(tower: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change: `vision_model.` before the names, and made without the reference."""
    return Path(shutil.copytree(tower, tmp_path / "served"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 pictures, several of them broken: `broken.json` says which."""
    folder = tmp_path_factory.mktemp("photos")
    assert len(set(make(folder, 50, 0.2, 0).values())) >= 3
    return folder


def edit_tensors(
    folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]], file: str = "model.safetensors"
) -> None:
    """Rewrites the tensors of a checkpoint."""
    tensors = edit({name: tensor.clone() for name, tensor in load_file(folder / file).items()})
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
        folder / file,
        {"format": "pt"},
    )


def edit_config(folder: Path, **changes: object) -> None:
    """Rewrites keys of `config.json`; a value of `...` takes the key away."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def shard(folder: Path, num_shards: int = 3) -> None:
    """Spreads the tensors of a checkpoint over several files with an index, as transformers does."""
    tensors = load_file(folder / "model.safetensors")
    names = [f"model-{i + 1:05}-of-{num_shards:05}.safetensors" for i in range(num_shards)]
    weight_map = {name: names[i % num_shards] for i, name in enumerate(tensors)}
    for file in names:
        mine = {name: tensor.clone() for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(mine, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def pixels(config: SigLipVisionConfig, batch: int = 2, seed: int = 0) -> Tensor:
    """Float64 noise in the shape of pictures."""
    shape = (batch, config.num_channels, config.image_size, config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

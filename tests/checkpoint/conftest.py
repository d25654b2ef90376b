"""Fixtures: an intact model, and copies of its files that a test may damage."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from siglip_port import SigLipVisionModel
from tests.helpers.checkpoints import shard
from tests.helpers.flax import flax, write_npz
from tests.helpers.npz_files import Members


@pytest.fixture(scope="session")
def model(encoder_folder: Path) -> SigLipVisionModel:
    """The `SMALL` model with random weights that `encoder_folder` and `encoder_copy` contain."""
    return SigLipVisionModel.from_hf(encoder_folder)


@pytest.fixture
def sharded(encoder_copy: Path) -> Path:
    """A copy of the model's files in three shards."""
    shard(encoder_copy)
    return encoder_copy


@pytest.fixture(scope="session")
def members(model: SigLipVisionModel, tmp_path_factory: pytest.TempPathFactory) -> Members:
    """The arrays of the model's big_vision `.npz` file by name."""
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    write_npz(path, flax(model.config, model.state_dict(), scanned=False), "params/img/")
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}

"""Fixtures for tests of engines and their selection."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from siglip_port import SigLipVisionModel
from tests.helpers.checkpoints import SMALL
from tests.helpers.models import random_model

CONFIG = replace(SMALL, pooling_head=True, interpolation="hf")


@pytest.fixture
def model() -> SigLipVisionModel:
    """A small model with a pooling head and interpolation."""
    return random_model(CONFIG)


@pytest.fixture(scope="session")
def engine_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared cache folder, so that engines compile once per session."""
    return tmp_path_factory.mktemp("engines")


@pytest.fixture
def own_cache(engine_cache: Path, tmp_path: Path) -> Path:
    """A copy of the shared cache without choices."""
    folder = tmp_path / "cache"
    shutil.copytree(engine_cache, folder, ignore=shutil.ignore_patterns("*.json"))
    return folder

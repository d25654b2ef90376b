"""Fixtures of the tests of embedding runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from siglip_port import SigLipVisionModel
from siglip_port.embed import embed
from tests.helpers.embedding import OPTIONS


@pytest.fixture
def model(encoder_folder: Path) -> SigLipVisionModel:
    """The model of the fixture `encoder_folder`; tests may change it."""
    return SigLipVisionModel.from_hf(encoder_folder)


@pytest.fixture(scope="session")
def finished_run(
    photos: Path, encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Output folder of an uninterrupted run over the fixture `photos`; read-only."""
    folder = tmp_path_factory.mktemp("finished_run")
    embed([photos], folder, SigLipVisionModel.from_hf(encoder_folder), **OPTIONS)
    return folder

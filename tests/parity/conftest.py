"""Checkpoints that several tests compare: written once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from siglip_port.parity.siglip.reference import write_random_checkpoint
from tests.helpers.checkpoints import ODD


@pytest.fixture(scope="session")
def odd_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `ODD`, written by the reference; nobody may change it."""
    folder = tmp_path_factory.mktemp("odd")
    write_random_checkpoint(folder, ODD)
    return folder

"""Checkpoints shared by several tests, written once per session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.checkpoints import ODD


@pytest.fixture(scope="session")
def odd_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of `ODD`, written by the reference; tests must not modify it."""
    # Imported late: conftest.py is loaded before the Hub client is pointed at the test Hub.
    from siglip_port.parity.siglip.reference import write_random_checkpoint

    folder = tmp_path_factory.mktemp("odd")
    write_random_checkpoint(folder, ODD)
    return folder

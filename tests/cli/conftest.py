"""Checkpoints for the tests of the commands."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers.checkpoints import MakeCheckpoint, edit_tensors

if TYPE_CHECKING:
    from siglip_port.parity.siglip.reference_process import ReferenceProcess


@pytest.fixture
def shared_references(references: ReferenceProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all comparisons of a module share one process for references."""
    from siglip_port.parity.siglip import reference_process

    monkeypatch.setattr(reference_process, "start", lambda: contextlib.nullcontext(references))


@pytest.fixture(scope="session")
def written_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SiglipModel with image and text encoder, shared and read-only."""
    # Imported late: a conftest is loaded before the Hub client is pointed at the test server.
    import transformers

    from tests.helpers.other_libraries import write_two_encoders

    folder = tmp_path_factory.mktemp("whole model") / "written"
    write_two_encoders(folder, transformers.SiglipModel)
    return folder


@pytest.fixture
def whole_model(written_model: Path, tmp_path: Path) -> Path:
    """A copy of `written_model` that a test may change."""
    return Path(shutil.copytree(written_model, tmp_path / "whole"))


@pytest.fixture
def two_encoders(checkpoint: MakeCheckpoint) -> Path:
    """Two vision encoders in one file, with prefixes `a.` and `b.`."""
    folder = checkpoint()
    edit_tensors(
        folder,
        lambda tensors: {
            f"{prefix}.{name}": tensor for prefix in "ab" for name, tensor in tensors.items()
        },
    )
    return folder


@pytest.fixture
def hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty Hub cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"

"""Decoding in worker processes, and images whose worker dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from siglip_port import SigLipVisionModel
from siglip_port.embed import EmbedError, embed
from siglip_port.embed.decode import WORKER_DIED, DecodedImage, decode
from siglip_port.embed.inputs import Item
from siglip_port.image_processing import ImageProcessor
from tests.helpers.checkpoints import SMALL
from tests.helpers.embedding import OPTIONS, read_rows, row_texts
from tests.helpers.processes import EMBED_PROGRAM, process_ids_naming

CRASHING = ("0000009", "0000030", "0000031")


@pytest.mark.parametrize("always", [True, False], ids=["always", "once"])
def test_worker_dies(
    always: bool,
    photos: Path,
    finished_run: Path,
    model: SigLipVisionModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An image becomes an error if it always crashes its worker, not if it does so once."""
    deaths = tmp_path / "deaths"
    deaths.mkdir()

    def crash(item: Item, processor: ImageProcessor) -> DecodedImage:
        name = Path(item.id).stem
        if name in CRASHING:
            with (deaths / name).open("ab") as file:
                file.write(b"x")
            if always or (deaths / name).stat().st_size == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return decode(item, processor)

    monkeypatch.setattr("siglip_port.embed.decode.decode", crash)
    embed([photos], tmp_path / "out", model, **{**OPTIONS, "num_workers": 2})
    for row, expected in zip(read_rows(tmp_path / "out"), read_rows(finished_run), strict=True):
        if always and Path(row["id"]).stem in CRASHING:
            assert (row["error"], row["width"]) == (WORKER_DIED, None)
        else:
            assert repr(row) == repr(expected)
    for name in CRASHING:
        assert (deaths / name).stat().st_size >= 2


def test_workers_cannot_start(
    photos: Path, model: SigLipVisionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run fails; the images do not become error rows."""
    two_workers = {**OPTIONS, "num_workers": 2}
    with monkeypatch.context() as patched:
        patched.setattr("siglip_port.embed.decode.initialize_worker", lambda: os._exit(1))
        message = (
            r"decoding processes cannot start \(.*\); reduce num_workers= \(0 decodes in the main"
        )
        with pytest.raises(EmbedError, match=message):
            embed([photos], tmp_path, model, **two_workers)

    def refuse() -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fork", refuse)
        message = r"decoding processes cannot start \(.*Resource temporarily unavailable\)"
        with pytest.raises(EmbedError, match=message):
            embed([photos], tmp_path, model, **two_workers)
    assert embed([photos], tmp_path, model, **OPTIONS).processed == 50


def embed_in_daemon(photos: Path, encoder: Path, output: Path, num_workers: int | None) -> str:
    """Run `embed` in a process that may not start processes; return its error, if any."""
    options: dict[str, Any] = {**OPTIONS, "num_workers": num_workers}
    try:
        embed([photos], output, SigLipVisionModel.from_hf(encoder), **options)
    except EmbedError as error:
        return str(error)
    return ""


@pytest.mark.fresh_process
def test_daemonic_process(
    photos: Path, encoder_folder: Path, finished_run: Path, tmp_path: Path
) -> None:
    """Workers of `multiprocessing.Pool`, Celery and DataLoaders are daemonic."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        no_error = pool.apply(embed_in_daemon, (photos, encoder_folder, tmp_path / "default", None))
        error = pool.apply(embed_in_daemon, (photos, encoder_folder, tmp_path / "workers", 2))
    assert no_error == ""
    assert row_texts(tmp_path / "default") == row_texts(finished_run)
    assert error == (
        "num_workers must be 0 in a daemonic process, which may not start processes, got 2; pass "
        "num_workers=0, or None to decode in this process"
    )
    assert not (tmp_path / "workers").exists()


def test_workers_end_with_killed_parent(photos: Path, tmp_path: Path) -> None:
    """Even with more images in progress than a pipe buffers."""
    SigLipVisionModel(replace(SMALL, image_size=96)).save_hf(tmp_path / "model")
    arguments = map(str, (photos, tmp_path / "out", tmp_path / "model"))
    command = [sys.executable, "-c", EMBED_PROGRAM, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # after the first batch, both workers are busy
        wait_until(lambda: len(process_ids_naming(tmp_path)) == 3)
        time.sleep(0.5)  # until the pipe is full, which cannot be observed
        process.kill()
    wait_until(lambda: not process_ids_naming(tmp_path))


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)

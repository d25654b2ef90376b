"""Interrupted downloads resume; concurrent downloads of the same file do not conflict."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import threading
from pathlib import Path

import filelock
import huggingface_hub.utils
import pytest

from siglip_port import HubUnreachableError, SigLipVisionModel
from siglip_port.hub import chunked_download, lock, retry
from tests.helpers.hub_cache import (
    HEADER_BYTES,
    NAME,
    WEIGHTS,
    assert_same,
    encoder_bytes,
    own_files,
)
from tests.helpers.hub_server import Fault, Hub, Repository
from tests.helpers.killed_downloads import kill_downloads
from tests.helpers.load_process import ForkedProcess, load_in_chunks
from tests.helpers.sweeps import sweep

load = SigLipVisionModel.from_hf

pytestmark = pytest.mark.usefixtures("small_chunks")

MAX_CONCURRENCY = chunked_download.MAX_CONCURRENCY


def repair(hub: Hub, folder: Path) -> None:
    hub.reset()
    hub.repositories[NAME] = Repository(folder)


def test_resume_after_error(hub: Hub, folder: Path, cache: Path) -> None:
    hub.faults = [Fault("none", WEIGHTS, times=9), Fault("reset", WEIGHTS, times=None)]
    message = f"^{NAME}: cannot download model.safetensors: no connection"
    with pytest.raises(HubUnreachableError, match=message):
        load(NAME, cache_dir=cache)
    assert not own_files(cache)
    assert len(own_files(cache, "*.incomplete")) == 1
    repair(hub, folder)
    assert_same(load(NAME, cache_dir=cache), folder)
    assert 0 < hub.sent["model.safetensors"] <= encoder_bytes(folder) - 8 * 4096


def test_resume_whole_file(hub: Hub, folder: Path, cache: Path) -> None:
    size = (folder / "model.safetensors").stat().st_size
    hub.faults = [Fault("none", WEIGHTS, times=20), Fault("reset", WEIGHTS, times=None)]
    message = "cannot download model.safetensors: no connection to localhost"
    with pytest.raises(HubUnreachableError, match=message):
        load(NAME, cache_dir=cache, vision_only=False)
    repair(hub, folder)
    assert_same(load(NAME, cache_dir=cache, vision_only=False), folder)
    assert 0 < hub.sent["model.safetensors"] <= size - (20 - MAX_CONCURRENCY) * 4096
    assert not own_files(cache, "*.incomplete")


@pytest.mark.parametrize(
    "requests",
    [pytest.param(2, marks=pytest.mark.slow), 7, pytest.param(15, marks=pytest.mark.slow)],
)
def test_resume_after_kill(requests: int, hub: Hub, folder: Path, cache: Path) -> None:
    """Only the chunks in progress are lost."""
    hub.faults = [
        Fault("none", WEIGHTS, times=requests),
        Fault("stall", WEIGHTS, times=None, after=10),
    ]
    child = ForkedProcess(load_in_chunks, NAME, cache)
    hub.wait_for_requests(WEIGHTS, requests + MAX_CONCURRENCY)
    child.kill()
    child.wait()
    assert not own_files(cache)
    repair(hub, folder)
    assert_same(load(NAME, cache_dir=cache), folder)
    chunks = requests - 1  # one request is for the header
    lost = encoder_bytes(folder) - (chunks - MAX_CONCURRENCY) * 4096
    assert hub.sent["model.safetensors"] <= lost


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@sweep
def test_resume_after_kill_at_any_step(
    is_full: bool, hub: Hub, folder: Path, tmp_path: Path
) -> None:
    """After the kill, an offline load is right or fails; an online load is right."""
    child = ForkedProcess(kill_downloads, NAME, folder, tmp_path, 1 if is_full else 16)
    code, printed = child.wait(600)
    assert code == 0, printed
    results = json.loads(printed.splitlines()[-1])
    assert results["wrong"] == []
    assert results["steps"] > 15
    assert results["killed"] >= (results["steps"] if is_full else 3)


def test_interrupt(hub: Hub, folder: Path, cache: Path) -> None:
    """Ctrl-C ends the download promptly."""
    hub.faults = [Fault("none", WEIGHTS, times=5), Fault("slow", WEIGHTS, times=None, seconds=0.5)]
    child = ForkedProcess(load_in_chunks, NAME, cache)
    hub.wait_for_requests(WEIGHTS, 5 + MAX_CONCURRENCY)
    child.interrupt()
    code, printed = child.wait(20)
    assert code == 1
    assert printed.rstrip().endswith("KeyboardInterrupt")
    assert len(own_files(cache, "*.incomplete")) == 1


# --- concurrent loads -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_at_once(count: int, hub: Hub, folder: Path, cache: Path) -> None:
    hub.faults = [Fault("slow", WEIGHTS, times=None, seconds=0.02)]
    children = [ForkedProcess(load_in_chunks, NAME, cache) for _ in range(count)]
    results = [child.wait() for child in children]
    assert [code for code, _ in results] == [0] * count, results
    numbers = {printed.splitlines()[-1] for _, printed in results}
    assert len(numbers) == 1
    assert len(own_files(cache)) == 1
    assert not own_files(cache, "*.incomplete")
    headers = hub.sent["model.safetensors"] - encoder_bytes(
        folder
    )  # the encoder is downloaded once
    assert headers in [number * HEADER_BYTES for number in range(1, count + 1)]
    assert_same(load(NAME, cache_dir=cache, local_files_only=True), folder)


def load_in_threads(cache: Path, folder: Path) -> None:
    models: list[SigLipVisionModel] = []
    threads = [
        threading.Thread(target=lambda: models.append(load(NAME, cache_dir=cache)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(models) == 4
    for model in models:
        assert_same(model, folder)


def test_threads_at_once(hub: Hub, folder: Path, cache: Path) -> None:
    load_in_threads(cache, folder)


@pytest.mark.parametrize("repeats", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_ineffective_locks(
    repeats: int, hub: Hub, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locks have no effect on some network file systems."""
    monkeypatch.setattr(
        huggingface_hub.utils, "WeakFileLock", lambda *_, **__: contextlib.nullcontext()
    )
    for _ in range(repeats):
        shutil.rmtree(cache, ignore_errors=True)
        load_in_threads(cache, folder)
        assert_same(load(NAME, cache_dir=cache, local_files_only=True), folder)


def test_idle_lock_is_ignored(
    hub: Hub,
    folder: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(lock, "LOCK_POLL_SECONDS", 0.05)
    monkeypatch.setattr(lock, "LOCK_IDLE_SECONDS", 0.2)
    load(NAME, cache_dir=cache)
    (encoder,) = own_files(cache)
    encoder.unlink()
    with filelock.FileLock(encoder.with_suffix(".lock")):
        assert_same(load(NAME, cache_dir=cache), folder)
    assert "another process is downloading model-vision-" in caplog.text
    assert ".lock is held by an idle process; continuing without the lock" in caplog.text


# --- attempts -------------------------------------------------------------------------------------


def test_every_attempt_makes_progress(
    hub: Hub, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attempts are unlimited as long as each one makes progress."""
    monkeypatch.setattr(retry, "MIN_PROGRESS_BYTES", 1000)
    hub.faults = [Fault("reset", WEIGHTS, times=None, after=1000)]
    assert_same(load(NAME, cache_dir=cache), folder)
    assert hub.sent["model.safetensors"] == HEADER_BYTES + encoder_bytes(folder)


def test_attempts_without_progress(hub: Hub, folder: Path, cache: Path) -> None:
    hub.faults = [Fault("none", WEIGHTS), Fault("reset", WEIGHTS, times=None, after=10)]
    message = "cannot download model.safetensors: no connection to localhost"
    with pytest.raises(HubUnreachableError, match=message):
        load(NAME, cache_dir=cache)
    attempts = len(retry.BACKOFF_SECONDS) + 1
    assert hub.requests[WEIGHTS] <= 1 + MAX_CONCURRENCY * attempts

"""A Hub server on loopback with faults, and damage to the cache that it fills."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import get_args

from scripts.fuzz.byte_edits import edit_data, join, noise, split
from siglip_port import CheckpointError, SigLipVisionModel
from tests.helpers.hub_server import Fault, Hub, Kind, Repository

NAME = "fuzz/encoder"
FAULTY_REQUESTS = (
    "HEAD config.json",
    "GET config.json",
    "HEAD *",
    "GET *",
    "CDN RANGE *",
    "CDN GET *",
    "GET api/*",
    "*",
)
STATUS_CODES = (400, 401, 403, 404, 408, 410, 416, 429, 500, 502, 503, 504)

Load = Callable[[], SigLipVisionModel]


def start_hub(workspace: Path) -> Hub:
    """Start a Hub server, and point the client in this process at it, with short timeouts."""
    hub = Hub()
    os.environ |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(workspace.parent),
        "HF_HUB_VERBOSITY": "critical",
    }
    os.environ.pop("HF_HUB_OFFLINE", None)
    from huggingface_hub import constants

    from siglip_port.hub import chunked_download, retry

    # A log record about a fault is not a failure.
    logging.getLogger("siglip_port").setLevel(logging.CRITICAL)
    constants.HF_HUB_DOWNLOAD_TIMEOUT = 0.3  # type: ignore[assignment]
    constants.HF_HUB_ETAG_TIMEOUT = 0.3  # type: ignore[assignment]
    retry.BACKOFF_SECONDS = (0.01,) * len(retry.BACKOFF_SECONDS)  # type: ignore[assignment]
    chunked_download.CHUNK_BYTES = 512
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(0.01 if seconds else 0)
    return hub


def load_from_hub(hub: Hub, folder: Path, *, offline: bool = False) -> SigLipVisionModel:
    """Load a checkpoint from the Hub server, with a cache next to the checkpoint's folder."""
    hub.repositories[NAME] = Repository(folder)
    cache = folder.parent / "cache"
    return SigLipVisionModel.from_hf(NAME, cache_dir=cache, local_files_only=offline)


def prepare(hub: Hub, row: str, folder: Path, rng: Random, steps: list[str]) -> Load:
    """Set up a fault of the Hub or damage the cache; return the load to run.

    Args:
        hub: the Hub server.
        row: `hub faults`, `hub cache`, or `hub ranges` for neither.
        folder: folder of the checkpoint.
        rng: random generator.
        steps: descriptions of the edits; extended in place.
    """
    hub.reset()
    if row == "hub faults":
        hub.faults = [random_fault(rng)]
        steps.append(str(hub.faults[0]))
    if row != "hub cache":
        return lambda: load_from_hub(hub, folder)
    fill_cache(hub, folder, rng)
    steps += damage_cache(folder, rng)
    offline = rng.random() < 0.5
    return lambda: load_from_hub(hub, folder, offline=offline)


def fill_cache(hub: Hub, folder: Path, rng: Random) -> None:
    """Load once, in half of the cases over a connection that breaks."""
    if rng.random() < 0.5:
        intact_requests = Fault("none", "CDN RANGE *", times=rng.randrange(1, 8))
        broken_requests = Fault("reset", "CDN RANGE *", times=None, after=rng.choice((None, 200)))
        hub.faults = [intact_requests, broken_requests]
    with contextlib.suppress(CheckpointError):
        load_from_hub(hub, folder)
    hub.reset()


def cached_files(cache: Path) -> list[Path]:
    """Return the files of the cache; the few of siglip_port count four times."""
    files = []
    for path in sorted(cache.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.suffix != ".lock":
            files.append(path)
    return files + 3 * [path for path in files if ".siglip_port" in path.parts]


def damage_cache(folder: Path, rng: Random) -> list[str]:
    """Damage one or two files of the cache; return a description of each."""
    files = cached_files(folder.parent / "cache")
    steps = []
    for path in rng.choices(files, k=rng.choice((1, 1, 2))):
        content = path.read_bytes() if path.exists() else b""
        path.unlink(missing_ok=True)
        if rng.random() < 0.9:
            header, data = split(content)
            noisy = noise(rng, content)
            other_data = join(header, edit_data(rng, data))
            path.write_bytes(rng.choice((noisy, other_data, b"", content + b"\0")))
        steps.append(f"damaged {path.relative_to(folder.parent)}")
    return steps


def random_fault(rng: Random) -> Fault:
    """Return a random fault that can be detected."""
    kind: Kind = rng.choice([kind for kind in get_args(Kind) if kind != "none"])
    request = rng.choice(FAULTY_REQUESTS)
    times = rng.choice((1, 1, 2, None))
    # A few bytes per request, repeated without end, would count as progress.
    after = rng.choice((None, 0, 1, 10, 100) if times else (None, 0, 1000))
    if kind == "wrong bytes":
        # Detected only in a header, which is read first, and in files downloaded whole.
        request, times = rng.choice(
            (("CDN RANGE *", 1), ("CDN GET *", times), ("GET *.json", times))
        )
    if kind == "stall":
        times = 1
    seconds = 0.01 if kind == "slow" else None
    status = rng.choice(STATUS_CODES)
    return Fault(kind, request, times, after, seconds=seconds, status=status)

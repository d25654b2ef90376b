"""Network faults: a load returns the right weights or one error, and the next load succeeds.

Each case is one fault, once or always, between the real client and a Hub on loopback.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from siglip_port import CheckpointError, SigLipVisionModel
from siglip_port.hub import chunked_download
from tests.helpers.hub_answers import Kind
from tests.helpers.hub_cache import NAME, assert_same
from tests.helpers.hub_server import Fault, Hub
from tests.helpers.sweeps import sample, sweep

load = SigLipVisionModel.from_hf

pytestmark = pytest.mark.usefixtures("medium_chunks", "short_timeouts", "short_waits")


@pytest.fixture
def medium_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_download, "CHUNK_BYTES", 16384)


STATUS = (400, 401, 403, 404, 408, 410, 416, 418, 429, 451, 500, 502, 503, 504)

BREAKS: tuple[Kind, ...] = ("reset", "close", "stall", "short")
CHANGES: tuple[Kind, ...] = ("other range", "other size")
WRONG_RESPONSES: tuple[Kind, ...] = (
    "html",
    "gzip",
    "no length",
    "other etag",
    "no etag",
    "no commit",
)

FAULTS = [
    *(Fault("status", status=status) for status in STATUS),
    *(Fault(kind, after=after) for kind in BREAKS for after in (None, 0, 300)),
    Fault("slow", after=0, seconds=0.001),
    *(Fault("long", after=after) for after in (None, 1000)),
    *(Fault(kind, after=after) for kind in CHANGES for after in (None, -1, 1000)),
    *(Fault(kind) for kind in WRONG_RESPONSES),
]

NOT_RETRIED = (400, 401, 403, 404, 410, 416, 418, 451)
"""Statuses that are not retried; from the CDN, most of them mean an expired URL, and are."""

SIMILAR_STATUSES = (400, 410, 418, 451, 408, 502, 504)
"""Statuses that are handled like others; the sweep with permanent faults skips them."""


@dataclass(frozen=True)
class Request:
    """A kind of request, the options of the load, and the statuses that are not retried."""

    key: str
    not_retried: Iterable[int] = NOT_RETRIED
    options: dict[str, Any] = field(default_factory=dict)
    has_ranges: bool = True

    @property
    def filename(self) -> str:
        """Name in the repository."""
        return self.key.split()[-1]


WHOLE_FILE = {"vision_only": False}
REQUESTS = [
    Request("HEAD config.json"),
    Request("GET config.json"),
    Request("HEAD preprocessor_config.json"),
    Request("HEAD model.safetensors"),
    Request("CDN RANGE model.safetensors", (418, 451)),  # 416: the whole file is downloaded
    Request("CDN GET model.safetensors", (416, 418, 451), WHOLE_FILE, has_ranges=False),
]
BY_KEY = {request.key: request for request in REQUESTS}


def describe(fault: Fault) -> str:
    status = f" {fault.status}" if fault.kind == "status" else ""
    return f"{fault.kind}{status}, after {fault.after}"


@sweep
@pytest.mark.parametrize("times", [1, None], ids=["once", "always"])
@pytest.mark.parametrize("key", BY_KEY)
def test_fault(
    key: str,
    times: int | None,
    is_full: bool,
    hub: Hub,
    folder: Path,
    tmp_path: Path,
    token: str,
) -> None:
    """The load succeeds or raises one error; a single fault that is retried has no effect."""
    request = BY_KEY[key]
    hub.repositories[NAME].readers = (token,)
    hub.repositories[NAME].private = True
    hub.ranges = request.has_ranges
    expected = load(folder).state_dict()
    faults = [fault for fault in FAULTS if times == 1 or not has_similar_status(fault)]
    if not is_full:
        faults = sample(faults, len(REQUESTS), offset=REQUESTS.index(request))
    failed: set[int | str] = set()
    for number, fault in enumerate(faults):
        options = {"cache_dir": tmp_path / f"{number}", "token": token, **request.options}
        hub.faults = [replace(fault, request=key, times=times)]
        try:
            models = [load(NAME, **options)]
        except CheckpointError as error:
            failed.add(fault.status if fault.kind == "status" else describe(fault))
            assert_harmless(str(error), token)
            hub.faults = []
            models = [load(NAME, **options)]
        except BaseException as error:
            error.add_note(f"{key}, {describe(fault)}")
            raise
        models.append(load(NAME, **options, local_files_only=True))
        for model in models:
            state = model.state_dict()
            is_equal = [torch.equal(tensor, state[name]) for name, tensor in expected.items()]
            assert all(is_equal), describe(fault)
            assert token not in f"{model.provenance!r}"
    assert not [address for address, _ in hub.authorizations if address == hub.cdn_url]
    num_loaded = len(faults) - len(failed)
    print(f"{key}, {'once' if times else 'always'}: {num_loaded} of {len(faults)} loaded")
    if times == 1:
        statuses = {fault.status for fault in faults if fault.kind == "status"}
        assert failed == statuses.intersection(request.not_retried)


def has_similar_status(fault: Fault) -> bool:
    return fault.kind == "status" and fault.status in SIMILAR_STATUSES


def assert_harmless(message: str, token: str) -> None:
    assert NAME in message
    assert token not in message
    assert "Signature" not in message


WRONG_BYTES = [
    *(("GET config.json", times) for times in (1, 2, None)),
    *(("CDN GET model.safetensors", times) for times in (1, 2, None)),
    ("CDN RANGE model.safetensors", 1),  # the header; always would change tensors, too
]


@sweep
@pytest.mark.parametrize(("key", "times"), WRONG_BYTES)
def test_wrong_bytes(
    key: str, times: int | None, is_full: bool, hub: Hub, folder: Path, tmp_path: Path
) -> None:
    """Wrong bytes are detected in whole files and headers, not in partial downloads."""
    request = BY_KEY[key]
    hub.ranges = request.has_ranges
    size = (folder / request.filename).stat().st_size
    for offset in (0, 3, 8, 50, 200, 3000) if is_full else (0, 8, 3000):
        if offset >= size:
            continue
        hub.faults = [Fault("wrong bytes", key, times=times, after=offset)]
        options = {"cache_dir": tmp_path / f"{offset}", **request.options}
        message = ""
        try:
            assert_same(load(NAME, **options), folder)
        except CheckpointError as error:
            message = str(error)
        if message:
            reasons = (
                "do not match the Hub's hash",
                "safetensors file",
                "not hold",
                "does not match",
            )
            assert any(reason in message for reason in reasons)
            assert times != 1 or "RANGE" in key  # whole files are downloaded again
        hub.faults = []
        assert_same(load(NAME, **options), folder)


def test_wait_until_retry(hub: Hub, folder: Path, cache: Path, tmp_path: Path) -> None:
    for wait in ("0", "soon"):
        hub.faults = [Fault("status", "CDN RANGE *", status=429, headers={"Retry-After": wait})]
        assert_same(load(NAME, cache_dir=tmp_path / wait), folder)
    hub.faults = [Fault("status", "CDN RANGE *", status=429, headers={"Retry-After": "3600"})]
    message = "returned HTTP 429 and asks to wait 3600 seconds"
    with pytest.raises(CheckpointError, match=message):
        load(NAME, cache_dir=cache)


def test_signed_url_is_always_expired(hub: Hub, folder: Path, cache: Path) -> None:
    hub.cdn_seconds = -1
    message = r"localhost rejected the signed URL of the file \(HTTP 403\)"
    with pytest.raises(CheckpointError, match=message):
        load(NAME, cache_dir=cache)


def test_config_is_too_large(hub: Hub, folder: Path, cache: Path) -> None:
    """An oversized configuration is not downloaded."""
    with (folder / "config.json").open("a") as file:
        file.truncate(10**11)
    message = (
        "config.json is too large for a configuration: 100,000,000,000 bytes, the limit is 25,"
    )
    with pytest.raises(CheckpointError, match=message):
        load(NAME, cache_dir=cache)
    assert not hub.requests["GET config.json"]

"""Network failures with every state of the cache: the right weights or one error; nothing is lost.

The cache has nothing, a part or all of the checkpoint, in the layout of transformers or open_clip,
with and without symlinks, writable or not.
"""

from __future__ import annotations

import errno
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import close_session, constants, hf_hub_download

from siglip_port import CheckpointError, HubUnreachableError, SigLipVisionModel
from siglip_port.hub import unreachable_reason
from tests.helpers.checkpoints import SMALL, edit_tensors
from tests.helpers.errors import full_text
from tests.helpers.hub_cache import NAME, assert_same, read_files
from tests.helpers.hub_server import Fault, Hub, Repository
from tests.helpers.network import point_client_at, silent_port
from tests.helpers.refused_writes import unwritable
from tests.helpers.sweeps import sample, sweep

load = SigLipVisionModel.from_hf

pytestmark = pytest.mark.usefixtures("short_timeouts")

OTHER = "other/model"

RATE_LIMIT = {"RateLimit": '"resolvers";r=0;t=900'}

FAULTS = {
    "reset": Fault("reset", times=None),
    "closed": Fault("close", times=None),
    "stalled": Fault("stall", times=None),
    "circular redirects": Fault("status", times=None, status=307, headers={"Location": "?again"}),
    "login page": Fault("html", times=None),
    "another server": Fault("no commit", times=None),
    "rate limit": Fault("status", times=None, status=429, headers=RATE_LIMIT),
    **{
        f"HTTP {status}": Fault("status", times=None, status=status)
        for status in (400, 401, 403, 407, 429, 503)
    },
}
"""Faults of every request."""

FAILURES = ("refused", "dead proxy", *FAULTS)

STATES = ("empty", "partial", "complete", "complete, by the client")


@contextmanager
def failing(failure: str, hub: Hub) -> Iterator[None]:
    """Let every request fail."""
    dead = f"127.0.0.1:{silent_port()}"
    with pytest.MonkeyPatch.context() as patch:
        if failure == "refused":
            point_client_at(f"http://{dead}", patch)
        elif failure == "dead proxy":
            for name in ("NO_PROXY", "no_proxy", "HTTP_PROXY"):
                patch.delenv(name, raising=False)
            patch.setenv("http_proxy", f"http://somebody:swordfish@{dead}")
        else:
            hub.faults = [FAULTS[failure]]
        close_session()  # the session keeps the proxy
        yield
        hub.faults = []
        close_session()


def fill_cache(state: str, folder: Path, cache: Path, token: str) -> None:
    """Fill the cache to a state, and cache another repository with the same weights."""
    (weights,) = folder.glob("*.safetensors")
    hf_hub_download(OTHER, weights.name, cache_dir=cache)
    if state == "complete":
        load(NAME, cache_dir=cache, token=token)
    if state == "complete, by the client":
        for path in sorted(folder.iterdir()):
            hf_hub_download(NAME, path.name, cache_dir=cache, token=token)
    if state == "partial":
        config = weights.name.replace("model.safetensors", "config.json")
        hf_hub_download(NAME, config, cache_dir=cache, token=token)


@sweep
@pytest.mark.usefixtures("links")
@pytest.mark.parametrize("writable", [True, False], ids=["writable", "read-only"])
@pytest.mark.parametrize("state", STATES)
def test_every_failure(
    state: str,
    writable: bool,
    is_full: bool,
    hub: Hub,
    private_folder: Path,
    cache: Path,
    token: str,
    request: pytest.FixtureRequest,
) -> None:
    folder = private_folder
    hub.repositories[OTHER] = Repository(folder)
    fill_cache(state, folder, cache, token)
    before = read_files(cache)
    options: dict[str, Any] = {"cache_dir": cache, "token": token}
    failures = FAILURES
    if not is_full:
        # the cases of one state sample all failures between them
        case = 2 * ("open_clip" in request.node.name) + 4 * ("no links" in request.node.name)
        failures = tuple(sample(FAILURES, 8, offset=case + writable))
    for failure in failures:
        hub.requests.clear()
        load_error: CheckpointError | None = None
        with failing(failure, hub):
            try:
                with nullcontext() if writable else unwritable(cache, errno.EROFS):
                    assert_same(load(NAME, **options), folder)
            except CheckpointError as error:
                load_error = error
        assert (load_error is None) == state.startswith("complete"), f"{failure}: {load_error}"
        if load_error is not None:
            assert NAME in str(load_error), failure
            assert_no_secrets(load_error, token)
            names_proxy = "through the proxy http://127.0.0.1:" in str(load_error)
            assert names_proxy == (failure == "dead proxy")
        # If everything is cached, requests are not retried. 20 redirects are followed.
        max_requests = 45
        if load_error is None:
            max_requests = 20 if failure == "circular redirects" else 2
        assert sum(hub.requests.values()) <= max_requests, failure
        assert before.items() <= read_files(cache).items(), failure
    assert_same(load(NAME, **options), folder)
    assert_same(load(NAME, **options, local_files_only=True), folder)


def assert_no_secrets(error: BaseException, token: str) -> None:
    text = full_text(error)
    assert not [secret for secret in (token, "swordfish", "Signature") if secret in text]


def test_interrupted_load_keeps_older_commit(
    hub: Hub, private_folder: Path, cache: Path, tmp_path: Path, token: str
) -> None:
    options: dict[str, Any] = {"cache_dir": cache, "token": token}
    load(NAME, **options)
    new = Path(shutil.copytree(private_folder, tmp_path / "new"))
    (weights,) = new.glob("*.safetensors")
    edit_tensors(new, lambda t: {name: tensor + 1 for name, tensor in t.items()}, weights.name)
    hub.repositories[NAME].push(new)
    hub.faults = [Fault("reset", "CDN *", times=None)]
    with pytest.raises(HubUnreachableError):
        load(NAME, **options)
    assert_same(load(NAME, **options, local_files_only=True), private_folder)
    hub.faults = [Fault("reset", times=None)]
    assert_same(load(NAME, **options), private_folder)
    hub.faults = []
    assert_same(load(NAME, **options), new)


@pytest.mark.parametrize("method", ["HEAD", "CDN RANGE"])
def test_connection_reset(method: str, hub: Hub, vision_folder: Path, cache: Path) -> None:
    hub.faults = [Fault("reset", f"{method} model.safetensors", times=None)]
    with pytest.raises(CheckpointError, match=r"google/siglip-small: .*model.safetensors"):
        load(NAME, cache_dir=cache)
    hub.faults.clear()
    assert load(NAME, cache_dir=cache).config == SMALL


# --- causes ---------------------------------------------------------------------------------------


def test_no_network(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The load fails within seconds."""
    point_client_at(f"http://127.0.0.1:{silent_port()}", monkeypatch)
    start = time.monotonic()
    message = f"^{NAME}: cannot download config.json: no connection to 127.0.0.1 "
    with pytest.raises(CheckpointError, match=message):
        load(NAME, cache_dir=cache)
    assert time.monotonic() - start < 5


def test_untrusted_certificate(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A firewall that inspects TLS replaces the certificate."""
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    files = ["-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "certificate")]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        monkeypatch.setattr(server, "handle_error", lambda *_: None)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        point_client_at(f"https://127.0.0.1:{server.server_port}", monkeypatch)
        message = r"the TLS certificate of 127.0.0.1 is not trusted .*; if .* set SSL_CERT_FILE"
        with pytest.raises(HubUnreachableError, match=message):
            load(NAME, cache_dir=cache)
        server.shutdown()


def test_socks_proxy_without_package(
    hub: Hub, folder: Path, cache: Path, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_PROXY", "no_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "socks5://somebody:swordfish@127.0.0.1:1080")
    close_session()
    message = "the SOCKS proxy socks5://127.0.0.1:1080 needs the package socksio; run: pip install"
    with pytest.raises(HubUnreachableError, match=message) as load_error:
        load(NAME, cache_dir=cache, token=token)
    assert "swordfish" not in full_text(load_error.value)
    monkeypatch.undo()
    close_session()


# --- unreachable_reason ---------------------------------------------------------------------------


def test_unreachable_reason(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unreachable_reason(NAME) is None
    assert unreachable_reason("google/absent") is None  # a refusal is a response
    hub.faults = [Fault("status", status=501, times=None)]
    assert unreachable_reason(NAME) == "HTTP 501"
    hub.faults.clear()
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE" in (unreachable_reason(NAME) or "")
    point_client_at(f"http://127.0.0.1:{silent_port()}", monkeypatch)
    assert "no connection to 127.0.0.1" in (unreachable_reason(NAME) or "")


def test_name_lookup_hangs(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timeouts of the client do not cover name lookups."""
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: released.wait())
    point_client_at("http://hub.invalid", monkeypatch)
    assert "no response within 0 seconds" in (unreachable_reason(NAME, seconds=0.1) or "")
    assert not released.is_set()
    released.set()

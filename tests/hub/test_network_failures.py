"""However the network fails, and whatever the cache has: the right bits, or one sentence.

And nothing is lost.

Every failure meets every state of the cache: nothing, a part or all of the checkpoint, of
transformers' layout or open_clip's, with and without symbolic links, writable or not.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import close_session, constants, hf_hub_download

from siglip_port import CheckpointError, HubUnreachableError, SigLipVisionModel
from siglip_port.hub import lock, network_errors, retry
from tests.helpers.checkpoints import edit_tensors
from tests.helpers.hub_cache import NAME, assert_same
from tests.helpers.hub_server import Fault, Hub, Repository
from tests.helpers.network import silent_port

load = SigLipVisionModel.from_hf

TOKEN = "hf_" + "Secret" * 5
OTHER = "other/model"

FAULTS: dict[str, Fault | None] = {  # of every request, for ever; None: set up by `meet`
    "refused": None,
    "dead proxy": None,
    "reset": Fault("reset", times=None),
    "closed": Fault("close", times=None),
    "stalled": Fault("stall", times=None),
    "redirects in a circle": Fault(
        "status", times=None, status=307, headers={"Location": "?again"}
    ),
    "login page": Fault("html", times=None),
    "no Hub": Fault("no commit", times=None),
    "rate limit": Fault(
        "status", times=None, status=429, headers={"RateLimit": '"resolvers";r=0;t=900'}
    ),
    **{
        f"HTTP {status}": Fault("status", times=None, status=status)
        for status in (400, 401, 403, 407, 429, 503)
    },
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)


@pytest.fixture(params=["transformers", "open_clip"])
def folder(request: pytest.FixtureRequest, hub: Hub, copied: Path) -> Path:
    """The folder of the repository that the Hub serves, which only the token opens."""
    folder = copied
    edit_tensors(folder, lambda t: {**t, "text_model.embeddings.weight": torch.ones(75_000)})
    if request.param == "open_clip":
        (folder / "config.json").rename(folder / "open_clip_config.json")
        (folder / "model.safetensors").rename(folder / "open_clip_model.safetensors")
    hub.repositories[NAME] = Repository(folder, private=True, readers=(TOKEN,))
    return folder


@pytest.fixture(params=[False, True], ids=["links", "no links"])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the cache is made of symbolic links."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", request.param, raising=False)


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def unwritable(folder: Path, number: int) -> Iterator[None]:
    """Every write below a folder fails, as on a file system that is read-only (EROFS) or full (ENOSPC).

    Not by permissions, which do not bind the administrator.
    """

    def refuse_in(real: Callable[..., Any], writes: Callable[..., bool]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401
            paths = [path, *arguments[:1]]
            inside = any(isinstance(p, (str, Path)) and folder in Path(p).parents for p in paths)
            if inside and writes(*arguments, **options):
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *arguments, **options)

        return call

    def opens_to_write(mode: str = "r", *_: object, **__: object) -> bool:
        return any(letter in mode for letter in "wax+")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("mkdir", "replace", "rename", "symlink", "link", "unlink", "rmdir"):
            patch.setattr(os, name, refuse_in(getattr(os, name), lambda *_, **__: True))
        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
        patch.setattr(os, "open", refuse_in(os.open, lambda flags, *_, **__: bool(flags & writing)))
        patch.setattr(io, "open", refuse_in(io.open, opens_to_write))
        yield


@contextmanager
def meeting(fault: str, hub: Hub) -> Iterator[None]:
    """The network fails."""
    with pytest.MonkeyPatch.context() as patch:
        found, dead = FAULTS[fault], f"127.0.0.1:{silent_port()}"
        hub.faults = [found] if found else []
        if fault == "refused":
            template = f"http://{dead}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        if fault == "dead proxy":
            for name in ("NO_PROXY", "no_proxy", "HTTP_PROXY"):
                patch.delenv(name, raising=False)
            patch.setenv("http_proxy", f"http://somebody:swordfish@{dead}")
        close_session()  # which knows the proxy
        yield
        hub.faults = []
        close_session()


def say(error: BaseException) -> str:
    """All that an error tells: its message, its traceback, and what it came of, shown or not."""
    told = "".join(traceback.format_exception(error))
    link = error.__cause__ or error.__context__
    return told if link is None else told + say(link)


@pytest.mark.usefixtures("links")
@pytest.mark.parametrize("writable", [True, False], ids=["writable", "read-only"])
@pytest.mark.parametrize("state", ["nothing", "a part", "all", "all, by the client"])
def test_every_failure(
    state: str,
    writable: bool,
    hub: Hub,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments: dict[str, Any] = {"cache_dir": tmp_path / "cache", "token": TOKEN}
    hub.repositories[OTHER] = Repository(folder)
    weights = next(path.name for path in folder.glob("*.safetensors"))
    hf_hub_download(OTHER, weights, cache_dir=tmp_path / "cache")
    if state == "all":
        load(NAME, **arguments)
    for path in sorted(folder.iterdir()) if state == "all, by the client" else []:
        hf_hub_download(NAME, path.name, **arguments)
    if state == "a part":
        hf_hub_download(NAME, next(path.name for path in folder.glob("*config.json")), **arguments)
    before = files(tmp_path / "cache")
    for fault in FAULTS:
        hub.requests.clear()
        refusal: CheckpointError | None = None
        with meeting(fault, hub):
            try:
                if writable:
                    assert_same(load(NAME, **arguments), folder)
                else:
                    with unwritable(tmp_path / "cache", errno.EROFS):
                        assert_same(load(NAME, **arguments), folder)
            except CheckpointError as error:
                refusal = error
        assert (refusal is None) == state.startswith("all"), f"{fault}: {refusal}"
        if refusal is not None:
            assert NAME in str(refusal), fault
            assert not [
                secret for secret in (TOKEN, "swordfish", "Signature") if secret in say(refusal)
            ], fault
            assert ("through the proxy http://127.0.0.1:" in str(refusal)) == (
                fault == "dead proxy"
            )
        # Where all is cached, the Hub is not asked with patience. A redirect is followed 20 times.
        most = 45 if refusal is not None else 20 if fault == "redirects in a circle" else 2
        assert sum(hub.requests.values()) <= most, fault
        assert before.items() <= files(tmp_path / "cache").items(), fault
    assert_same(load(NAME, **arguments), folder)
    assert_same(load(NAME, **arguments, local_files_only=True), folder)


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES])
@pytest.mark.usefixtures("links")
def test_a_cache_that_cannot_be_written(
    number: int, hub: Hub, folder: Path, tmp_path: Path
) -> None:
    """What is there loads, with the Hub at hand; what is small is read all the same.

    Weights have no place, it says.
    """
    cache = tmp_path / "cache"
    arguments: dict[str, Any] = {"cache_dir": cache, "token": TOKEN}
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.25, 0.25, 0.25]}')
    for path in sorted(folder.iterdir()):
        if path.name != "preprocessor_config.json":
            hf_hub_download(NAME, path.name, **arguments)
    before = files(cache)
    with unwritable(cache, number):
        model = load(NAME, **arguments)
    assert_same(model, folder)
    assert model.preprocessor_config == load(folder).preprocessor_config
    assert model.preprocessor_config["image_mean"] == [0.25] * 3  # fetched, and kept elsewhere
    assert files(cache) == before
    shutil.rmtree(cache)
    cache.mkdir()
    with (
        unwritable(cache, number),
        pytest.raises(CheckpointError, match=rf"\[Errno {number}\] {os.strerror(number)}"),
    ):
        load(NAME, **arguments)
    assert not files(cache)


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
def test_a_newer_commit_that_cannot_be_stored(
    number: int, hub: Hub, folder: Path, tmp_path: Path
) -> None:
    """Where only other files are new, it loads.

    Else that is told, and what was there before still loads.
    """
    cache = tmp_path / "cache"
    arguments: dict[str, Any] = {"cache_dir": cache, "token": TOKEN}
    load(NAME, **arguments)
    first = hub.repositories[NAME].commit
    readme = tmp_path / "readme"
    shutil.copytree(folder, readme)
    (readme / "README.md").write_text("new")
    hub.repositories[NAME].push(readme)
    with unwritable(cache, number):
        assert_same(load(NAME, **arguments), folder)
    new = tmp_path / "new"
    shutil.copytree(folder, new)
    edit_tensors(
        new,
        lambda t: {n: v + 1 for n, v in t.items()},
        next(path.name for path in folder.glob("*.saf*")),
    )
    hub.repositories[NAME].push(new)
    with (
        unwritable(cache, number),
        pytest.raises(CheckpointError, match=rf"commit {first}, loads with local_files_on"),
    ):
        load(NAME, **arguments)
    assert_same(load(NAME, **arguments, local_files_only=True), folder)
    assert_same(load(NAME, **arguments), new)


def test_a_load_that_was_interrupted_leaves_the_older_commit(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"cache_dir": tmp_path / "cache", "token": TOKEN}
    load(NAME, **arguments)
    new = tmp_path / "new"
    shutil.copytree(folder, new)
    edit_tensors(
        new,
        lambda t: {n: v + 1 for n, v in t.items()},
        next(path.name for path in folder.glob("*.saf*")),
    )
    hub.repositories[NAME].push(new)
    hub.faults = [Fault("reset", "CDN *", times=None)]
    with pytest.raises(HubUnreachableError):
        load(NAME, **arguments)
    assert_same(load(NAME, **arguments, local_files_only=True), folder)
    hub.faults = [Fault("reset", times=None)]
    assert_same(load(NAME, **arguments), folder)
    hub.faults = []
    assert_same(load(NAME, **arguments), new)


# --- the budget -----------------------------------------------------------------------------------


def test_one_budget_for_all_that_a_load_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("siglip_port.hub.retry.time.monotonic", lambda: now[0])
    budget = retry.RetryBudget()
    assert budget.spend(1000, 200)
    assert budget.spend(1000, 200)  # another thread, that waits at the same time
    now[0] += 200
    assert budget.spend(1200, 90)
    assert not budget.spend(1200, 120)
    now[0] += 900
    budget.receive(retry.MIN_PROGRESS_BYTES)  # progress: what came before counts no more
    assert budget.spend(1200, 290)
    assert not budget.spend(2100, 301)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        (
            {
                "RateLimit": '"resolvers";r=0;t=25',
                "RateLimit-Policy": '"fixed window";"resolvers";q=3000;w=300',
            },
            26,
        ),
        ({"RateLimit": '"api";r=7;t=25', "Retry-After": "3"}, 3),
        ({"Retry-After": " 120 "}, 120),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"Retry-After": "soon"}, None),
        ({}, None),
    ],
)
def test_what_a_server_asks_to_wait(headers: dict[str, str], seconds: float | None) -> None:
    assert network_errors.retry_after(headers) == seconds


def test_a_rate_limit_is_obeyed(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    spend = retry.RetryBudget.spend

    def note(budget: retry.RetryBudget, begun: float, seconds: float = 0.0) -> bool:
        waits.append(seconds)
        return spend(budget, begun, seconds)

    monkeypatch.setattr(retry.RetryBudget, "spend", note)
    limit = {"RateLimit": '"resolvers";r=0;t=0'}
    hub.faults = [Fault("status", "HEAD *config.json", status=429, headers=limit, times=2)]
    assert_same(load(NAME, cache_dir=tmp_path / "cache", token=TOKEN), folder)
    assert waits == [1, 1]
    hub.faults = [
        Fault("status", status=429, headers={"RateLimit": '"resolvers";r=0;t=300'}, times=None)
    ]
    with pytest.raises(
        HubUnreachableError,
        match=r"HTTP 429, and asks to wait 301 seconds \(a load waits 300 seconds",
    ):
        load(NAME, cache_dir=tmp_path / "other", token=TOKEN)


def test_a_connection_that_is_too_slow_is_told(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "PROGRESS_WINDOW_SECONDS", 0.2)
    monkeypatch.setattr("tests.helpers.hub_server.SLOW_CHUNK", 1)
    hub.faults = [Fault("slow", "CDN *", times=None, after=0, seconds=0.05)]
    with pytest.raises(HubUnreachableError, match=r"only 0\.0 kB have arrived in 0 seconds"):
        load(NAME, cache_dir=tmp_path / "cache", token=TOKEN)


def test_a_lock_that_is_held_for_nothing_ends(
    hub: Hub,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import filelock

    monkeypatch.setattr(lock, "LOCK_IDLE_SECONDS", 0.5)
    arguments: dict[str, Any] = {"cache_dir": tmp_path / "cache", "token": TOKEN}
    load(NAME, **arguments)
    (tower,) = (tmp_path / "cache").rglob("*-tower-*.safetensors")
    tower.unlink()
    with filelock.FileLock(tower.with_suffix(".lock")):
        assert_same(load(NAME, **arguments), folder)
    assert "another process fetches model-tower" in caplog.text.replace("open_clip_", "")
    assert "does nothing: going on without" in caplog.text


# --- causes ---------------------------------------------------------------------------------------


def test_an_expired_token_is_told(hub: Hub, folder: Path, tmp_path: Path) -> None:
    """The Hub refuses a public repository to a token that it does not know."""
    hub.repositories[NAME] = Repository(folder)
    text = "Invalid credentials in Authorization header"
    hub.faults = [
        Fault("status", "HEAD *", times=None, status=401, headers={"X-Error-Message": text})
    ]
    with pytest.raises(
        CheckpointError, match=rf"the Hub does not accept the token .* pass token=False .*{text}"
    ) as told:
        load(NAME, cache_dir=tmp_path / "cache", token=TOKEN, revision="v1")
    assert "at revision 'v1'" in str(told.value)
    assert TOKEN not in say(told.value)


@pytest.mark.parametrize("token", ["hf_ü", "hf a"])
def test_a_stored_token_that_cannot_be_one(
    token: str, hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(
        HubUnreachableError,
        match="the stored Hub token has characters that no token has: set HF_TOKEN",
    ):
        load(NAME, cache_dir=tmp_path / "cache")
    assert not hub.requests


def test_a_certificate_that_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a firewall that reads what passes it."""
    import ssl
    import subprocess
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    subprocess.run(
        [*command, "-keyout", tmp_path / "key", "-out", tmp_path / "certificate"],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        monkeypatch.setattr(server, "handle_error", lambda *_: None)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"https://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        with pytest.raises(
            HubUnreachableError,
            match=r"the certificate that 127.0.0.1 shows is not trusted .*SSL_CERT_",
        ):
            load(NAME, cache_dir=tmp_path / "cache")
        server.shutdown()


def test_a_socks_proxy_without_the_package_for_it(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_PROXY", "no_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "socks5://somebody:swordfish@127.0.0.1:1080")
    close_session()
    with pytest.raises(
        HubUnreachableError, match=r"the proxy socks5://127.0.0.1:1080 is a SOCKS .* socksio"
    ) as told:
        load(NAME, cache_dir=tmp_path / "cache", token=TOKEN)
    assert "swordfish" not in say(told.value)
    monkeypatch.undo()
    close_session()

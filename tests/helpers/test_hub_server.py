"""Tests of the Hub on loopback, through the real client and through plain HTTP."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import shutil
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.helpers.hub_server import SLOW_CHUNK, Fault, Hub, Repository

NAME = "google/a"
CONTENT = bytes(range(250)) * 400  # adjacent bytes differ
WEIGHTS = "model.safetensors"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def repository(hub: Hub, tmp_path: Path) -> Repository:
    """A repository with large and small files, one in a subfolder."""
    folder = tmp_path / "served"
    (folder / "sub").mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(CONTENT)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "notes.txt").write_text("notes")
    hub.repositories[NAME] = Repository(folder)
    return hub.repositories[NAME]


Reply = tuple[int, dict[str, str], bytes]


@pytest.fixture
def no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client does not wait between attempts."""
    monkeypatch.setattr(time, "sleep", lambda _: None)


def request(
    address: str,
    span: str = "",
    *,
    method: str = "GET",
    connection: http.client.HTTPConnection | None = None,
) -> Reply:
    """Send one request without redirects, decoding or retries."""
    parts = urlsplit(address)
    opened = connection or http.client.HTTPConnection(parts.netloc, timeout=10)
    try:
        opened.request(
            method,
            f"{parts.path}?{parts.query}",
            headers={"Range": f"bytes={span}"} if span else {},
        )
        response = opened.getresponse()
        return response.status, dict(response.headers), response.read()
    finally:
        if connection is None:
            opened.close()


def url_of(hub: Hub, file: str, revision: str = "main") -> str:
    return f"{hub.url}/{NAME}/resolve/{revision}/{file}"


@pytest.fixture
def plain_url(hub: Hub, repository: Repository) -> str:
    """URL of the weights in a repository without CDN."""
    repository.cdn = ""
    return url_of(hub, WEIGHTS)


# --- the real client ------------------------------------------------------------------------------


def test_files_and_listings(hub: Hub, repository: Repository, tmp_path: Path) -> None:
    api = HfApi()
    for file in ("config.json", WEIGHTS, "sub/notes.txt"):
        for revision in (None, "main", "v1", repository.commit):
            path = Path(
                hf_hub_download(
                    NAME, file, revision=revision, cache_dir=tmp_path / f"{file} {revision}"
                )
            )
            assert path.read_bytes() == (repository.folder / file).read_bytes()
            assert repository.commit in path.parts
    assert hub.requests["HEAD config.json"] == hub.requests["GET config.json"] == 4
    assert hub.requests[f"HEAD {WEIGHTS}"] == hub.requests[f"CDN GET {WEIGHTS}"] == 4
    assert hub.requests[f"GET {WEIGHTS}"] == 0  # the client uses the signed URL of the HEAD
    assert hub.sent == {WEIGHTS: 4 * len(CONTENT), "config.json": 4 * 2, "sub/notes.txt": 4 * 5}
    assert sorted(api.list_repo_files(NAME)) == ["config.json", WEIGHTS, "sub/notes.txt"]
    assert [file.path for file in api.list_repo_tree(NAME, "sub")] == ["sub/notes.txt"]
    info = api.model_info(NAME, revision="v1")
    assert (info.id, info.sha, info.gated, info.private) == (NAME, repository.commit, False, False)
    assert [file.rfilename for file in info.siblings or []] == [
        "config.json",
        WEIGHTS,
        "sub/notes.txt",
    ]
    assert api.model_info(NAME).sha == repository.commit
    assert hub.requests[f"GET api/models/{NAME}"] == 1


def test_refusals(hub: Hub, repository: Repository, tmp_path: Path) -> None:
    def status(
        error: type[HfHubHTTPError],
        name: str = NAME,
        file: str = WEIGHTS,
        revision: str | None = None,
        token: str | None = None,
    ) -> int:
        with pytest.raises(error) as error_info:
            hf_hub_download(name, file, revision=revision, token=token, cache_dir=tmp_path)
        return error_info.value.response.status_code

    assert status(RepositoryNotFoundError, name="google/absent") == 404
    assert status(RevisionNotFoundError, revision="v9") == 404
    assert status(RemoteEntryNotFoundError, file="absent.json") == 404
    assert list(tmp_path.rglob(f".no_exist/{repository.commit}/absent.json"))
    repository.gated, repository.readers = True, ("mine",)
    assert status(GatedRepoError) == 401
    assert status(GatedRepoError, token="another") == 403
    assert HfApi().model_info(NAME).gated == "manual"
    assert hf_hub_download(NAME, WEIGHTS, token="mine", cache_dir=tmp_path / "opened")
    repository.private = True
    assert status(RepositoryNotFoundError) == 401
    assert status(RepositoryNotFoundError, token="another") == 404
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info(NAME)
    hub.repositories[NAME] = Repository(repository.folder, disabled=True)
    with pytest.raises(DisabledRepoError):
        HfApi().model_info(NAME)
    assert request(url_of(hub, WEIGHTS))[0] == 403


def test_cdn_refuses_tokens(hub: Hub, repository: Repository, tmp_path: Path) -> None:
    assert hf_hub_download(NAME, WEIGHTS, token="secret", cache_dir=tmp_path)
    assert hub.authorizations == [(hub.url, "Bearer secret")]
    location = request(url_of(hub, WEIGHTS))[1]["Location"]
    connection = http.client.HTTPConnection(urlsplit(location).netloc)
    connection.request(
        "GET", location.removeprefix(hub.cdn_url), headers={"Authorization": "Bearer secret"}
    )
    assert connection.getresponse().status == 400
    connection.close()
    assert hub.authorizations[1:] == [(hub.cdn_url, "Bearer secret")]


def test_push_keeps_old_commit(hub: Hub, repository: Repository, tmp_path: Path) -> None:
    shutil.copytree(repository.folder, tmp_path / "new")
    (tmp_path / "new" / "config.json").write_text('{"new": 1}')
    (tmp_path / "new" / WEIGHTS).unlink()
    old = repository.commit
    hub.after["GET config.json"] = lambda: repository.push(tmp_path / "new")
    first = Path(hf_hub_download(NAME, "config.json", cache_dir=tmp_path / "cache"))
    assert first.parent.name == old != repository.commit
    assert not hub.after
    second = Path(hf_hub_download(NAME, "config.json", cache_dir=tmp_path / "cache"))
    assert (second.read_text(), second.parent.name) == ('{"new": 1}', repository.commit)
    for revision in (old, "v1"):
        assert Path(hf_hub_download(NAME, WEIGHTS, revision=revision)).read_bytes() == CONTENT
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(NAME, WEIGHTS)
    assert HfApi().model_info(NAME).sha == repository.commit


@pytest.mark.usefixtures("no_sleep")
def test_client_resumes(hub: Hub, repository: Repository, tmp_path: Path) -> None:
    hub.faults = [Fault("close", f"CDN * {WEIGHTS}", after=60_000)]
    assert Path(hf_hub_download(NAME, WEIGHTS, cache_dir=tmp_path)).read_bytes() == CONTENT
    assert hub.sent[WEIGHTS] == 60_000 + len(CONTENT)
    assert hub.requests[f"CDN GET {WEIGHTS}"] == 2
    assert not hub.faults


@pytest.mark.usefixtures("no_sleep")
def test_client_retries_after_429(hub: Hub, repository: Repository, tmp_path: Path) -> None:
    hub.faults = [Fault("status", "CDN *", status=429, headers={"Retry-After": "0"}, times=2)]
    assert Path(hf_hub_download(NAME, WEIGHTS, cache_dir=tmp_path)).read_bytes() == CONTENT
    assert hub.requests[f"CDN GET {WEIGHTS}"] == 3


# --- redirects and ranges -------------------------------------------------------------------------


def test_large_file_redirects_to_cdn(hub: Hub, repository: Repository) -> None:
    status, headers, body = request(url_of(hub, WEIGHTS), method="HEAD")
    assert (status, body) == (302, b"")
    assert (headers["X-Linked-Etag"], headers["X-Linked-Size"]) == (
        f'"{SHA256}"',
        str(len(CONTENT)),
    )
    assert headers["X-Repo-Commit"] == repository.commit
    assert (
        int(headers["Content-Length"]) == len(request(url_of(hub, WEIGHTS))[2]) < 1000
    )  # a message
    assert (
        urlsplit(headers["Location"]).netloc
        == urlsplit(hub.cdn_url).netloc
        != urlsplit(hub.url).netloc
    )
    status, cdn_headers, body = request(headers["Location"])
    assert (status, body) == (200, CONTENT)
    assert cdn_headers["ETag"] != headers["X-Linked-Etag"]
    assert "X-Repo-Commit" not in cdn_headers
    repository.cdn = "*"
    assert request(url_of(hub, "config.json"))[0] == 302


def test_small_file_is_served_by_hub(hub: Hub, repository: Repository) -> None:
    status, headers, body = request(url_of(hub, "config.json"))
    assert (status, body, headers["Content-Length"], headers["Accept-Ranges"]) == (
        200,
        b"{}",
        "2",
        "bytes",
    )
    assert (
        headers["ETag"] == '"9e26dfeeb6e641a33dae4961196235bdb965b21b"'
    )  # echo -n {} | git hash-object --stdin
    (repository.folder / "config.json").write_text("[]")
    after = request(url_of(hub, "config.json"))[1]
    assert after["ETag"] != headers["ETag"]
    assert after["X-Repo-Commit"] == repository.commit != headers["X-Repo-Commit"]


def test_signed_url_expires(hub: Hub, repository: Repository) -> None:
    def location() -> str:
        return request(url_of(hub, WEIGHTS))[1]["Location"]

    lasting = location()
    assert [request(lasting)[0] for _ in range(3)] == [200] * 3
    assert request(lasting.replace("Expires=", "Expires=9"))[0] == request(lasting + "0")[0] == 403
    hub.cdn_uses = 2
    twice = location()
    assert [request(twice, "0-9")[0] for _ in range(4)] == [206, 206, 403, 403]
    hub.cdn_uses, hub.cdn_seconds = None, 0
    assert request(location())[0] == 403
    assert request(lasting)[0] == 200
    hub.expire()
    assert request(lasting)[0] == 403


@pytest.mark.parametrize(
    ("span", "expected", "content_range"),
    [
        ("0-0", CONTENT[:1], "0-0"),
        ("10-19", CONTENT[10:20], "10-19"),
        ("99990-", CONTENT[-10:], "99990-99999"),
        ("99990-200000", CONTENT[-10:], "99990-99999"),
        ("-10", CONTENT[-10:], "99990-99999"),
        ("-200000", CONTENT, "0-99999"),
        ("100000-", None, "*"),
        ("-0", None, "*"),
        ("9-3", CONTENT, None),
        ("0-1,4-5", CONTENT, None),
        ("-", CONTENT, None),
    ],
)
def test_ranges(
    hub: Hub, plain_url: str, span: str, expected: bytes | None, content_range: str | None
) -> None:
    status, headers, body = request(plain_url, span)
    if content_range is None:
        assert status == 200
    else:
        assert status == (416 if expected is None else 206)
    assert headers.get("Content-Range") == (
        None if content_range is None else f"bytes {content_range}/100000"
    )
    if expected is not None:
        assert body == expected
        assert hub.sent[WEIGHTS] == int(headers["Content-Length"]) == len(expected)
    assert hub.requests == {f"RANGE {WEIGHTS}": 1}
    hub.ranges = False
    status, headers, body = request(plain_url, span)
    assert (status, body) == (200, CONTENT)
    assert not {"Accept-Ranges", "Content-Range"} & headers.keys()


def test_huge_file_is_not_read(hub: Hub, repository: Repository) -> None:
    size = 60 << 30
    with (repository.folder / "huge.safetensors").open("wb") as opened:
        opened.truncate(size)
        opened.seek(size - 3)
        opened.write(b"end")
    start = time.monotonic()
    headers = request(url_of(hub, "huge.safetensors"), method="HEAD")[1]
    assert headers["X-Linked-Size"] == str(size)
    assert len(headers["X-Linked-Etag"].strip('"')) == 46  # not a SHA-256
    assert request(headers["Location"], f"{size - 100}-")[2] == b"\0" * 97 + b"end"
    assert request(headers["Location"], f"{size >> 1}-{(size >> 1) + 99}")[2] == b"\0" * 100
    assert time.monotonic() - start < 2
    assert hub.sent["huge.safetensors"] == 200


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403, 404, 416, 429, 500, 503])
def test_status_fault(hub: Hub, plain_url: str, status: int) -> None:
    hub.faults = [Fault("status", status=status, headers={"Retry-After": "7"})]
    actual, headers, _ = request(plain_url)
    assert (actual, headers["Retry-After"]) == (status, "7")
    assert request(plain_url)[2] == CONTENT


@pytest.mark.parametrize(
    ("fault", "span", "status", "content_range", "expected"),
    [
        (Fault("html"), "", 200, None, None),
        (Fault("short"), "10-19", 206, "10-14/100000", CONTENT[10:15]),
        (Fault("short", after=9), "10-19", 206, "10-18/100000", CONTENT[10:19]),
        (Fault("short", after=9), "", 200, None, CONTENT[:9]),
        (Fault("long"), "10-19", 206, "10-20/100000", CONTENT[10:21]),
        (Fault("long", after=5), "", 200, None, CONTENT + bytes(5)),
        (Fault("other range"), "10-19", 206, "11-20/100000", CONTENT[11:21]),
        (Fault("other range", after=5), "10-19", 206, "15-24/100000", CONTENT[15:25]),
        (Fault("other size"), "10-19", 206, "10-19/100001", CONTENT[10:20]),
        (Fault("wrong bytes"), "10-19", 206, "10-19/100000", b"\xf5" + CONTENT[11:20]),
        (
            Fault("wrong bytes", after=3),
            "10-19",
            206,
            "10-19/100000",
            CONTENT[10:13] + b"\xf2" + CONTENT[14:20],
        ),
        (
            Fault("none", headers={"Content-Range": "bytes 0-9/7"}),
            "10-19",
            206,
            "0-9/7",
            CONTENT[10:20],
        ),
        (Fault("no length"), "10-19", 206, "10-19/100000", CONTENT[10:20]),
        (Fault("no length"), "", 200, None, CONTENT),
    ],
    ids=lambda value: f"{value.kind} {value.after}" if isinstance(value, Fault) else "",
)
@pytest.mark.parametrize("cdn", ["", "*"], ids=["hub", "cdn"])
def test_changed_response(
    hub: Hub,
    repository: Repository,
    cdn: str,
    fault: Fault,
    span: str,
    status: int,
    content_range: str | None,
    expected: bytes | None,
) -> None:
    repository.cdn = cdn
    address = request(url_of(hub, WEIGHTS))[1]["Location"] if cdn else url_of(hub, WEIGHTS)
    hub.faults = [fault]
    actual, headers, body = request(address, span)
    assert (actual, headers.get("Content-Range")) == (
        status,
        content_range and f"bytes {content_range.removeprefix('bytes ')}",
    )
    assert body == expected if expected is not None else b"<html>" in body
    assert ("Content-Length" in headers) == (fault.kind != "no length")
    assert headers.get("Transfer-Encoding") == ("chunked" if fault.kind == "no length" else None)
    assert ("ETag" in headers) == (fault.kind != "html")
    assert request(address, "10-19")[2] == CONTENT[10:20]


def test_gzip_fault(hub: Hub, plain_url: str) -> None:
    hub.faults = [Fault("gzip", times=2)]
    for span in ("", "10-19"):
        _, headers, body = request(plain_url, span)
        assert headers["Content-Encoding"] == "gzip"
        assert gzip.decompress(body) == (CONTENT[10:20] if span else CONTENT)


@pytest.mark.parametrize("cdn", ["", "*"], ids=["hub", "cdn"])
def test_header_faults(hub: Hub, repository: Repository, cdn: str) -> None:
    repository.cdn = cdn
    names = ("X-Linked-Etag", "X-Linked-Size") if cdn else ("ETag", "Content-Length")
    hub.faults = [Fault("other etag"), Fault("no etag"), Fault("other size"), Fault("no commit")]
    answers = [request(url_of(hub, WEIGHTS), method="HEAD")[1] for _ in range(5)]
    correct = answers.pop()
    assert [answer.get(names[0]) == correct[names[0]] for answer in answers] == [
        False,
        False,
        True,
        True,
    ]
    assert names[0] in answers[0]
    assert names[0] not in answers[1]
    if cdn:
        assert answers[2][names[1]] == str(len(CONTENT) + 1)
    assert ["X-Repo-Commit" in answer for answer in answers] == [True, True, True, False]


@pytest.mark.parametrize("after", [None, 0, 1000])
@pytest.mark.parametrize(
    ("kind", "error"), [("reset", ConnectionResetError), ("close", http.client.HTTPException)]
)
def test_broken_connection(
    hub: Hub, plain_url: str, kind: str, error: type[Exception], after: int | None
) -> None:
    hub.faults = [Fault("reset" if kind == "reset" else "close", after=after)]
    connection = http.client.HTTPConnection(urlsplit(plain_url).netloc, timeout=10)
    connection.request("GET", urlsplit(plain_url).path)
    if after is None:
        with pytest.raises((ConnectionResetError, http.client.RemoteDisconnected)) as error_info:
            connection.getresponse()
        assert isinstance(error_info.value, http.client.RemoteDisconnected) == (kind == "close")
    else:
        response = connection.getresponse()
        assert response.headers["Content-Length"] == str(len(CONTENT))
        assert response.read(after) == CONTENT[:after]
        with pytest.raises(error):
            response.read()
        response.close()
    connection.close()
    assert hub.sent[WEIGHTS] == (after or 0)
    assert request(plain_url)[2] == CONTENT


def test_reset_after_sent_bytes(hub: Hub, plain_url: str, repository: Repository) -> None:
    """Even if the client reads slowly."""
    with (repository.folder / WEIGHTS).open("wb") as opened:
        opened.truncate(8_000_000)
    hub.faults = [Fault("reset", after=6_000_000)]
    connection = http.client.HTTPConnection(urlsplit(plain_url).netloc, timeout=10)
    connection.request("GET", urlsplit(plain_url).path)
    time.sleep(0.1)
    with connection.getresponse() as response:
        assert response.read(6_000_000) == bytes(6_000_000)
        with pytest.raises(ConnectionResetError):
            response.read()
    connection.close()


@pytest.mark.parametrize("after", [None, 1000])
def test_stall_fault(hub: Hub, plain_url: str, after: int | None) -> None:
    hub.faults = [Fault("stall", seconds=0.2, after=after), Fault("stall", after=after)]
    start = time.monotonic()
    assert request(plain_url)[2] == CONTENT
    assert time.monotonic() - start >= 0.2
    connection = http.client.HTTPConnection(urlsplit(plain_url).netloc, timeout=0.1)
    connection.request("GET", urlsplit(plain_url).path)
    with pytest.raises(TimeoutError):  # the second stall has no end
        connection.getresponse().read()
    assert hub.max_concurrency == 1
    assert connection.sock is not None
    connection.sock.settimeout(10)
    hub.reset()  # ends the stall
    while connection.sock.recv(1 << 16):
        pass
    connection.close()
    assert not hub.sent


def test_slow_fault(hub: Hub, plain_url: str) -> None:
    hub.faults = [Fault("slow", after=50_000, seconds=0.02)]
    start = time.monotonic()
    assert request(plain_url)[2] == CONTENT
    assert time.monotonic() - start >= 50_000 // SLOW_CHUNK * 0.02


def test_faults_are_used_up_in_order(hub: Hub, repository: Repository) -> None:
    config, weights = url_of(hub, "config.json"), url_of(hub, WEIGHTS)
    hub.faults = [
        Fault("status", "HEAD config.json", status=500, times=2),
        Fault("status", f"GET {WEIGHTS}", status=501),
        Fault("status", "HEAD *", status=502),
        Fault("status", "CDN *", status=503, times=None),
    ]
    assert [request(config, method="HEAD")[0] for _ in range(4)] == [500, 500, 502, 200]
    assert [request(weights)[0] for _ in range(2)] == [501, 302]
    assert [request(request(weights)[1]["Location"])[0] for _ in range(2)] == [503, 503]
    assert [fault.status for fault in hub.faults] == [503]


# --- connections ----------------------------------------------------------------------------------


def test_connection_is_reused(hub: Hub, plain_url: str) -> None:
    """A body of another length than in its headers would corrupt the next response."""
    connection = http.client.HTTPConnection(urlsplit(plain_url).netloc, timeout=10)
    connection.connect()
    socket_before = connection.sock
    hub.faults = [
        Fault(kind, f"GET {WEIGHTS}") for kind in ("no length", "gzip", "html", "status", "long")
    ]
    for _ in range(7):
        assert request(plain_url, "10-19", connection=connection)[2] == CONTENT[10:20]
        request(plain_url, connection=connection)
        for absent in (
            url_of(hub, "absent"),
            url_of(hub, WEIGHTS, "v9"),
            f"{hub.url}/nothing",
            f"{hub.url}/api/models/{NAME}",
        ):
            for method in ("HEAD", "GET"):
                request(absent, method=method, connection=connection)
        assert request(plain_url, "100000-", connection=connection)[0] == 416
        assert request(plain_url, method="HEAD", connection=connection)[1]["Content-Length"] == str(
            len(CONTENT)
        )
        assert connection.sock is socket_before
    connection.close()
    assert hub.max_concurrency == 1


def test_concurrent_requests(hub: Hub, plain_url: str) -> None:
    hub.faults = [Fault("slow", seconds=0.02, times=None)]
    bodies: list[bytes] = []

    def run() -> None:
        bodies.append(request(plain_url, "0-49999")[2])

    threads = [threading.Thread(target=run) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bodies == [CONTENT[:50_000]] * 16
    assert hub.max_concurrency == hub.requests[f"RANGE {WEIGHTS}"] == 16
    assert hub.sent[WEIGHTS] == 16 * 50_000

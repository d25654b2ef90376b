"""Mirrors, proxies and renamed repositories."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import constants

from siglip_port import SigLipVisionModel
from tests.helpers.checkpoints import SMALL
from tests.helpers.hub_cache import NAME
from tests.helpers.hub_server import RESOLVE, Answer, Fault, Hub, Repository, Server
from tests.helpers.network import point_client_at

load = SigLipVisionModel.from_hf

CACHED_ADDRESS = re.compile(
    r"/api/resolve-cache/models/(?P<name>.+/.+)/(?P<commit>.+)/(?P<file>.+)"
)


@contextmanager
def redirecting(
    hub: Hub, new_path: Callable[[str], str], *, absolute: bool = False
) -> Iterator[None]:
    """Let the Hub redirect to other paths, and serve `/api/resolve-cache/`."""
    respond = hub.api.respond

    def redirect(target: str, authorization: str | None) -> Answer:
        path = target.partition("?")[0]
        cached = CACHED_ADDRESS.fullmatch(path)
        if cached is not None:
            own_path = "/{name}/resolve/{commit}/{file}".format(**cached.groupdict())
            return respond(own_path, authorization)
        location = new_path(path)
        if location == path:
            return respond(target, authorization)
        return Answer(307, {"Location": (hub.url if absolute else "") + location})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub.api, "respond", redirect)
        yield


@pytest.mark.parametrize("absolute", [False, True])
def test_renamed_repository(absolute: bool, hub: Hub, vision_folder: Path, cache: Path) -> None:
    """The Hub redirects from the old name to the new one."""
    with redirecting(hub, lambda path: path.replace("old/name", NAME), absolute=absolute):
        assert load("old/name", cache_dir=cache).config == SMALL
    assert load("old/name", cache_dir=cache, local_files_only=True).config == SMALL


def test_resolve_cache(hub: Hub, vision_folder: Path, cache: Path) -> None:
    """`307 /api/resolve-cache/...`, as the Hub responds for files in git."""
    folder = f"api/resolve-cache/models/{NAME}/{hub.repositories[NAME].commit}"

    def cached_path(path: str) -> str:
        return f"/{folder}/{path.rpartition('/')[2]}" if path.endswith("json") else path

    with redirecting(hub, cached_path):
        assert load(NAME, cache_dir=cache).config == SMALL
    assert hub.requests[f"GET {folder}/config.json"] == 1
    assert hub.requests["GET config.json"] == 0


def test_mirror_redirects_to_hub(
    hub: Hub, vision_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token is sent to the mirror and to the Hub only."""
    hub.repositories[NAME] = Repository(vision_folder, private=True, readers=("hf_token",))

    def respond(target: str, _: str | None) -> Answer:
        return Answer(308, {"Location": hub.url + target})

    mirror = Server(hub, respond, RESOLVE, "MIRROR ")
    point_client_at(mirror.url, monkeypatch)
    # stands in for huggingface.co, which is always trusted
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    assert load(NAME, cache_dir=cache, token="hf_token").config == SMALL
    assert {address for address, _ in hub.authorizations} == {mirror.url, hub.url}


def test_endpoint_with_path(
    hub: Hub, vision_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def respond(target: str, token: str | None) -> Answer:
        return hub.respond(target.removeprefix("/hub/hf"), token)

    mirror = Server(hub, respond, RESOLVE, "MIRROR ")
    endpoint = f"{mirror.url}/hub/hf"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    point_client_at(endpoint, monkeypatch)
    for source in (NAME, f"{endpoint}/{NAME}/tree/v1"):
        assert load(source, cache_dir=cache).config == SMALL


Headers = dict[str, str]


def weak_etags(headers: Headers) -> Headers:
    return {name: f"W/{headers[name]}" if is_etag(name) else headers[name] for name in headers}


def bare_etags(headers: Headers) -> Headers:
    return {name: headers[name].strip('"') if is_etag(name) else headers[name] for name in headers}


def no_sizes(headers: Headers) -> Headers:
    return {name: headers[name] for name in headers if name != "X-Linked-Size"}


def is_etag(name: str) -> bool:
    return "tag" in name.lower()


@pytest.mark.parametrize("change", [weak_etags, bare_etags, no_sizes])
def test_headers_changed_by_proxy(
    change: Callable[[Headers], Headers],
    hub: Hub,
    vision_folder: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    respond = hub.api.respond

    def respond_changed(target: str, authorization: str | None) -> Answer:
        answer = respond(target, authorization)
        answer.headers = change(answer.headers)
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(hub.api, "respond", respond_changed)
        assert load(NAME, cache_dir=cache).config == SMALL
    assert load(NAME, cache_dir=cache, local_files_only=True).config == SMALL


def test_head_not_allowed(hub: Hub, vision_folder: Path, cache: Path) -> None:
    hub.faults = [Fault("status", "HEAD *", times=None, status=405)]
    assert load(NAME, cache_dir=cache).config == SMALL

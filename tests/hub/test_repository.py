"""Loading from the Hub: the real `huggingface_hub` client against a Hub of our own on loopback."""

from __future__ import annotations

import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from siglip_port import CheckpointError, HubUnreachableError, SigLipVisionModel
from siglip_port.checkpoint import layouts as key_map
from siglip_port.hub.network_errors import harmless
from siglip_port.hub.repository import HubRepository, find_source, no_answer
from tests.helpers.checkpoints import SMALL, edit_tensors, shard
from tests.helpers.hub_server import RESOLVE, Answer, Fault, Hub, Repository, Server
from tests.helpers.network import silent_port

NAME = "google/siglip-small"


@pytest.fixture
def folder(hub: Hub, copied: Path) -> Path:
    """The folder of the repository that the Hub serves."""
    hub.repositories[NAME] = Repository(copied)
    return copied


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_a_hub_id_loads_and_is_pinned_to_its_commit(hub: Hub, folder: Path, cache: Path) -> None:
    model = SigLipVisionModel.from_hf(NAME, cache_dir=cache)
    local = SigLipVisionModel.from_hf(folder)
    assert all(torch.equal(t, local.state_dict()[name]) for name, t in model.state_dict().items())
    assert model.provenance is not None
    assert model.provenance.commit == hub.repositories[NAME].commit
    assert str(model.provenance).startswith(
        f"source   {NAME} at commit {hub.repositories[NAME].commit}\n"
    )
    assert {key: count for key, count in hub.requests.items() if key.startswith("HEAD")} == {
        f"HEAD {file}": 1
        for file in (
            "config.json",
            "model.safetensors",
            "processor_config.json",
            "preprocessor_config.json",
        )
    }


@pytest.mark.parametrize("in_shards", [False, True], ids=["one file", "shards"])
def test_what_is_cached_loads_without_the_hub(
    hub: Hub, folder: Path, cache: Path, in_shards: bool
) -> None:
    if in_shards:
        shard(folder)
    SigLipVisionModel.from_hf(NAME, cache_dir=cache)
    hub.requests.clear()
    model = SigLipVisionModel.from_hf(NAME, cache_dir=cache, local_files_only=True)
    assert model.config == SMALL
    assert not hub.requests


def test_what_is_not_cached_cannot_be_had_offline(hub: Hub, folder: Path, cache: Path) -> None:
    with pytest.raises(
        HubUnreachableError, match=r"config.json of 'google/siglip-small' is not in the local cache"
    ):
        SigLipVisionModel.from_hf(NAME, cache_dir=cache, local_files_only=True)
    (folder / "model.safetensors").rename(folder / "elsewhere")
    with pytest.raises(CheckpointError):
        SigLipVisionModel.from_hf(NAME, cache_dir=cache)  # caches config.json alone
    with pytest.raises(
        CheckpointError, match=r"holds neither model.safetensors nor"
    ):  # which the cache remembers
        SigLipVisionModel.from_hf(NAME, cache_dir=cache, local_files_only=True)
    from huggingface_hub import hf_hub_download

    other = cache.with_name("other")
    hf_hub_download(NAME, "config.json", cache_dir=other)
    with pytest.raises(
        HubUnreachableError, match=r"model.safetensors of 'google/siglip-small' is not in the local"
    ):
        SigLipVisionModel.from_hf(NAME, cache_dir=other, local_files_only=True)


def test_open_clip_repositories_load_offline(hub: Hub, folder: Path, cache: Path) -> None:
    """They have no config.json, which the cache remembers, or may not know of at all."""
    (folder / "config.json").rename(folder / "open_clip_config.json")
    (folder / "model.safetensors").rename(folder / "open_clip_model.safetensors")
    model = SigLipVisionModel.from_hf(NAME, cache_dir=cache)
    hub.faults = [Fault("status", status=501, times=None)]
    again = SigLipVisionModel.from_hf(NAME, cache_dir=cache, local_files_only=True)
    assert again.config == model.config == SMALL
    for marker in cache.rglob(".no_exist"):
        shutil.rmtree(marker)
    assert SigLipVisionModel.from_hf(NAME, cache_dir=cache, local_files_only=True).config == SMALL


def test_revisions(hub: Hub, folder: Path, cache: Path) -> None:
    commit = hub.repositories[NAME].commit
    for revision in ("main", "v1", commit):
        model = SigLipVisionModel.from_hf(NAME, revision=revision, cache_dir=cache)
        assert model.provenance is not None
        assert model.provenance.commit == commit
    with pytest.raises(CheckpointError, match=r"'google/siglip-small' has no revision 'v9'"):
        SigLipVisionModel.from_hf(NAME, revision="v9", cache_dir=cache)


def test_a_push_between_two_files_mixes_nothing(
    hub: Hub, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After config.json has told the commit, the weights are asked of that commit, here gone, and not of `main`."""
    from siglip_port.checkpoint import json_files, reader
    from siglip_port.checkpoint.source import Source

    read = json_files.read_config

    def then_push(source: Source) -> object:
        config = read(source)
        edit_tensors(folder, lambda t: t)
        return config

    monkeypatch.setattr(reader, "read_config", then_push)
    with pytest.raises(CheckpointError, match="has no revision"):
        SigLipVisionModel.from_hf(NAME, cache_dir=cache)


def test_repositories_that_do_not_open(hub: Hub, folder: Path, cache: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"the Hub has no repository 'google/sigllp'.*pass token="
    ):
        SigLipVisionModel.from_hf("google/sigllp", cache_dir=cache)
    hub.repositories[NAME].gated = True
    with pytest.raises(
        CheckpointError, match=r"'google/siglip-small' is gated: ask for access at http"
    ):
        SigLipVisionModel.from_hf(NAME, cache_dir=cache)
    hub.faults = [Fault("status", status=501, times=None)]
    with pytest.raises(
        CheckpointError,
        match=r"the Hub refused config.json of 'google/siglip-small' \(HTTP 501\); try again",
    ):
        SigLipVisionModel.from_hf(NAME, cache_dir=cache)


def test_a_repository_without_safetensors_says_what_it_has(
    hub: Hub, folder: Path, cache: Path
) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError,
        match=r"found: config.json, .*pytorch_model.bin\. Pickled weights .* refused",
    ):
        SigLipVisionModel.from_hf(NAME, cache_dir=cache)
    assert hub.requests["GET pytorch_model.bin"] == 0
    with pytest.raises(
        CheckpointError, match=r"google/siglip-small at revision 'v1' holds neither"
    ):
        SigLipVisionModel.from_hf(NAME, cache_dir=cache, revision="v1")
    (folder / "config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"holds neither .* found: .*pytorch_model.bin\. Pickled"
    ):
        SigLipVisionModel.from_hf(NAME, cache_dir=cache.with_name("other"))


def test_a_local_path_asks_nothing_of_the_hub(hub: Hub, folder: Path) -> None:
    SigLipVisionModel.from_hf(folder)
    SigLipVisionModel.from_hf(folder / "model.safetensors", revision="main")
    assert not hub.requests


@pytest.mark.parametrize("method", ["HEAD", "CDN RANGE"])
def test_a_transfer_that_breaks_off(hub: Hub, folder: Path, cache: Path, method: str) -> None:
    hub.faults = [Fault("reset", f"{method} model.safetensors", times=None)]
    with pytest.raises(CheckpointError, match=r"model.safetensors of 'google/siglip-small'"):
        SigLipVisionModel.from_hf(NAME, cache_dir=cache)
    hub.faults.clear()
    assert SigLipVisionModel.from_hf(NAME, cache_dir=cache).config == SMALL


def test_whether_the_hub_answers(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    template = "HUGGINGFACE_CO_URL_TEMPLATE"
    assert no_answer(NAME) is None
    assert no_answer("google/absent") is None  # a refusal is an answer
    hub.faults = [Fault("status", status=501, times=None)]
    assert no_answer(NAME) == "HTTP 501"
    hub.faults.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in (no_answer(NAME) or "")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        constants,
        template,
        f"http://127.0.0.1:{silent_port()}/{{repo_id}}/{{revision}}/{{filename}}",
    )
    assert "no connection to 127.0.0.1" in (no_answer(NAME) or "")

    # A name lookup that hangs, as behind a firewall: no timeout of the client ends it.
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: released.wait())
    monkeypatch.setattr(constants, template, "http://hub.invalid/{repo_id}/{revision}/{filename}")
    assert "no answer within 0 seconds" in (no_answer(NAME, seconds=0.1) or "")
    assert not released.is_set()
    released.set()


# --- addresses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "revision", "weights"),
    [
        ("google/a", None, None),
        (" google/a\n", None, None),
        ("google/a/", None, None),
        ("google/a@v1", "v1", None),
        ("hf://google/a", None, None),
        ("hf://models/google/a@refs%2Fpr%2F1", "refs/pr/1", None),
        ("hf://google/a@v1/model.safetensors", "v1", "model.safetensors"),
        ("hf-hub:google/a", None, None),
        ("hf-hub:google/a@v1", "v1", None),
        ("https://huggingface.co/google/a", None, None),
        ("https://huggingface.co/google/a/", None, None),
        ("https://hf.co/google/a/tree/main", "main", None),
        ("https://huggingface.co/google/a/tree/refs%2Fpr%2F1", "refs/pr/1", None),
        ("https://huggingface.co/google/a/blob/v1/Model.safetensors", "v1", "Model.safetensors"),
        ("https://huggingface.co/google/a/resolve/main/a.npz?download=true", "main", "a.npz"),
        ("https://huggingface.co/google/a/blob/main/config.json", "main", None),
        ("huggingface.co/google/a", None, None),
        ("{hub}/google/a/tree/v1", "v1", None),
    ],
)
def test_what_names_a_repository(
    address: str, revision: str | None, weights: str | None, hub: Hub
) -> None:
    source = find_source(address.format(hub=hub.url))
    assert isinstance(source, HubRepository)
    assert (source.name, source.revision, source.weights) == ("google/a", revision, weights)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("models/google/a", "does not exist on this machine, and is no Hub id"),
        ("google/a/b", "does not exist on this machine"),
        ("google", "does not exist on this machine"),
        ("a\0b", "cannot be read|does not exist"),
        (
            "https://example.com/google/a?token=hf_secret",
            "https://example.com/google/a is an address of example.com, w",
        ),
        ("https://huggingface.co/datasets/google/a", "is one of the Hub's datasets, and no model"),
        ("hf://spaces/google/a", "is one of the Hub's spaces, and no model"),
        ("https://huggingface.co/google", "names no model of the Hub"),
        (
            "https://huggingface.co/google/a/blob/v1/README.md",
            r"names 'README.md'; pass the repository, or a \.safet",
        ),
        (
            "https://huggingface.co/google/a/blob/v1/a.bin",
            "names 'a.bin'; .*Pickled weights .* are refused",
        ),
        (
            "hf://google/a/sub/model.safetensors",
            "names 'sub/model.safetensors'; pass the repository",
        ),
        ("google/a@v2", "names the revision 'v2', and revision='v1': pass one"),
        ("ftp://huggingface.co/google/a", "does not exist on this machine"),
    ],
)
def test_what_names_none(address: str, message: str, hub: Hub) -> None:
    with pytest.raises(CheckpointError, match=message) as refused:
        find_source(address, revision="v1")
    assert "secret" not in str(refused.value)


def test_a_file_of_a_repository(hub: Hub, folder: Path, cache: Path) -> None:
    (folder / "model.safetensors").rename(folder / "Model.safetensors")
    model = SigLipVisionModel.from_hf(
        f"https://huggingface.co/{NAME}/blob/main/Model.safetensors", cache_dir=cache
    )
    assert model.config == SMALL
    assert model.provenance is not None
    assert model.provenance.source == NAME
    with pytest.raises(CheckpointError, match="has no revision 'v9'"):
        SigLipVisionModel.from_hf(f"{NAME}@v9", cache_dir=cache)


def test_an_archive_of_a_repository(hub: Hub, folder: Path, cache: Path) -> None:
    """Which is fetched whole."""
    model = SigLipVisionModel.from_hf(folder)
    layout = next(
        layout for layout in key_map.LAYOUTS if "big_vision" in layout.name and not layout.naflex
    )
    stored = layout.to_stored(model.state_dict(), 3, 2, layout.rules(True), "params/img/")
    np.savez(folder / "a.npz", **{name: tensor.numpy() for name, tensor in stored.items()})  # type: ignore[arg-type]
    for offline in (False, True):
        again = SigLipVisionModel.from_hf(
            f"hf://{NAME}/a.npz", config=SMALL, cache_dir=cache, local_files_only=offline
        ).state_dict()
        assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


# --- a Hub as others run it -----------------------------------------------------------------------


def test_a_repository_that_was_renamed(hub: Hub, folder: Path, cache: Path) -> None:
    """The Hub redirects from the old name to the new one.

    Within itself, by a relative or an absolute address.
    """
    for absolute in (False, True):
        with redirected(hub, lambda path: path.replace("old/name", NAME), absolute=absolute):
            assert (
                SigLipVisionModel.from_hf("old/name", cache_dir=cache / str(absolute)).config
                == SMALL
            )
        offline = SigLipVisionModel.from_hf(
            "old/name", cache_dir=cache / str(absolute), local_files_only=True
        )
        assert offline.config == SMALL


def test_small_files_by_the_way_of_the_hubs_own_cache(hub: Hub, folder: Path, cache: Path) -> None:
    """`307 /api/resolve-cache/...`, as the Hub answers for what git holds itself."""
    commit = hub.repositories[NAME].commit

    def there(path: str) -> str:
        return (
            f"/api/resolve-cache/models/{NAME}/{commit}/{path.rsplit('/', 1)[1]}"
            if path.endswith("json")
            else path
        )

    with redirected(hub, there):
        assert SigLipVisionModel.from_hf(NAME, cache_dir=cache).config == SMALL
    assert hub.requests[f"GET api/resolve-cache/models/{NAME}/{commit}/config.json"] == 1
    assert hub.requests["GET config.json"] == 0


def test_a_mirror_that_redirects_to_the_hub_it_mirrors(
    hub: Hub, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token goes with it; and to no other host."""
    from huggingface_hub import constants

    hub.repositories[NAME] = Repository(folder, private=True, readers=("hf_token",))
    mirror = Server(
        hub, lambda target, _: Answer(308, {"Location": hub.url + target}), RESOLVE, "MIRROR "
    )
    template = "HUGGINGFACE_CO_URL_TEMPLATE"
    monkeypatch.setattr(
        constants, template, f"{mirror.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(
        constants, "ENDPOINT", hub.url
    )  # in the place of huggingface.co, which is always known
    assert SigLipVisionModel.from_hf(NAME, cache_dir=cache, token="hf_token").config == SMALL
    assert {address for address, _ in hub.authorizations} == {mirror.url, hub.url}


def test_an_endpoint_with_a_path(
    hub: Hub, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    mirror = Server(
        hub,
        lambda target, token: hub.respond(target.removeprefix("/hub/hf"), token),
        RESOLVE,
        "MIRROR ",
    )
    monkeypatch.setattr(constants, "ENDPOINT", f"{mirror.url}/hub/hf")
    template = f"{mirror.url}/hub/hf/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    for source in (NAME, f"{mirror.url}/hub/hf/{NAME}/tree/v1"):
        assert SigLipVisionModel.from_hf(source, cache_dir=cache).config == SMALL


@pytest.mark.parametrize(
    "spoil",
    [
        lambda headers: {
            name: f"W/{value}" if "tag" in name.lower() else value
            for name, value in headers.items()
        },
        lambda headers: {
            name: value.strip('"') if "tag" in name.lower() else value
            for name, value in headers.items()
        },
        lambda headers: {name: value for name, value in headers.items() if name != "X-Linked-Size"},
    ],
    ids=["weak ETags", "bare ETags", "no sizes"],
)
def test_headers_as_proxies_leave_them(
    spoil: Callable[[dict[str, str]], dict[str, str]], hub: Hub, folder: Path, cache: Path
) -> None:
    respond = hub._hub.respond

    def spoiled(target: str, authorization: str | None) -> Answer:
        answer = respond(target, authorization)
        answer.headers = spoil(answer.headers)
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub._hub, "respond", spoiled)
        assert SigLipVisionModel.from_hf(NAME, cache_dir=cache).config == SMALL
    assert SigLipVisionModel.from_hf(NAME, cache_dir=cache, local_files_only=True).config == SMALL


def test_a_hub_that_answers_no_head(hub: Hub, folder: Path, cache: Path) -> None:
    hub.faults = [Fault("status", "HEAD *", times=None, status=405)]
    assert SigLipVisionModel.from_hf(NAME, cache_dir=cache).config == SMALL


def test_texts_without_secrets() -> None:
    token = "hf_" + "aB3" * 10
    text = f"GET https://user:word@cdn.hf.co/a/b?X-Amz-Signature=1&Expires=2 failed\n for Bearer hf_x, {token} in hf_xet"
    assert harmless(text) == "GET https://cdn.hf.co/a/b failed for Bearer ... ... in hf_xet"
    assert len(harmless("x " * 1000)) < 500


@contextmanager
def redirected(hub: Hub, there: Callable[[str], str], *, absolute: bool = False) -> Iterator[None]:
    """Makes the Hub redirect to other places of itself.

    At a place of its cache it answers as at the file's own.
    """
    respond = hub._hub.respond

    def redirect(target: str, authorization: str | None) -> Answer:
        path = target.partition("?")[0]
        if cached := re.fullmatch(r"/api/resolve-cache/models/(.+/.+)/(.+)/(.+)", path):
            return respond("/{}/resolve/{}/{}".format(*cached.groups()), authorization)
        if (place := there(path)) != path:
            return Answer(307, {"Location": (hub.url if absolute else "") + place})
        return respond(target, authorization)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub._hub, "respond", redirect)
        yield

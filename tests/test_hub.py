"""Loading from the Hub: the real `huggingface_hub` client against a Hub of our own on loopback."""

from __future__ import annotations

import shutil
import socket
import threading
from pathlib import Path

import pytest
import torch

from siglip_port import CheckpointError, HubUnreachableError, SigLipVisionModel
from siglip_port.hub import hub_answers
from tests.conftest import SMALL, edit_tensors, shard
from tests.hub_server import Fault, Hub, Repository

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
    assert str(model.provenance).startswith(f"source   {NAME} at commit {hub.repositories[NAME].commit}\n")
    assert {key: count for key, count in hub.requests.items() if key.startswith("HEAD")} == {
        f"HEAD {file}": 1
        for file in ("config.json", "model.safetensors", "processor_config.json", "preprocessor_config.json")
    }


@pytest.mark.parametrize("in_shards", [False, True], ids=["one file", "shards"])
def test_what_is_cached_loads_without_the_hub(hub: Hub, folder: Path, cache: Path, in_shards: bool) -> None:
    if in_shards:
        shard(folder)
    SigLipVisionModel.from_hf(NAME, cache_dir=cache)
    hub.requests.clear()
    model = SigLipVisionModel.from_hf(NAME, cache_dir=cache, local_files_only=True)
    assert model.config == SMALL
    assert not hub.requests


def test_what_is_not_cached_cannot_be_had_offline(hub: Hub, folder: Path, cache: Path) -> None:
    with pytest.raises(HubUnreachableError, match=r"config.json of 'google/siglip-small' is not in the local cache"):
        SigLipVisionModel.from_hf(NAME, cache_dir=cache, local_files_only=True)
    (folder / "model.safetensors").rename(folder / "elsewhere")
    with pytest.raises(CheckpointError):
        SigLipVisionModel.from_hf(NAME, cache_dir=cache)  # caches config.json alone
    with pytest.raises(CheckpointError, match=r"holds neither model.safetensors nor"):  # which the cache remembers
        SigLipVisionModel.from_hf(NAME, cache_dir=cache, local_files_only=True)
    from huggingface_hub import hf_hub_download

    other = cache.with_name("other")
    hf_hub_download(NAME, "config.json", cache_dir=other)
    with pytest.raises(HubUnreachableError, match=r"model.safetensors of 'google/siglip-small' is not in the local"):
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
    import siglip_port.checkpoint as checkpoints

    read = checkpoints.read_contents

    def then_push(source: checkpoints.Source) -> object:
        config = read(source)
        edit_tensors(folder, lambda t: t)
        return config

    monkeypatch.setattr(checkpoints, "read_contents", then_push)
    with pytest.raises(CheckpointError, match="has no revision"):
        SigLipVisionModel.from_hf(NAME, cache_dir=cache)


def test_repositories_that_do_not_open(hub: Hub, folder: Path, cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the Hub has no repository 'google/sigllp'.*pass token="):
        SigLipVisionModel.from_hf("google/sigllp", cache_dir=cache)
    hub.repositories[NAME].gated = True
    with pytest.raises(CheckpointError, match=r"'google/siglip-small' is gated: ask for access at http"):
        SigLipVisionModel.from_hf(NAME, cache_dir=cache)
    hub.faults = [Fault("status", status=501, times=None)]
    with pytest.raises(
        CheckpointError, match=r"the Hub refused config.json of 'google/siglip-small' \(HTTP 501\); try again"
    ):
        SigLipVisionModel.from_hf(NAME, cache_dir=cache)


def test_a_repository_without_safetensors_says_what_it_has(hub: Hub, folder: Path, cache: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"found: config.json, .*pytorch_model.bin\. Pickled weights .* refused"):
        SigLipVisionModel.from_hf(NAME, cache_dir=cache)
    assert hub.requests["GET pytorch_model.bin"] == 0
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds neither .* found: .*pytorch_model.bin\. Pickled"):
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
    assert hub_answers(NAME)
    assert hub_answers("google/absent")  # a refusal is an answer
    hub.faults = [Fault("status", status=501, times=None)]
    assert not hub_answers(NAME)
    hub.faults.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub_answers(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, template, f"http://127.0.0.1:{silent_port()}/{{repo_id}}/{{revision}}/{{filename}}")
    assert not hub_answers(NAME)

    # A name lookup that hangs, as behind a firewall: no timeout of the client ends it.
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: released.wait())
    monkeypatch.setattr(constants, template, "http://hub.invalid/{repo_id}/{revision}/{filename}")
    assert not hub_answers(NAME, seconds=0.1)
    assert not released.is_set()
    released.set()


def silent_port() -> int:
    """A port at which nobody listens."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port: int = closed.getsockname()[1]
        return port

"""Only the tower is fetched from the Hub, once, and kept.

Through the real client, against a Hub of our own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from siglip_port import CheckpointError, HubUnreachableError, SigLipVisionModel
from siglip_port.checkpoint import layouts as key_map
from siglip_port.checkpoint.inspect import inspect_checkpoint
from siglip_port.checkpoint.key_rules import Layout
from siglip_port.hub import http_range as ranges
from siglip_port.hub import partial_download as towers
from siglip_port.hub.repository import find_source
from siglip_port.parity.stress_weights import randomise
from tests.helpers.checkpoints import ODD, SMALL, edit_tensors, shard
from tests.helpers.hub_cache import (
    BALLAST,
    NAME,
    WEIGHTS,
    assert_same,
    kept,
    start,
    wait_for,
)
from tests.helpers.hub_server import Fault, Hub, Repository

load = SigLipVisionModel.from_hf


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asks for so little at once that even a small tower takes many requests."""
    monkeypatch.setattr(towers, "PIECE", 4096)


def size_of_tower(folder: Path) -> int:
    tensors = load_file(folder / "model.safetensors").items()
    return sum(tensor.nbytes for name, tensor in tensors if not name.startswith("text_model."))


# --- the bytes that are needed --------------------------------------------------------------------


def test_of_a_whole_model_only_the_tower_is_fetched(hub: Hub, folder: Path, cache: Path) -> None:
    model = load(NAME, cache_dir=cache)
    assert_same(model, folder)
    header = 65_536  # of the header, what is asked for at once
    assert hub.sent["model.safetensors"] == header + size_of_tower(folder)
    assert hub.requests["GET model.safetensors"] == 0
    assert 2 <= hub.most_at_once <= towers.AT_ONCE
    assert model.provenance is not None
    whole = (folder / "model.safetensors").stat().st_size
    assert (model.provenance.bytes_read, model.provenance.bytes_whole) == (
        size_of_tower(folder),
        whole,
    )
    assert f"read     {size_of_tower(folder) / 1e3:.2f} of {whole / 1e3:.2f} kB, 64 tensors" in str(
        model.provenance
    )
    (path,) = kept(cache)
    assert model.provenance.files == (path,)
    assert load_file(path).keys() == {
        n for n in load_file(folder / "model.safetensors") if n.startswith("vision")
    }
    assert not kept(cache, "*.incomplete")
    assert not kept(cache, "*.journal")


def test_once_fetched_it_is_not_fetched_again(hub: Hub, folder: Path, cache: Path) -> None:
    load(NAME, cache_dir=cache)
    hub.requests.clear()
    model = load(NAME, cache_dir=cache)
    assert_same(model, folder)
    assert set(hub.requests) == {"HEAD config.json"}  # whether `main` has moved


@pytest.mark.parametrize("layout", key_map.LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("in_shards", [False, True], ids=["one file", "shards"])
def test_every_layout(
    layout: Layout, in_shards: bool, hub: Hub, cache: Path, tmp_path: Path
) -> None:
    config = replace(ODD, pooling_head=bool(layout.head), naflex=layout.naflex, image_size=42)
    original = SigLipVisionModel(config)
    randomise(original)
    sep = "/" if "big_vision" in layout.name else "."
    rows = layout.rules(config.pooling_head)
    stored = layout.to_stored(
        original.state_dict(), 11, config.num_attention_heads, rows, f"some{sep}where{sep}"
    )
    ballast = {
        f"some{sep}thing{sep}{i}": torch.ones(400_000) for i in range(3)
    }  # 4.8 MB, the tower has 2.7
    served = tmp_path / "served"
    served.mkdir()
    save_file(
        {n: t.contiguous() for n, t in (stored | ballast).items()}, served / "model.safetensors"
    )
    if in_shards:
        shard(served)
    hub.repositories[NAME] = Repository(served)
    model = load(NAME, cache_dir=cache, config=config)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in original.state_dict().items())
    files = {name: sent for name, sent in hub.sent.items() if name.endswith(".safetensors")}
    tower = sum(tensor.nbytes for tensor in stored.values())
    assert sum(files.values()) <= tower + len(files) * 65_536
    assert not [
        request
        for request in hub.requests
        if request.startswith("GET model") and ".json" not in request
    ]
    assert len(kept(cache)) == 1
    hub.repositories.clear()
    again = load(NAME, cache_dir=cache, config=config, local_files_only=True)
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in original.state_dict().items())


def test_shards_without_a_tensor_of_the_tower_are_not_touched(
    hub: Hub, folder: Path, cache: Path
) -> None:
    edit_tensors(folder, lambda t: {**t, "text_model.other": torch.ones(5)})
    tensors = load_file(folder / "model.safetensors")
    rest = [name for name in tensors if not name.startswith("vision")]
    shard(folder)  # the tower's tensors are in all three; now a fourth, without any
    import json

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    save_file(
        {name: tensors[name] for name in rest},
        folder / "model-00004-of-00004.safetensors",
        {"format": "pt"},
    )
    for number in (1, 2, 3):
        edit_tensors(
            folder,
            lambda t: (
                {name: tensor for name, tensor in t.items() if name not in rest}
                | {"x": torch.ones(BALLAST)}
            ),
            f"model-0000{number}-of-00003.safetensors",
        )
        index["weight_map"]["x"] = f"model-0000{number}-of-00003.safetensors"
    index["weight_map"] |= dict.fromkeys(rest, "model-00004-of-00004.safetensors")
    for number in (1, 2):
        edit_tensors(
            folder,
            lambda t: {n: v for n, v in t.items() if n != "x"},
            f"model-0000{number}-of-00003.safetensors",
        )
    del index["weight_map"]["x"]
    edit_tensors(
        folder,
        lambda t: {n: v for n, v in t.items() if n != "x"},
        "model-00003-of-00003.safetensors",
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model = load(NAME, cache_dir=cache)
    assert model.config == SMALL
    assert not [request for request in hub.requests if "00004" in request]


@pytest.mark.parametrize("pooling_head", [None, False])
def test_what_is_left_out_is_not_fetched(
    pooling_head: bool | None, hub: Hub, folder: Path, cache: Path
) -> None:
    assert_same(
        load(NAME, cache_dir=cache, pooling_head=pooling_head), folder, pooling_head=pooling_head
    )
    head = sum(
        t.nbytes
        for n, t in load_file(folder / "model.safetensors").items()
        if n.startswith("vision_model.head")
    )
    left_out = 0 if pooling_head is None else head
    assert hub.sent["model.safetensors"] == 65_536 + size_of_tower(folder) - left_out


def test_a_header_longer_than_what_is_asked_for_at_first(
    hub: Hub, folder: Path, cache: Path
) -> None:
    edit_tensors(
        folder,
        lambda t: {**t, **{f"text_model.{'x' * 50}.{i}": torch.ones(1) for i in range(2000)}},
    )
    assert_same(load(NAME, cache_dir=cache), folder)
    with (folder / "model.safetensors").open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    assert header > 2 * 65_536
    assert hub.sent["model.safetensors"] == header + size_of_tower(folder)


def test_tensors_of_several_widths_begin_where_they_can_be_mapped(
    hub: Hub, folder: Path, cache: Path
) -> None:
    """An odd number of bfloat16 before a float32 would leave it at an address that torch refuses."""
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    edit_tensors(folder, lambda t: {n: v.to(dtypes[i % 3]) for i, (n, v) in enumerate(t.items())})
    assert_same(load(NAME, cache_dir=cache), folder)


def test_inspect_costs_kilobytes(hub: Hub, folder: Path, cache: Path) -> None:
    edit_tensors(folder, lambda t: {**t, "text_model.embeddings.weight": torch.ones(2_000_000)})
    found = inspect_checkpoint(find_source(NAME, cache_dir=cache))
    assert found.problem is None
    assert hub.sent["model.safetensors"] == 65_536
    assert sum(hub.sent.values()) < 70_000


# --- when the whole file is better ----------------------------------------------------------------


def test_on_demand(hub: Hub, folder: Path, cache: Path) -> None:
    assert_same(load(NAME, cache_dir=cache, vision_only=False), folder)
    assert hub.sent["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert not kept(cache)


def test_where_the_tower_is_most_of_it(hub: Hub, folder: Path, cache: Path) -> None:
    edit_tensors(folder, lambda t: {n: v for n, v in t.items() if n.startswith("vision")})
    assert_same(load(NAME, cache_dir=cache), folder)
    assert (
        hub.sent["model.safetensors"] == 65_536 + (folder / "model.safetensors").stat().st_size
    )  # header, then all
    assert not kept(cache)


def test_where_it_is_cached_already(hub: Hub, folder: Path, cache: Path) -> None:
    load(NAME, cache_dir=cache, vision_only=False)
    hub.requests.clear()
    assert_same(load(NAME, cache_dir=cache), folder)
    assert set(hub.requests) == {"HEAD config.json"}


def test_where_there_are_no_ranges(hub: Hub, folder: Path, cache: Path) -> None:
    hub.ranges = False
    assert_same(load(NAME, cache_dir=cache), folder)
    assert hub.requests["CDN GET model.safetensors"] == 1
    whole = (folder / "model.safetensors").stat().st_size
    assert (
        hub.sent["model.safetensors"] <= whole + 2 * 2**18 + 2**20
    )  # what was under way when the client hung up


@pytest.mark.parametrize("kind", ["html", "gzip", "other range", "other size", "no etag"])
def test_where_a_proxy_spoils_ranges(kind: Any, hub: Hub, folder: Path, cache: Path) -> None:  # noqa: ANN401
    hub.faults = [
        Fault(kind, "* RANGE model.safetensors", times=None),
        Fault(kind, "CDN RANGE *", times=None),
    ]
    assert_same(load(NAME, cache_dir=cache), folder)


# --- offline, and pinned --------------------------------------------------------------------------


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing can open a connection, or even look up a name."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket")

    with monkeypatch.context() as patch:
        for name in ("connect", "connect_ex", "bind", "sendto"):
            patch.setattr(socket.socket, name, refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        yield


@pytest.mark.parametrize("vision_only", [True, False])
@pytest.mark.parametrize("how", ["local_files_only", "HF_HUB_OFFLINE", "the commit"])
def test_no_socket_is_opened(
    how: str,
    vision_only: bool,
    hub: Hub,
    folder: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    from huggingface_hub import constants

    commit = hub.repositories[NAME].commit
    load(NAME, cache_dir=cache, vision_only=vision_only)
    request.getfixturevalue("no_sockets")
    arguments: dict[str, Any] = {
        "local_files_only": {"local_files_only": True},
        "the commit": {"revision": commit},
    }
    if how == "HF_HUB_OFFLINE":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = load(NAME, cache_dir=cache, **arguments.get(how, {}))
    assert_same(model, folder)
    assert model.provenance is not None
    assert model.provenance.commit == commit
    assert (
        inspect_checkpoint(find_source(NAME, cache_dir=cache, **arguments.get(how, {}))).problem
        is None
    )


def test_a_push_that_leaves_the_weights_alone_costs_nothing(
    hub: Hub, folder: Path, cache: Path, tmp_path: Path
) -> None:
    load(NAME, cache_dir=cache)
    first = hub.repositories[NAME].commit
    pushed = tmp_path / "pushed"
    shutil.copytree(folder, pushed)
    (pushed / "README.md").write_text("new")
    hub.repositories[NAME].push(pushed)
    hub.sent.clear()
    hub.requests.clear()
    model = load(NAME, cache_dir=cache)
    assert model.provenance is not None
    assert model.provenance.commit == hub.repositories[NAME].commit != first
    assert hub.sent["model.safetensors"] == 65_536
    assert len(kept(cache)) == 1
    for revision in (first, "v1"):
        old = load(NAME, cache_dir=cache, revision=revision)
        assert old.provenance is not None
        assert old.provenance.commit == first


@pytest.mark.parametrize("moment", ["HEAD config.json", "HEAD model.safetensors", WEIGHTS])
def test_a_push_between_two_requests_mixes_nothing(
    moment: str, hub: Hub, folder: Path, cache: Path, tmp_path: Path
) -> None:
    pushed = tmp_path / "pushed"
    shutil.copytree(folder, pushed)
    edit_tensors(pushed, lambda t: {name: tensor + 1 for name, tensor in t.items()})
    first = hub.repositories[NAME].commit
    hub.after[moment] = lambda: hub.repositories[NAME].push(pushed)
    model = load(NAME, cache_dir=cache)
    assert model.provenance is not None
    assert_same(model, folder if model.provenance.commit == first else pushed)
    second = load(NAME, cache_dir=cache)
    assert_same(second, pushed)


def test_the_commit_is_in_everything_that_is_written(
    hub: Hub, folder: Path, cache: Path, tmp_path: Path
) -> None:
    model = load(NAME, cache_dir=cache)
    origin = f"{NAME}@{hub.repositories[NAME].commit}"
    assert model.provenance is not None
    assert model.provenance.origin == origin
    model.save_hf(tmp_path / "hf")
    hf = load(tmp_path / "hf")
    model.save_timm(tmp_path / "timm")
    hf.save_hf(tmp_path / "again")
    for written in ("hf", "timm", "again"):
        provenance = load(tmp_path / written).provenance
        assert provenance is not None
        assert provenance.origin == origin
        assert str(provenance).startswith(f"source   {tmp_path / written}, made from {origin}\n")
    edit_tensors(tmp_path / "hf", lambda t: t)  # written by somebody else
    provenance = load(tmp_path / "hf").provenance
    assert provenance is not None
    assert provenance.origin is None


# --- the cache ------------------------------------------------------------------------------------


def test_the_clients_own_tools_are_not_disturbed(hub: Hub, folder: Path, cache: Path) -> None:
    from huggingface_hub import hf_hub_download, scan_cache_dir

    load(NAME, cache_dir=cache)
    found = scan_cache_dir(cache)
    assert not found.warnings
    (repository,) = found.repos
    assert repository.repo_id == NAME
    hf_hub_download(NAME, "model.safetensors", cache_dir=cache)
    (revision,) = repository.revisions
    found.delete_revisions(revision.commit_hash).execute()
    assert not list(cache.rglob("*.safetensors"))  # a tower goes with its repository


def test_what_is_kept_of_a_commit_goes_with_it(
    hub: Hub, folder: Path, cache: Path, tmp_path: Path
) -> None:
    """`hf cache rm` knows nothing of what is kept here; the next load removes it."""
    from huggingface_hub import scan_cache_dir

    load(NAME, cache_dir=cache)
    first = hub.repositories[NAME].commit
    pushed = tmp_path / "pushed"
    shutil.copytree(folder, pushed)
    edit_tensors(pushed, lambda t: {name: tensor + 1 for name, tensor in t.items()})
    hub.repositories[NAME].push(pushed)
    load(NAME, cache_dir=cache)
    assert len(kept(cache)) == 2
    scan_cache_dir(cache).delete_revisions(first).execute()
    hub.sent.clear()
    assert_same(load(NAME, cache_dir=cache), pushed)
    assert not hub.sent
    assert len(kept(cache)) == 1
    assert [path.name for path in cache.rglob(".siglip_port/*") if path.is_dir()] == [
        hub.repositories[NAME].commit
    ]
    assert_same(
        load(NAME, cache_dir=cache, revision=first), folder
    )  # asked for again, it is fetched again


def damages(path: Path) -> Iterator[tuple[str, bytes]]:
    whole = path.read_bytes()
    for at in (
        0,
        3,
        20,
        200,
        whole.index(b"sha256") + 12,
        whole.index(b"}} ") + 1,
        len(whole) // 2,
        len(whole) - 1,
    ):
        yield f"byte {at}", whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    for size in (0, 7, 8, 1000, len(whole) - 1):
        yield f"cut to {size}", whole[:size]
    yield "longer", whole + b"\0"
    yield "zeros", bytes(len(whole))


def test_a_damaged_tower_is_noticed_and_fetched_again(hub: Hub, folder: Path, cache: Path) -> None:
    load(NAME, cache_dir=cache)
    (path,) = kept(cache)
    for damage, content in damages(path):
        path.write_bytes(content)
        with pytest.raises(
            CheckpointError,
            match=rf"{path.name} is damaged; it is fetched again when the Hub may be",
        ):
            load(NAME, cache_dir=cache, local_files_only=True)
        hub.sent.clear()
        assert_same(load(NAME, cache_dir=cache), folder)
        assert hub.sent["model.safetensors"] == size_of_tower(folder), damage
        load(NAME, cache_dir=cache, local_files_only=True)


def test_a_damaged_header_is_noticed_and_read_again(hub: Hub, folder: Path, cache: Path) -> None:
    load(NAME, cache_dir=cache)
    (path,) = cache.rglob("model.safetensors.header")
    whole = path.read_bytes()
    for content in (
        b"",
        whole[:-1],
        whole + b" ",
        whole.replace(b"layers.0", b"layers.1", 1),
        b"[]\n",
        b"{}\n{}",
    ):
        path.write_bytes(content)
        hub.sent.clear()
        assert_same(load(NAME, cache_dir=cache), folder)
        assert hub.sent["model.safetensors"] == 65_536
        assert path.read_bytes() == whole


@pytest.mark.parametrize("links", [True, False])
def test_a_whole_file_that_is_damaged_is_noticed_and_fetched_again(
    links: bool,
    hub: Hub,
    folder: Path,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", not links, raising=False)
    for vision_only in (False, True):
        shutil.rmtree(cache, ignore_errors=True)
        load(NAME, cache_dir=cache, vision_only=False)
        (path,) = cache.rglob("model.safetensors")
        whole = path.read_bytes()
        tower = range(whole.index(b"}}") + 2 + BALLAST, len(whole))
        assert len(tower) > 1000
        for damage in (
            whole[: tower[-1]],
            *(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in (9, tower[0])),
        ):
            path.resolve().write_bytes(damage)
            with pytest.raises(
                CheckpointError,
                match=rf"{path} is damaged; it is fetched again when the Hub may be asked",
            ):
                load(NAME, cache_dir=cache, local_files_only=True)
            caplog.clear()
            assert_same(load(NAME, cache_dir=cache, vision_only=vision_only), folder)
            assert (
                f"{path} is damaged, or was changed, since it was fetched from the Hub"
                in caplog.text
            )
            # The tower alone is fetched beside it; and nothing is deleted that somebody may have
            # made.
            assert path.read_bytes() == (damage if vision_only else whole)
            assert [aside.read_bytes() for aside in kept(cache, "*.damaged")] == (
                [] if vision_only else [damage]
            )


def test_a_whole_file_that_did_not_arrive_as_it_left(hub: Hub, folder: Path, cache: Path) -> None:
    for in_parts in (True, False):
        shutil.rmtree(cache, ignore_errors=True)
        hub.ranges = in_parts
        request = WEIGHTS if in_parts else "CDN GET model.safetensors"
        hub.faults = [Fault("wrong bytes", request, times=None, after=1000)]
        with pytest.raises(
            CheckpointError,
            match=r"did not arrive as it left: its hash should be .*have been removed",
        ):
            load(NAME, cache_dir=cache, vision_only=False)
        assert not list(cache.rglob("*.safetensors"))
        assert not [
            path for path in cache.rglob("*") if path.is_file() and path.stat().st_size > 10_000
        ]
        hub.faults = []
        assert_same(load(NAME, cache_dir=cache, vision_only=False), folder)
        shutil.rmtree(cache)
        hub.faults = [Fault("wrong bytes", request, after=1000)]
        assert_same(load(NAME, cache_dir=cache, vision_only=False), folder)  # fetched a second time


def test_a_configuration_that_has_changed_in_the_cache(hub: Hub, folder: Path, cache: Path) -> None:
    load(NAME, cache_dir=cache)
    (path,) = cache.rglob("config.json")
    path.write_text(path.read_text().replace("1e-06", "1e-05"))
    for offline in (True, False):
        with pytest.raises(
            CheckpointError,
            match=rf"{path} has changed since it was fetched from the Hub: delete it",
        ):
            load(NAME, cache_dir=cache, local_files_only=offline)
    path.resolve().unlink()
    path.unlink()
    assert_same(load(NAME, cache_dir=cache), folder)


def test_a_push_between_the_hash_and_the_file(
    hub: Hub, folder: Path, cache: Path, tmp_path: Path
) -> None:
    """`main` is asked for the hash; the file is asked of the commit that this told."""
    pushed = tmp_path / "pushed"
    shutil.copytree(folder, pushed)
    config = (folder / "config.json").read_text()
    (pushed / "config.json").write_text(config.replace("1e-06", "1e-05"))
    assert "1e-06" in config
    first = hub.repositories[NAME].commit
    hub.after["HEAD config.json"] = lambda: hub.repositories[NAME].push(pushed)
    model = load(NAME, cache_dir=cache)
    assert model.provenance is not None
    assert model.provenance.commit == first
    assert hub.repositories[NAME].commit != first
    assert hub.requests["GET config.json"] == 1
    assert_same(model, folder)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


BAD_CACHES: dict[
    str, tuple[str, Any, str | None]
] = {  # what is damaged, how, and what is said where it is not mended
    "no file behind the link": (
        "snapshots/*/config.json",
        lambda path: path.resolve().unlink(),
        None,
    ),
    "a link to itself": ("snapshots/*/config.json", as_loop, None),
    "a folder for a file": ("snapshots/*/config.json", as_folder, None),
    "a commit that is none": ("refs/main", lambda path: path.write_text("../../elsewhere"), None),
    "a commit that is no text": ("refs/main", lambda path: path.write_bytes(b"\xff\xfe"), None),
    "a folder for the commit": ("refs/main", as_folder, None),
    "a folder for the tower": (
        ".siglip_port/*.safetensors",
        as_folder,
        "Is a directory: '.*safetensors'",
    ),
    "a loop for the tower": (
        ".siglip_port/*.safetensors",
        as_loop,
        "Too many levels of symbolic links: '.*safetensors'",
    ),
    "a folder for the header": (".siglip_port/*/*.header", as_folder, None),
}


@pytest.mark.parametrize("case", BAD_CACHES)
def test_a_bad_cache(case: str, hub: Hub, folder: Path, cache: Path) -> None:
    """Mended where the Hub may be asked, or told with its place; offline, told or right."""
    pattern, damage, message = BAD_CACHES[case]
    load(NAME, cache_dir=cache)
    (path,) = cache.glob(f"models--*/{pattern}")
    damage(path)
    with contextlib.suppress(CheckpointError):
        assert_same(load(NAME, cache_dir=cache, local_files_only=True), folder)
    if message is None:
        assert_same(load(NAME, cache_dir=cache), folder)
    else:
        with pytest.raises(CheckpointError, match=message):
            load(NAME, cache_dir=cache)


# --- interruptions --------------------------------------------------------------------------------


def test_an_interrupted_download_continues(hub: Hub, folder: Path, cache: Path) -> None:
    hub.faults = [Fault("none", WEIGHTS, times=9), Fault("reset", WEIGHTS, times=None)]
    with pytest.raises(
        HubUnreachableError,
        match=r"model.safetensors of 'google/siglip-small' could not be fetched: no c",
    ):
        load(NAME, cache_dir=cache)
    assert not kept(cache)
    assert len(kept(cache, "*.incomplete")) == 1
    hub.reset()
    hub.repositories[NAME] = Repository(folder)
    assert_same(load(NAME, cache_dir=cache), folder)
    assert 0 < hub.sent["model.safetensors"] <= size_of_tower(folder) - 8 * 4096


def test_an_interrupted_download_of_a_whole_file_continues(
    hub: Hub, folder: Path, cache: Path
) -> None:
    size = (folder / "model.safetensors").stat().st_size
    hub.faults = [Fault("none", WEIGHTS, times=20), Fault("reset", WEIGHTS, times=None)]
    with pytest.raises(
        HubUnreachableError, match="could not be fetched: no connection to localhost"
    ):
        load(NAME, cache_dir=cache, vision_only=False)
    hub.reset()
    hub.repositories[NAME] = Repository(folder)
    assert_same(load(NAME, cache_dir=cache, vision_only=False), folder)
    assert 0 < hub.sent["model.safetensors"] <= size - (20 - towers.AT_ONCE) * 4096
    assert not kept(cache, "*.incomplete")


def test_a_connection_that_always_breaks_is_enough(
    hub: Hub, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as each attempt brings enough, there is another."""
    monkeypatch.setattr(ranges, "LEAST", 1000)
    hub.faults = [Fault("reset", WEIGHTS, times=None, after=1000)]
    assert_same(load(NAME, cache_dir=cache), folder)
    assert hub.sent["model.safetensors"] == 65_536 + size_of_tower(folder)


def test_a_connection_that_brings_next_to_nothing_is_given_up(
    hub: Hub, folder: Path, cache: Path
) -> None:
    hub.faults = [Fault("none", WEIGHTS), Fault("reset", WEIGHTS, times=None, after=10)]
    with pytest.raises(
        HubUnreachableError, match=r"could not be fetched: no connection to localhost"
    ):
        load(NAME, cache_dir=cache)
    assert hub.requests[WEIGHTS] <= 1 + towers.AT_ONCE * (len(ranges.WAITS) + 1)


def test_what_an_interrupted_download_has_left_is_not_believed(
    hub: Hub, folder: Path, cache: Path
) -> None:
    """Not on trust, that is: pieces are compared with what was noted when they arrived."""
    for damage in ("a byte", "cut", "the journal", "no journal", "an empty file"):
        shutil.rmtree(cache, ignore_errors=True)
        hub.faults = [
            Fault("none", WEIGHTS, times=9),
            Fault("status", WEIGHTS, times=None, status=503),
        ]
        with pytest.raises(HubUnreachableError, match="answers HTTP 503"):
            load(NAME, cache_dir=cache)
        (incomplete,), (journal,) = kept(cache, "*.incomplete"), kept(cache, "*.journal")
        content = incomplete.read_bytes()
        if damage == "a byte":
            incomplete.write_bytes(bytes(byte ^ 1 for byte in content))
        elif damage == "the journal":
            journal.write_text("0 0\n1\n\n-1 x\n99999 y\nabc\n2 " + "0" * 64)
        elif damage == "no journal":
            journal.unlink()
        else:
            incomplete.write_bytes(content[:1000] if damage == "cut" else b"")
        hub.faults = []
        hub.sent.clear()
        assert_same(load(NAME, cache_dir=cache), folder)
        assert hub.sent["model.safetensors"] == size_of_tower(folder), damage


@pytest.mark.parametrize("requests", [2, 7, 15])
def test_a_process_that_is_killed_loses_only_what_was_under_way(
    requests: int, hub: Hub, folder: Path, cache: Path
) -> None:
    hub.faults = [
        Fault("none", WEIGHTS, times=requests),
        Fault("stall", WEIGHTS, times=None, after=10),
    ]
    child = start(cache)
    wait_for(lambda: hub.requests[WEIGHTS] >= requests + towers.AT_ONCE)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert not kept(cache)
    hub.reset()
    hub.repositories[NAME] = Repository(folder)
    assert_same(load(NAME, cache_dir=cache), folder)
    pieces = requests - 1  # one of them was for the header
    assert hub.sent["model.safetensors"] <= size_of_tower(folder) - (pieces - towers.AT_ONCE) * 4096


def test_two_processes_at_once(hub: Hub, folder: Path, cache: Path) -> None:
    hub.faults = [Fault("slow", WEIGHTS, times=None, seconds=0.02)]
    children = [start(cache) for _ in range(3)]
    printed = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], printed
    assert len({out for out, _ in printed}) == 1
    assert len(kept(cache)) == 1
    assert not kept(cache, "*.incomplete")
    headers = hub.sent["model.safetensors"] - size_of_tower(folder)  # the tower once
    assert headers in (65_536, 2 * 65_536, 3 * 65_536)
    assert_same(load(NAME, cache_dir=cache, local_files_only=True), folder)


def test_threads_at_once(hub: Hub, folder: Path, cache: Path) -> None:
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


def test_two_processes_whose_locks_do_not_hold(
    hub: Hub, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on some network file systems: they write the same bytes to the same places."""
    import huggingface_hub.utils

    monkeypatch.setattr(
        huggingface_hub.utils, "WeakFileLock", lambda *_, **__: contextlib.nullcontext()
    )
    for _ in range(5):
        shutil.rmtree(cache, ignore_errors=True)
        test_threads_at_once(hub, folder, cache)
        assert_same(load(NAME, cache_dir=cache, local_files_only=True), folder)


def test_an_interrupt_ends_it_soon(hub: Hub, folder: Path, cache: Path) -> None:
    hub.faults = [Fault("none", WEIGHTS, times=5), Fault("slow", WEIGHTS, times=None, seconds=0.5)]
    child = start(cache)
    wait_for(lambda: hub.requests[WEIGHTS] >= 5 + towers.AT_ONCE)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=20)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert len(kept(cache, "*.incomplete")) == 1


# --- the disk -------------------------------------------------------------------------------------


def test_a_full_disk_is_told_before_anything_is_fetched(
    hub: Hub, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(NAME, cache_dir=cache, pooling_head=False)
    before = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    hub.sent.clear()
    usage = shutil.disk_usage(cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(
        CheckpointError, match=r"No space left on device: 0.00 GB are needed, 0.00 GB are free"
    ):
        load(NAME, cache_dir=cache)
    assert not hub.sent["model.safetensors"]
    assert (
        before.items()
        <= {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}.items()
    )


@pytest.mark.parametrize("number", ["ENOSPC", "EACCES", "EROFS", "EIO", "EDQUOT"])
@pytest.mark.parametrize("operation", ["mkdir", "open", "replace", "posix_fallocate"])
def test_a_disk_that_refuses(
    operation: str,
    number: str,
    hub: Hub,
    folder: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import errno

    code = getattr(errno, number)
    place: Any = os if operation == "posix_fallocate" else Path
    real = getattr(place, operation)

    def refuse(path: Any, *arguments: Any, **how: Any) -> Any:  # noqa: ANN401
        writes = operation != "open" or (arguments and arguments[0] != "rb")
        if isinstance(path, int) or (
            ".siglip_port" in str(path) and writes and "header" not in str(path)
        ):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *arguments, **how)

    with monkeypatch.context() as patch:
        patch.setattr(place, operation, refuse)
        if operation == "posix_fallocate" and number not in ("ENOSPC", "EDQUOT"):
            assert_same(
                load(NAME, cache_dir=cache), folder
            )  # a file system that cannot promise room
            return
        with pytest.raises(
            CheckpointError, match=rf"could not be fetched: \[Errno {code}\] {os.strerror(code)}"
        ):
            load(NAME, cache_dir=cache)
    assert not kept(cache)
    assert_same(load(NAME, cache_dir=cache), folder)

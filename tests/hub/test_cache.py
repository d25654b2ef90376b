"""Partial downloads in the Hub's cache, next to the files of the client and deleted with them."""

from __future__ import annotations

import contextlib
import pwd
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download, scan_cache_dir

from siglip_port import CheckpointError, SigLipVisionModel
from tests.helpers.checkpoints import edit_tensors
from tests.helpers.hub_cache import NAME, assert_same, own_files
from tests.helpers.hub_server import Hub

load = SigLipVisionModel.from_hf

pytestmark = pytest.mark.usefixtures("small_chunks")


def test_client_tools_work(hub: Hub, folder: Path, cache: Path) -> None:
    load(NAME, cache_dir=cache)
    scan = scan_cache_dir(cache)
    assert not scan.warnings
    (repository,) = scan.repos
    assert repository.repo_id == NAME
    hf_hub_download(NAME, "model.safetensors", cache_dir=cache)
    (revision,) = repository.revisions
    scan.delete_revisions(revision.commit_hash).execute()
    assert not list(cache.rglob("*.safetensors"))  # the vision encoder, too


def test_prune_after_deleted_revision(hub: Hub, folder: Path, cache: Path, tmp_path: Path) -> None:
    """`hf cache rm` of a commit leaves its partial download behind; the next load removes it."""
    load(NAME, cache_dir=cache)
    first = hub.repositories[NAME].commit
    pushed = Path(shutil.copytree(folder, tmp_path / "pushed"))
    edit_tensors(pushed, lambda t: {name: tensor + 1 for name, tensor in t.items()})
    hub.repositories[NAME].push(pushed)
    load(NAME, cache_dir=cache)
    assert len(own_files(cache)) == 2
    scan_cache_dir(cache).delete_revisions(first).execute()
    hub.sent.clear()
    assert_same(load(NAME, cache_dir=cache), pushed)
    assert not hub.sent
    assert len(own_files(cache)) == 1
    folders = [path.name for path in own_files(cache, "*") if path.is_dir()]
    assert folders == [hub.repositories[NAME].commit]
    # the deleted commit can be downloaded again
    assert_same(load(NAME, cache_dir=cache, revision=first), folder)


def test_user_without_home_folder(
    hub: Hub, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_account(user: int) -> None:
        raise KeyError(user)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", no_account)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "~/.cache/huggingface/hub")
    message = r"^the Hub's cache ~/.cache/.* needs a home folder, .*; set HF_HOME to a folder$"
    with pytest.raises(CheckpointError, match=message):
        load(NAME)
    assert_same(load(NAME, cache_dir=cache), folder)
    assert_same(load(folder), folder)


def test_read_only_cache(hub: Hub, folder: Path, cache: Path) -> None:
    load(NAME, cache_dir=cache)
    for path in [*cache.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert_same(load(NAME, cache_dir=cache, local_files_only=True), folder)
    finally:
        for path in [*cache.rglob("*")]:
            path.chmod(0o755)


# --- damaged caches -------------------------------------------------------------------------------


def replace_with_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_with_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


@dataclass(frozen=True)
class BadCache:
    """A file to damage, the damage, and the error message if it cannot be repaired."""

    pattern: str
    damage: Callable[[Path], object]
    message: str | None = None


CONFIG = "snapshots/*/config.json"
ENCODER = ".siglip_port/*.safetensors"
BAD_CACHES = {
    "broken link": BadCache(CONFIG, lambda path: path.resolve().unlink()),
    "link to itself": BadCache(CONFIG, replace_with_loop),
    "folder for file": BadCache(CONFIG, replace_with_folder),
    "invalid commit": BadCache("refs/main", lambda path: path.write_text("../../elsewhere")),
    "commit is not text": BadCache("refs/main", lambda path: path.write_bytes(b"\xff\xfe")),
    "folder for commit": BadCache("refs/main", replace_with_folder),
    "folder for encoder": BadCache(ENCODER, replace_with_folder, "Is a directory: '.*safetensors'"),
    "loop for encoder": BadCache(
        ENCODER, replace_with_loop, "Too many levels of symbolic links: '.*safetensors'"
    ),
    "folder for header": BadCache(".siglip_port/*/*.header", replace_with_folder),
}


@pytest.mark.parametrize("case", BAD_CACHES)
def test_bad_cache(case: str, hub: Hub, folder: Path, cache: Path) -> None:
    """Online, it is repaired, or the error names the path; offline, the load is right or fails."""
    bad_cache = BAD_CACHES[case]
    load(NAME, cache_dir=cache)
    (path,) = cache.glob(f"models--*/{bad_cache.pattern}")
    bad_cache.damage(path)
    with contextlib.suppress(CheckpointError):
        assert_same(load(NAME, cache_dir=cache, local_files_only=True), folder)
    if bad_cache.message is None:
        assert_same(load(NAME, cache_dir=cache), folder)
    else:
        with pytest.raises(CheckpointError, match=bad_cache.message):
            load(NAME, cache_dir=cache)

"""Full and read-only disks: cached files still load, and no partial file is left behind."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import hf_hub_download

from siglip_port import CheckpointError, SigLipVisionModel
from tests.helpers.checkpoints import edit_tensors
from tests.helpers.hub_cache import NAME, WEIGHTS, assert_same, own_files, read_files
from tests.helpers.hub_server import Hub
from tests.helpers.load_process import ForkedProcess, load_in_chunks
from tests.helpers.refused_writes import refused_operation, unwritable
from tests.helpers.sweeps import sample, sweep

load = SigLipVisionModel.from_hf


@pytest.mark.usefixtures("small_chunks")
def test_full_disk_before_download(
    hub: Hub, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is raised before the download."""
    load(NAME, cache_dir=cache, pooling_head=False)
    before = read_files(cache)
    hub.sent.clear()
    usage = shutil.disk_usage(cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    message = r"No space left on device: 0.00 GB needed, 0.00 GB free"
    with pytest.raises(CheckpointError, match=message):
        load(NAME, cache_dir=cache)
    assert not hub.sent["model.safetensors"]
    assert before.items() <= read_files(cache).items()


@pytest.mark.parametrize("max_bytes", [100, pytest.param(20_000, marks=pytest.mark.slow)])
def test_disk_fills_up(max_bytes: int, hub: Hub, folder: Path, cache: Path) -> None:
    """The kernel limits the file size to `max_bytes`."""
    child = ForkedProcess(load_in_chunks, NAME, cache, max_bytes)
    _, printed = child.wait()
    assert "CheckpointError" in printed
    assert re.search(rf"{NAME}: cannot download .*: \[Errno 27\] File too large", printed), printed
    assert not own_files(cache)
    assert_same(load(NAME, cache_dir=cache), folder)
    assert hub.requests[WEIGHTS] > 1


OPERATIONS = ("mkdir", "open", "replace", "posix_fallocate")
CODES = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO, errno.EDQUOT)
REFUSALS = [(operation, code) for operation in OPERATIONS for code in CODES]


@sweep
@pytest.mark.usefixtures("small_chunks")
def test_refused_operation(is_full: bool, hub: Hub, folder: Path, tmp_path: Path) -> None:
    for operation, code in REFUSALS if is_full else sample(REFUSALS, 3):
        cache = tmp_path / f"{operation} {code}"
        # as on a file system that cannot allocate in advance
        is_harmless = operation == "posix_fallocate" and code not in (errno.ENOSPC, errno.EDQUOT)
        with refused_operation(operation, code):
            if is_harmless:
                assert_same(load(NAME, cache_dir=cache), folder)
                continue
            message = rf"cannot download .*: \[Errno {code}\] {os.strerror(code)}"
            with pytest.raises(CheckpointError, match=message):
                load(NAME, cache_dir=cache)
        assert not own_files(cache)
        assert_same(load(NAME, cache_dir=cache), folder)


@pytest.mark.usefixtures("links")
@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_unwritable_cache(
    code: int, hub: Hub, private_folder: Path, cache: Path, token: str
) -> None:
    """Cached files load, and missing configurations are downloaded to a temporary folder."""
    options: dict[str, Any] = {"cache_dir": cache, "token": token}
    (private_folder / "preprocessor_config.json").write_text('{"image_mean": [0.25, 0.25, 0.25]}')
    for path in sorted(private_folder.iterdir()):
        if path.name != "preprocessor_config.json":
            hf_hub_download(NAME, path.name, **options)
    before = read_files(cache)
    with unwritable(cache, code):
        model = load(NAME, **options)
    assert_same(model, private_folder)
    assert model.preprocessor_config == load(private_folder).preprocessor_config
    assert model.preprocessor_config["image_mean"] == [0.25] * 3  # from the temporary folder
    assert read_files(cache) == before


@pytest.mark.usefixtures("links")
@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_unwritable_empty_cache(
    code: int, hub: Hub, private_folder: Path, cache: Path, token: str
) -> None:
    """Weights cannot be stored."""
    cache.mkdir()
    message = rf"\[Errno {code}\] {os.strerror(code)}"
    with unwritable(cache, code), pytest.raises(CheckpointError, match=message):
        load(NAME, cache_dir=cache, token=token)
    assert not read_files(cache)


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC])
def test_newer_commit_cannot_be_stored(
    code: int, hub: Hub, private_folder: Path, cache: Path, tmp_path: Path, token: str
) -> None:
    """It loads if the weights are unchanged; else the error names the cached commit."""
    options: dict[str, Any] = {"cache_dir": cache, "token": token}
    load(NAME, **options)
    first = hub.repositories[NAME].commit
    readme = Path(shutil.copytree(private_folder, tmp_path / "readme"))
    (readme / "README.md").write_text("new")
    hub.repositories[NAME].push(readme)
    with unwritable(cache, code):
        assert_same(load(NAME, **options), private_folder)
    new = Path(shutil.copytree(private_folder, tmp_path / "new"))
    (weights,) = new.glob("*.safetensors")
    edit_tensors(new, lambda t: {name: tensor + 1 for name, tensor in t.items()}, weights.name)
    hub.repositories[NAME].push(new)
    message = rf"the cached commit {first} still loads with local_files_only=True"
    with unwritable(cache, code), pytest.raises(CheckpointError, match=message):
        load(NAME, **options)
    assert_same(load(NAME, **options, local_files_only=True), private_folder)
    assert_same(load(NAME, **options), new)

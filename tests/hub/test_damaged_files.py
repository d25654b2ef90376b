"""Files that are damaged in transit or in the cache are detected and downloaded again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from siglip_port import CheckpointError, SigLipVisionModel
from tests.helpers.hub_cache import (
    HEADER_BYTES,
    NAME,
    TEXT_MODEL_BYTES,
    WEIGHTS,
    assert_same,
    encoder_bytes,
    own_files,
)
from tests.helpers.hub_server import Fault, Hub
from tests.helpers.sweeps import sample_ends, sweep

load = SigLipVisionModel.from_hf

pytestmark = pytest.mark.usefixtures("small_chunks")

DAMAGED_OFFLINE = "damaged, and downloads are disabled by local_files_only=True"


def flip_bit(content: bytes, index: int) -> bytes:
    return content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :]


def damages(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Damaged copies of a vision encoder's file."""
    size = len(content)
    digest = content.index(b"sha256") + 12
    padding = content.index(b"}} ") + 1
    for index in (0, 3, 20, 200, digest, padding, size // 2, size - 1):
        yield f"byte {index}", flip_bit(content, index)
    for shorter in (0, 7, 8, 1000, size - 1):
        yield f"cut to {shorter}", content[:shorter]
    yield "longer", content + b"\0"
    yield "zeros", bytes(size)


@sweep
def test_damaged_vision_encoder(is_full: bool, hub: Hub, folder: Path, cache: Path) -> None:
    load(NAME, cache_dir=cache)
    (path,) = own_files(cache)
    cases = list(damages(path.read_bytes()))
    for damage, content in cases if is_full else sample_ends(cases, 4):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{path.name}: {DAMAGED_OFFLINE}"):
            load(NAME, cache_dir=cache, local_files_only=True)
        hub.sent.clear()
        assert_same(load(NAME, cache_dir=cache), folder)
        assert hub.sent["model.safetensors"] == encoder_bytes(folder), damage
        load(NAME, cache_dir=cache, local_files_only=True)


def test_damaged_header(hub: Hub, folder: Path, cache: Path) -> None:
    load(NAME, cache_dir=cache)
    (path,) = cache.rglob("model.safetensors.header")
    intact = path.read_bytes()
    other = intact.replace(b"layers.0", b"layers.1", 1)
    for content in (b"", intact[:-1], intact + b" ", other, b"[]\n", b"{}\n{}"):
        path.write_bytes(content)
        hub.sent.clear()
        assert_same(load(NAME, cache_dir=cache), folder)
        assert hub.sent["model.safetensors"] == HEADER_BYTES
        assert path.read_bytes() == intact


@sweep
@pytest.mark.usefixtures("links")
@pytest.mark.parametrize("vision_only", [False, True])
def test_damaged_whole_file(
    vision_only: bool,
    is_full: bool,
    hub: Hub,
    folder: Path,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The encoder is downloaded next to it; modified files are not deleted."""
    load(NAME, cache_dir=cache, vision_only=False)
    (path,) = cache.rglob("model.safetensors")
    intact = path.read_bytes()
    encoder = intact.index(b"}}") + 2 + TEXT_MODEL_BYTES
    assert len(intact) - encoder > 1000
    cases = (flip_bit(intact, encoder), intact[:-1], flip_bit(intact, 9))
    for content in cases if is_full else cases[:1]:
        path.resolve().write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{path}: {DAMAGED_OFFLINE}"):
            load(NAME, cache_dir=cache, local_files_only=True)
        caplog.clear()
        assert_same(load(NAME, cache_dir=cache, vision_only=vision_only), folder)
        message = f"{path}: damaged or modified after it was downloaded; downloading it again"
        assert message in caplog.text
        assert path.read_bytes() == (content if vision_only else intact)
        set_aside = [copy.read_bytes() for copy in own_files(cache, "*.damaged")]
        assert set_aside == ([] if vision_only else [content])


@pytest.mark.parametrize("in_parts", [True, False])
def test_whole_file_damaged_in_transit(in_parts: bool, hub: Hub, folder: Path, cache: Path) -> None:
    hub.ranges = in_parts
    request = WEIGHTS if in_parts else "CDN GET model.safetensors"
    hub.faults = [Fault("wrong bytes", request, times=None, after=1000)]
    message = r"model.safetensors was corrupted in transit: the [\d,]+ bytes received do not match"
    with pytest.raises(CheckpointError, match=message):
        load(NAME, cache_dir=cache, vision_only=False)
    assert not list(cache.rglob("*.safetensors"))
    sizes = [path.stat().st_size for path in cache.rglob("*") if path.is_file()]
    assert max(sizes) <= 10_000
    hub.faults = []
    assert_same(load(NAME, cache_dir=cache, vision_only=False), folder)
    shutil.rmtree(cache)
    hub.faults = [Fault("wrong bytes", request, after=1000)]
    assert_same(load(NAME, cache_dir=cache, vision_only=False), folder)  # downloaded a second time


def test_modified_config(hub: Hub, folder: Path, cache: Path) -> None:
    """A modified configuration is refused: the change may be intended."""
    load(NAME, cache_dir=cache)
    (path,) = cache.rglob("config.json")
    path.write_text(path.read_text().replace("1e-06", "1e-05"))
    for offline in (True, False):
        message = rf"{path}: modified after it was downloaded from the Hub; delete it"
        with pytest.raises(CheckpointError, match=message):
            load(NAME, cache_dir=cache, local_files_only=offline)
    path.resolve().unlink()
    path.unlink()
    assert_same(load(NAME, cache_dir=cache), folder)


@pytest.mark.parametrize("damage", ["byte", "cut", "empty", "journal", "no journal"])
def test_interrupted_download(damage: str, hub: Hub, folder: Path, cache: Path) -> None:
    """Chunks are compared with the journal."""
    hub.faults = [
        Fault("none", WEIGHTS, times=9),
        Fault("status", WEIGHTS, times=None, status=503),
    ]
    with pytest.raises(CheckpointError, match="returned HTTP 503"):
        load(NAME, cache_dir=cache)
    (incomplete,) = own_files(cache, "*.incomplete")
    (journal,) = own_files(cache, "*.journal")
    content = incomplete.read_bytes()
    if damage == "byte":
        incomplete.write_bytes(bytes(byte ^ 1 for byte in content))
    elif damage == "cut":
        incomplete.write_bytes(content[:1000])
    elif damage == "empty":
        incomplete.write_bytes(b"")
    elif damage == "journal":
        journal.write_text("0 0\n1\n\n-1 x\n99999 y\nabc\n2 " + "0" * 64)
    else:
        journal.unlink()
    hub.faults = []
    hub.sent.clear()
    assert_same(load(NAME, cache_dir=cache), folder)
    assert hub.sent["model.safetensors"] == encoder_bytes(folder)


def test_file_truncated_on_hub(hub: Hub, folder: Path, cache: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    message = (
        rf"^{NAME}: model.safetensors is not a valid safetensors file \(tensors end at byte \d+"
    )
    with pytest.raises(CheckpointError, match=message):
        load(NAME, cache_dir=cache)

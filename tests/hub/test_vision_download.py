"""Only the vision encoder of a whole model is downloaded, once, and cached."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from siglip_port import SigLipVisionModel
from siglip_port.checkpoint.inspect import inspect_checkpoint
from siglip_port.checkpoint.key_rules import Layout
from siglip_port.checkpoint.layouts import LAYOUTS
from siglip_port.hub import HubOptions, chunked_download, find_source
from siglip_port.parity.stress_weights import randomize
from tests.helpers.checkpoints import ODD, SMALL, edit_tensors, renaming, shard
from tests.helpers.hub_answers import Kind
from tests.helpers.hub_cache import (
    HEADER_BYTES,
    NAME,
    WEIGHTS,
    assert_same,
    encoder_bytes,
    own_files,
)
from tests.helpers.hub_server import Fault, Hub, Repository

load = SigLipVisionModel.from_hf

pytestmark = pytest.mark.usefixtures("small_chunks")


def test_only_vision_encoder_is_downloaded(hub: Hub, folder: Path, cache: Path) -> None:
    hub.faults = [Fault("none", WEIGHTS), Fault("stall", WEIGHTS, times=4, seconds=0.1)]
    model = load(NAME, cache_dir=cache)
    assert_same(model, folder)
    assert hub.sent["model.safetensors"] == HEADER_BYTES + encoder_bytes(folder)
    assert hub.requests["GET model.safetensors"] == 0
    assert 2 <= hub.max_concurrency <= chunked_download.MAX_CONCURRENCY
    (path,) = own_files(cache)
    stored = load_file(folder / "model.safetensors")
    assert load_file(path).keys() == {name for name in stored if name.startswith("vision")}
    assert not own_files(cache, "*.incomplete")
    assert not own_files(cache, "*.journal")


def test_provenance_of_vision_encoder(hub: Hub, folder: Path, cache: Path) -> None:
    provenance = load(NAME, cache_dir=cache).provenance
    assert provenance is not None
    read = encoder_bytes(folder)
    whole = (folder / "model.safetensors").stat().st_size
    assert (provenance.bytes_read, provenance.bytes_total) == (read, whole)
    line = f"read     {read / 1e3:.2f} of {whole / 1e3:.2f} kB, 64 tensors"
    assert line in str(provenance)
    assert provenance.files == tuple(own_files(cache))


def test_second_load_requests_commit_only(hub: Hub, folder: Path, cache: Path) -> None:
    load(NAME, cache_dir=cache)
    hub.requests.clear()
    assert_same(load(NAME, cache_dir=cache), folder)
    assert set(hub.requests) == {"HEAD config.json"}  # whether `main` has moved


@pytest.mark.parametrize("in_shards", [False, True], ids=["one file", "shards"])
def test_names_of_wrapped_modules(hub: Hub, folder: Path, cache: Path, in_shards: bool) -> None:
    """The downloaded parts have the names in the file."""
    expected = load(folder)
    edit_tensors(folder, renaming(r"^(.*)layers\.", r"_orig_mod.\1layers._orig_mod."))
    if in_shards:
        shard(folder)
    model = load(NAME, cache_dir=cache)
    assert_equal_tensors(model, expected)
    assert model.provenance is not None
    assert "names without _orig_mod" in model.provenance.layout
    assert_equal_tensors(load(NAME, cache_dir=cache, local_files_only=True), expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("in_shards", [False, True], ids=["one file", "shards"])
def test_every_layout(
    layout: Layout,
    in_shards: bool,
    hub: Hub,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunked_download, "CHUNK_BYTES", 1 << 19)
    config = replace(ODD, pooling_head=bool(layout.head), naflex=layout.naflex, image_size=42)
    original = SigLipVisionModel(config)
    randomize(original)
    separator = "/" if "big_vision" in layout.name else "."
    stored = layout.to_stored(
        original.state_dict(),
        11,
        config.num_attention_heads,
        layout.rules(config.pooling_head),
        f"some{separator}where{separator}",
    )
    # 4.8 MB; the encoder has 2.7
    other_tensors = {f"some{separator}thing{separator}{i}": torch.ones(400_000) for i in range(3)}
    tensors = {name: tensor.contiguous() for name, tensor in (stored | other_tensors).items()}
    served_folder = tmp_path / "served"
    served_folder.mkdir()
    save_file(tensors, served_folder / "model.safetensors")
    if in_shards:
        shard(served_folder)
    hub.repositories[NAME] = Repository(served_folder)
    # The configuration selects a layout whose shapes are those of another one.
    name = layout.name if layout.model_types else None
    model = load(NAME, cache_dir=cache, config=config, layout=name)
    assert_equal_tensors(model, original)
    bytes_by_file = {
        name: count for name, count in hub.sent.items() if name.endswith(".safetensors")
    }
    encoder = sum(tensor.nbytes for tensor in stored.values())
    assert sum(bytes_by_file.values()) <= encoder + len(bytes_by_file) * HEADER_BYTES
    whole_requests = [key for key in hub.requests if key.startswith("GET model")]
    assert not [key for key in whole_requests if ".json" not in key]
    assert len(own_files(cache)) == 1
    hub.repositories.clear()
    assert_equal_tensors(
        load(NAME, cache_dir=cache, config=config, layout=name, local_files_only=True), original
    )


def assert_equal_tensors(model: SigLipVisionModel, expected: SigLipVisionModel) -> None:
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.state_dict().items())


def test_shard_without_vision_is_not_downloaded(hub: Hub, folder: Path, cache: Path) -> None:
    """The encoder is in three shards, the text model in a fourth."""
    tensors = load_file(folder / "model.safetensors")
    text_model = {name: tensor for name, tensor in tensors.items() if name.startswith("text")}
    edit_tensors(folder, lambda t: {name: t[name] for name in t if name not in text_model})
    shard(folder)
    last = "model-00004-of-00004.safetensors"
    save_file(text_model, folder / last, {"format": "pt"})
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= dict.fromkeys(text_model, last)
    path.write_text(json.dumps(index))
    assert load(NAME, cache_dir=cache).config == SMALL
    assert not [key for key in hub.requests if "00004" in key]


@pytest.mark.parametrize("pooling_head", [None, False])
def test_pooling_head_is_downloaded_on_demand(
    pooling_head: bool | None, hub: Hub, folder: Path, cache: Path
) -> None:
    model = load(NAME, cache_dir=cache, pooling_head=pooling_head)
    assert_same(model, folder, pooling_head=pooling_head)
    tensors = load_file(folder / "model.safetensors").items()
    head = [tensor.nbytes for name, tensor in tensors if name.startswith("vision_model.head")]
    unread = 0 if pooling_head is None else sum(head)
    assert hub.sent["model.safetensors"] == HEADER_BYTES + encoder_bytes(folder) - unread


def test_long_header(hub: Hub, folder: Path, cache: Path) -> None:
    """The header is longer than the first request."""
    names = [f"text_model.{'x' * 50}.{i}" for i in range(2000)]
    edit_tensors(folder, lambda t: {**t, **{name: torch.ones(1) for name in names}})
    assert_same(load(NAME, cache_dir=cache), folder)
    with (folder / "model.safetensors").open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    assert header > 2 * HEADER_BYTES
    assert hub.sent["model.safetensors"] == header + encoder_bytes(folder)


def test_mixed_dtypes_are_aligned(hub: Hub, folder: Path, cache: Path) -> None:
    """An odd number of bfloat16 values before a float32 would misalign it."""
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    edit_tensors(
        folder,
        lambda t: {name: t[name].to(dtypes[i % 3]) for i, name in enumerate(t)},
    )
    assert_same(load(NAME, cache_dir=cache), folder)


def test_inspect_downloads_header_only(hub: Hub, folder: Path, cache: Path) -> None:
    edit_tensors(folder, lambda t: {**t, "text_model.embeddings.weight": torch.ones(2_000_000)})
    result = inspect_checkpoint(find_source(NAME, HubOptions(cache_dir=cache)))
    assert result.problem is None
    assert hub.sent["model.safetensors"] == HEADER_BYTES
    assert sum(hub.sent.values()) < 70_000


# --- whole files ----------------------------------------------------------------------------------


def test_vision_only_false(hub: Hub, folder: Path, cache: Path) -> None:
    assert_same(load(NAME, cache_dir=cache, vision_only=False), folder)
    assert hub.sent["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert not own_files(cache)


def test_file_is_mostly_vision(hub: Hub, folder: Path, cache: Path) -> None:
    edit_tensors(folder, lambda t: {name: t[name] for name in t if name.startswith("vision")})
    assert_same(load(NAME, cache_dir=cache), folder)
    size = (folder / "model.safetensors").stat().st_size
    assert hub.sent["model.safetensors"] == HEADER_BYTES + size  # the header, then all
    assert not own_files(cache)


def test_file_is_cached(hub: Hub, folder: Path, cache: Path) -> None:
    load(NAME, cache_dir=cache, vision_only=False)
    hub.requests.clear()
    assert_same(load(NAME, cache_dir=cache), folder)
    assert set(hub.requests) == {"HEAD config.json"}


def test_range_not_supported(hub: Hub, folder: Path, cache: Path) -> None:
    hub.ranges = False
    assert_same(load(NAME, cache_dir=cache), folder)
    assert hub.requests["CDN GET model.safetensors"] == 1
    whole = (folder / "model.safetensors").stat().st_size
    in_flight = 2 * 2**18 + 2**20  # sent before the client disconnected
    assert hub.sent["model.safetensors"] <= whole + in_flight


@pytest.mark.parametrize("kind", ["html", "gzip", "other range", "other size", "no etag"])
def test_range_changed_by_proxy(kind: Kind, hub: Hub, folder: Path, cache: Path) -> None:
    hub.faults = [
        Fault(kind, "* RANGE model.safetensors", times=None),
        Fault(kind, "CDN RANGE *", times=None),
    ]
    assert_same(load(NAME, cache_dir=cache), folder)


@pytest.mark.parametrize("uses", [1, 2, 5])
def test_signed_url_expires(uses: int, hub: Hub, folder: Path, cache: Path) -> None:
    hub.cdn_uses = uses
    assert_same(load(NAME, cache_dir=cache), folder)


def test_model_does_not_share_memory_with_cache(hub: Hub, folder: Path, cache: Path) -> None:
    """Changing the weights of a model does not change the cache."""
    model = load(NAME, cache_dir=cache)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(load(NAME, cache_dir=cache, local_files_only=True), folder)

"""Addresses that `find_source` accepts and rejects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from siglip_port import CheckpointError, SigLipVisionModel
from siglip_port.checkpoint.layouts import LAYOUTS
from siglip_port.hub import HubOptions, HubRepository, find_source
from siglip_port.hub.subfolder import Subfolder
from tests.helpers.checkpoints import SMALL
from tests.helpers.hub_cache import NAME
from tests.helpers.hub_server import Hub

load = SigLipVisionModel.from_hf


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
def test_address(address: str, revision: str | None, weights: str | None, hub: Hub) -> None:
    source = find_source(address.format(hub=hub.url))
    assert isinstance(source, HubRepository)
    assert source.name == "google/a"
    assert (source.options.revision, source.weights) == (revision, weights)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "models/google/a",
            "'models/google/a' is neither a local path nor a Hub id; pass a folder.*"
            "; if it is on the Hub, pass 'google/a'$",
        ),
        (
            "google/a/b/c",
            "is neither a local path nor a Hub id; .*; if it is a folder on the Hub, pass "
            "'google/a' with subfolder='b/c'$",
        ),
        ("google", "is neither a local path nor a Hub id"),
        ("a\0b", "cannot be read|neither a local path"),
        (
            "https://example.com/google/a?token=hf_secret",
            "https://example.com/google/a: example.com is not the Hub; pass a Hub id",
        ),
        (
            "https://huggingface.co/datasets/google/a",
            "one of the Hub's datasets, not a model; pass",
        ),
        ("hf://spaces/google/a", "spaces/google/a: this is one of the Hub's spaces, not a model"),
        ("https://huggingface.co/google", "/google: no model id in this address; pass a Hub id"),
        (
            "https://huggingface.co/google/a/blob/v1/README.md",
            r"v1/README.md: 'README.md' is not a weights file; pass the repository or a folder",
        ),
        (
            "https://huggingface.co/google/a/blob/v1/a.bin",
            "'a.bin' is not a weights file; .*pickled weights .* are not",
        ),
        (
            "hf://google/a/sub/..%2F..%2Fb",
            r"subfolder must be the relative path of a folder, .*, got 'sub/../../b'",
        ),
        (
            "google/a@v2",
            "google/a@v2: revision 'v2' in the address conflicts with revision='v1'; pass only",
        ),
        ("ftp://huggingface.co/google/a", "is neither a local path nor a Hub id"),
    ],
)
def test_invalid_address(address: str, message: str, hub: Hub) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        find_source(address, HubOptions(revision="v1"))
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("address", "subfolder", "weights"),
    [
        ("hf://google/a/encoder", "encoder", None),
        ("hf://google/a@v1/b/v1.0/", "b/v1.0", None),
        ("hf://google/a/encoder/config.json", "encoder", None),
        ("hf://google/a/b/c/a.safetensors", "b/c", "a.safetensors"),
        ("https://huggingface.co/google/a/tree/main/b/c.d", "b/c.d", None),
        ("https://huggingface.co/google/a/blob/main/b/a%20b.npz", "b", "a b.npz"),
        ("hf.co/google/a/resolve/main/b/config.json", "b", None),
    ],
)
def test_address_of_subfolder(address: str, subfolder: str, weights: str | None) -> None:
    for passed in (None, subfolder):
        source = find_source(address, subfolder=passed)
        assert isinstance(source, Subfolder)
        assert (source.name, source.subfolder, source.weights) == ("google/a", subfolder, weights)
    with pytest.raises(
        CheckpointError,
        match=f"folder '{subfolder}' in the address conflicts with subfolder='x'; pass only one",
    ):
        find_source(address, subfolder="x")


def test_address_of_file(hub: Hub, vision_folder: Path, cache: Path) -> None:
    (vision_folder / "model.safetensors").rename(vision_folder / "Model.safetensors")
    address = f"https://huggingface.co/{NAME}/blob/main/Model.safetensors"
    model = load(address, cache_dir=cache)
    assert model.config == SMALL
    assert model.provenance is not None
    assert model.provenance.source == f"hf://{NAME}/Model.safetensors"
    assert load(model.provenance.source, cache_dir=cache).config == SMALL


def test_revision_in_address(hub: Hub, vision_folder: Path, cache: Path) -> None:
    with pytest.raises(CheckpointError, match=f"^{NAME}@v9: no such revision on the Hub"):
        load(f"{NAME}@v9", cache_dir=cache)


def test_address_of_archive(hub: Hub, vision_folder: Path, cache: Path) -> None:
    """Archives are downloaded whole."""
    model = load(vision_folder)
    (layout,) = [layout for layout in LAYOUTS if layout.name == "big_vision"]
    stored = layout.to_stored(model.state_dict(), 3, 2, layout.rules(True), "params/img/")
    arrays = {name: tensor.numpy() for name, tensor in stored.items()}
    np.savez(vision_folder / "a.npz", **arrays)  # type: ignore[arg-type]
    for offline in (False, True):
        state = load(
            f"hf://{NAME}/a.npz", config=SMALL, cache_dir=cache, local_files_only=offline
        ).state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name])

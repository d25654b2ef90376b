"""The command line: what it prints, what it fetches, what it leaves behind, and how it exits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file

from siglip_port import SigLipVisionModel
from siglip_port.checkpoint import extract as extraction
from siglip_port.checkpoint import layouts as key_map
from siglip_port.checkpoint.formats import read_header
from siglip_port.checkpoint.registry import PUBLISHED
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.stress_weights import randomise
from tests.helpers.checkpoints import (
    ODD,
    SMALL,
    MakeCheckpoint,
    edit_config,
    edit_tensors,
    pixels,
    shard,
)
from tests.helpers.commands import run
from tests.helpers.flax import flax, write_npz
from tests.helpers.hub_server import Fault, Hub, Repository
from tests.helpers.other_libraries import timm_tower, write_two_towers
from tests.helpers.vision_language_models import build

load = SigLipVisionModel.from_hf

COMMAND = Path(sys.executable).with_name("siglip-port")
PARAMETERS = sum(tensor.numel() for tensor in SigLipVisionModel(SMALL).state_dict().values())


def inspect(*arguments: object, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("inspect", *arguments, "--json", code=code).stdout)
    return found


def entry(found: dict[str, Any], stored: str) -> dict[str, Any]:
    (only,) = (entry for entry in found["entries"] if entry["stored"] == stored)
    return dict(only)


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A whole SiglipModel."""
    write_two_towers(tmp_path / "full", transformers.SiglipModel)
    return tmp_path / "full"


# --- inspect --------------------------------------------------------------------------------------


def test_a_whole_model(full: Path) -> None:
    found = inspect(full)
    header = read_header(full / "model.safetensors").tensors
    assert found.keys() == {
        *("source", "commit", "files", "unread", "towers", "layout", "prefix", "title", "config"),
        *("tower", "whole", "entries", "dropped", "problem"),
    }
    assert (found["source"], found["commit"], found["problem"]) == (str(full), None, None)
    assert (found["files"], found["unread"]) == (["model.safetensors"], [])
    assert found["towers"] == [{"layout": "huggingface", "prefix": "vision_model."}]
    assert (found["layout"], found["prefix"]) == ("huggingface", "vision_model.")
    assert found["config"] == asdict(SMALL)
    assert found["tower"]["parameters"] == PARAMETERS
    assert found["tower"]["bytes"] == 4 * PARAMETERS
    assert found["whole"]["tensors"] == len(header)
    assert found["whole"]["bytes"] == sum(stored.nbytes for stored in header.values())
    assert found["dropped"].keys() == {"scale and bias of the image-text logits", "text tower"}
    assert sum(found["dropped"].values()) + found["tower"]["tensors"] == len(header)
    fc1 = entry(found, "vision_model.encoder.layers.{0...2}.mlp.fc1.weight")
    assert fc1 == {
        "ours": ["transformer.encoder.encoder_blocks.{0...2}.mlp.fc1.weight"],
        "stored": "vision_model.encoder.layers.{0...2}.mlp.fc1.weight",
        "form": "",
        "shape": [40, 24],
        "dtype": "F32",
        "nan": 0,
        "inf": 0,
    }
    assert len(entry(found, "vision_model.head.attention.in_proj_bias")["ours"]) == 3


def test_what_is_printed_is_whole_and_plain(full: Path) -> None:
    printed = run("inspect", full).stdout
    found = inspect(full)
    for one in found["entries"]:
        assert one["stored"] in printed
        assert all(name in printed for name in one["ours"])
        assert str(one["shape"]) in printed
    assert all(f"{name}={value!r}" in printed for name, value in asdict(SMALL).items())
    assert f"tower    {PARAMETERS:,} parameters, 90.7 kB\n" in printed
    assert "towers   --layout huggingface --prefix vision_model.\n" in printed
    count = found["dropped"]["text tower"]
    assert (
        f"dropped  2 of the scale and bias of the image-text logits; {count} of the text tower\n"
        in printed
    )
    assert "headers  fit the tower" in printed
    assert "\x1b" not in printed
    assert "…" not in printed
    assert not any(line.endswith(" ") for line in printed.splitlines())


def test_shards(full: Path) -> None:
    whole = inspect(full)
    shard(full)
    found = inspect(full)
    assert len(found["files"]) == 3
    assert {**found, "files": None} == {**whole, "files": None}


def test_shards_that_are_not_there(full: Path) -> None:
    """Where they hold nothing of the tower, they are not needed.

    Else all that is missing is named.
    """
    shard(full)
    index = full / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["text_model.extra"] = "elsewhere.safetensors"
    index.write_text(json.dumps(content))
    assert inspect(full)["unread"] == ["elsewhere.safetensors"]
    assert "kB, without elsewhere.safetensors\n" in run("inspect", full).stdout
    (full / "model-00001-of-00003.safetensors").unlink()
    found = inspect(full, code=1)
    assert found["problem"].startswith(
        f"{full} (layout: HuggingFace, prefix vision_model) does not hold the tower"
    )
    assert None in [one["dtype"] for one in found["entries"]]


def test_inside_a_vision_language_model(tmp_path: Path) -> None:
    whole, _ = build("paligemma")
    whole.save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert found["title"] == "HuggingFace, prefix " + found["prefix"].rstrip(".")
    assert "vision_tower" in found["prefix"]
    assert found["dropped"].keys() >= {"language model", "projector"}
    assert found["config"]["pooling_head"] is False
    assert found["tower"]["parameters"] < found["whole"]["parameters"]


def test_timm(tmp_path: Path) -> None:
    timm.models.save_for_hf(
        timm_tower("vit_base_patch16_siglip_224"), str(tmp_path), safe_serialization=True
    )
    found = inspect(tmp_path)
    assert (found["layout"], found["prefix"], found["title"]) == ("timm", "", "timm, no prefix")
    assert found["config"] == asdict(replace(ODD, hidden_act="gelu"))
    assert entry(found, "pos_embed")["form"] == "[1, position, out]"
    assert entry(found, "blocks.{0...10}.attn.qkv.weight")["ours"] == [
        f"transformer.encoder.encoder_blocks.{{0...10}}.self_attn.{name}_proj.weight"
        for name in "qkv"
    ]
    assert "towers   --layout timm --prefix ''\n" in run("inspect", tmp_path).stdout


@pytest.mark.parametrize("scanned", [False, True], ids=["indexed", "scanned"])
def test_npz(scanned: bool, tmp_path: Path) -> None:
    original = SigLipVisionModel(replace(ODD, image_size=42))
    write_npz(
        tmp_path / "a.npz",
        flax(original.config, original.state_dict(), scanned=scanned),
        "params/img/",
    )
    found = inspect(tmp_path / "a.npz")
    assert found["files"] == ["a.npz"]
    assert found["tower"]["parameters"] == sum(
        tensor.numel() for tensor in original.state_dict().values()
    )
    name = "encoderblock" if scanned else "encoderblock_{0...10}"
    query = entry(
        found, f"params/img/Transformer/{name}/MultiHeadDotProductAttention_0/query/kernel"
    )
    assert query["ours"] == ["transformer.encoder.encoder_blocks.{0...10}.self_attn.q_proj.weight"]
    assert query["form"] == ("blocks stacked, " if scanned else "") + "[in, head, out of head]"
    assert query["shape"] == ([11] if scanned else []) + [72, 4, 18]
    assert found["dropped"] == {"scale and bias of the image-text logits": 1, "text tower": 1}


def test_blocks_that_are_not_stored_alike_are_told_apart(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    name = "encoder.layers.1.mlp.fc1.bias"
    edit_tensors(folder, lambda tensors: {**tensors, name: tensors[name].half()})
    found = inspect(folder)
    assert entry(found, name)["dtype"] == "F16"
    assert entry(found, "encoder.layers.{0,2}.mlp.fc1.bias")["dtype"] == "F32"


def test_what_is_no_number_is_counted(checkpoint: MakeCheckpoint) -> None:
    """By tensor, and in the tower alone."""
    folder = checkpoint(prefix="vision_model.")
    assert "values   all finite\n" in run("inspect", folder).stdout
    fc1, norm = "vision_model.encoder.layers.{}.mlp.fc1.weight", "vision_model.post_layernorm.bias"

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for number in (0, 2):
            tensors[fc1.format(number)][1, :2] = torch.nan
        tensors[norm][:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
        return {**tensors, "text_model.w": torch.tensor(torch.nan)}

    edit_tensors(folder, spoil)
    found = inspect(folder)
    counts = {
        one["stored"]: (one["nan"], one["inf"])
        for one in found["entries"]
        if one["nan"] or one["inf"]
    }
    assert counts == {fc1.format("{0,2}"): (4, 0), norm: (1, 2)}
    assert entry(found, fc1.format(1))["nan"] == 0
    printed = run("inspect", folder).stdout
    assert (
        f"values   NaN or infinite in {fc1.format('{0,2}')}, {norm}: see the table below\n"
        in printed
    )
    assert "1 NaN, 2 infinite\n" in printed


@pytest.fixture
def several(checkpoint: MakeCheckpoint) -> Path:
    """Two towers in one file."""
    folder = checkpoint()
    edit_tensors(
        folder,
        lambda t: {f"{place}.{name}": tensor for place in "ab" for name, tensor in t.items()},
    )
    return folder


def test_several_towers_are_listed(several: Path) -> None:
    towers = [{"layout": "huggingface", "prefix": "a."}, {"layout": "huggingface", "prefix": "b."}]
    for command in (["inspect", several], ["extract", several, several / "out"]):
        done = run(*command, code=1)
        assert done.stdout == ""
        assert done.stderr == (
            "the checkpoint holds more than one vision tower; pass one of: "
            "--layout huggingface --prefix a.; --layout huggingface --prefix b.\n"
        )
    found = inspect(several, code=1)
    assert found.keys() == {"source", "commit", "towers", "problem"}
    assert found["towers"] == towers
    found = inspect(several, "--prefix", "b.")
    assert (found["prefix"], found["towers"]) == ("b.", towers)
    assert inspect(several, "--layout", "huggingface", "--prefix", "a.")["dropped"] == {
        "rest of the file": found["tower"]["tensors"]
    }


def test_a_tower_that_does_not_fit(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    edit_config(folder, intermediate_size=41)
    done = run("inspect", folder, code=1)
    assert "headers  do not fit the tower" in done.stdout
    assert "[40, 24]" in done.stdout
    assert "shape: expected [41, 24] by config.json, found [40, 24] (4):" in done.stderr
    assert inspect(folder, code=1)["problem"] == done.stderr.rstrip("\n")


def test_a_damaged_file(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    for more in ([], ["--json"]):
        done = run("inspect", folder, *more, code=1)
        assert done.stdout == ""
        assert "model.safetensors is not a whole safetensors file" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["inspect"], 2, "Missing argument"),
        (["inspect", "nowhere"], 1, "'nowhere' does not exist on this machine"),
        (
            ["inspect", "nowhere", "--layout", "x"],
            2,
            "'x' is none of huggingface, huggingface-naflex, ",
        ),
        (["extract", "nowhere", "out", "--dtype", "int8"], 2, "int8"),
        (["extract", "nowhere", "out", "--format", "jax"], 2, "jax"),
        (["nothing"], 2, "nothing"),
    ],
)
def test_what_cannot_be_done(arguments: list[str], code: int, says: str) -> None:
    done = run(*arguments, code=code)
    assert says in done.stderr
    assert done.stdout == ""


# --- inspect, of a repository on the Hub ----------------------------------------------------------


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The Hub's local cache, empty."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("more", "ranges"), [(0, 1), (3000, 2)], ids=["short header", "long header"]
)
def test_of_weights_on_the_hub_only_the_header_is_fetched(
    more: int, ranges: int, hub: Hub, full: Path, cached: Path
) -> None:
    text = {f"text_model.{i}": torch.zeros(1) for i in range(more)} | {
        "text_model.large": torch.zeros(1_000_000)
    }
    edit_tensors(full, lambda tensors: {**tensors, **text})
    hub.repositories["google/a"] = Repository(full)
    local, found = inspect(full), inspect("google/a")
    unread = [{**entry, "nan": None, "inf": None} for entry in local["entries"]]
    commit = hub.repositories["google/a"].commit
    assert found == {**local, "source": "google/a", "commit": commit, "entries": unread}
    assert "values   not read: only headers were\n" in run("inspect", "google/a").stdout
    assert hub.requests["CDN RANGE model.safetensors"] == ranges
    assert not {"GET model.safetensors", "CDN GET model.safetensors"} & hub.requests.keys()
    assert hub.sent["model.safetensors"] < 500_000
    assert not list(cached.rglob("model.safetensors"))


def test_shards_on_the_hub(hub: Hub, full: Path, cached: Path) -> None:
    shard(full)
    hub.repositories["google/a"] = Repository(full)
    found = inspect("google/a", "--revision", "v1")
    assert (found["problem"], found["unread"], len(found["files"])) == (None, [], 3)
    assert not [request for request in hub.requests if "GET model-" in request]
    assert (
        sum(
            count
            for request, count in hub.requests.items()
            if request.startswith("CDN RANGE model-")
        )
        == 3
    )
    (full / "model-00002-of-00003.safetensors").unlink()
    assert inspect("google/a", code=1)["unread"] == ["model-00002-of-00003.safetensors"]


def test_what_is_cached_is_not_asked_for_again(hub: Hub, full: Path, cached: Path) -> None:
    hub.repositories["google/a"] = Repository(full)
    assert (
        "config.json of 'google/a' is not in the local cache"
        in run("inspect", "google/a", "--offline", code=1).stderr
    )
    load("google/a")
    hub.requests.clear()
    online = inspect("google/a")
    assert not [
        request
        for request in hub.requests
        if "model.safetensors" in request and "HEAD" not in request
    ]
    hub.requests.clear()
    assert inspect("google/a", "--offline") == online
    assert not hub.requests


def test_a_repository_whose_weights_alone_tell_the_commit(
    hub: Hub, tmp_path: Path, cached: Path
) -> None:
    (tmp_path / "served").mkdir()
    layout, state = key_map.BIG_VISION, SigLipVisionModel(SMALL).state_dict()
    tensors = layout.to_stored(
        state, SMALL.num_encoder_blocks, SMALL.num_attention_heads, layout.rules(True)
    )
    save_file(
        {name: t.contiguous() for name, t in tensors.items()},
        tmp_path / "served" / "model.safetensors",
    )
    hub.repositories["google/a"] = Repository(tmp_path / "served")
    found = inspect("google/a")
    assert (found["commit"], found["layout"]) == (hub.repositories["google/a"].commit, "big_vision")
    assert found["config"] == asdict(SMALL)
    assert (
        hub.requests["HEAD model.safetensors"] == hub.requests["CDN RANGE model.safetensors"] == 1
    )


def test_a_damaged_file_on_the_hub(hub: Hub, full: Path, cached: Path) -> None:
    hub.repositories["google/a"] = Repository(full)
    weights = full / "model.safetensors"
    for content in (
        b"",
        b"version https://git-lfs.github.com/spec/v1",
        (9).to_bytes(8, "little") + b"no header",
    ):
        weights.write_bytes(content)
        assert (
            "model.safetensors of 'google/a' is not a whole safetensors"
            in run("inspect", "google/a", code=1).stderr
        )


def test_a_hub_that_does_not_answer(hub: Hub, full: Path, cached: Path) -> None:
    hub.repositories["google/a"] = Repository(full)
    hub.faults = [Fault("reset", "CDN RANGE model.safetensors", times=None)]
    assert (
        "model.safetensors of 'google/a' could not be fetched"
        in run("inspect", "google/a", code=1).stderr
    )
    assert "the Hub has no repository 'google/b'" in run("inspect", "google/b", code=1).stderr


# --- extract --------------------------------------------------------------------------------------


def test_extracted_for_transformers(full: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = run("extract", full, out).stdout
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    assert printed.startswith(str(load(full).provenance) + "\n")
    assert f"written  {out / 'config.json'} (" in printed
    assert "tokens [1, 4, 24] and vector [1, 24] of a picture of noise: the same bits\n" in printed
    assert out.stat().st_mode == full.stat().st_mode
    theirs, info = transformers.SiglipVisionModel.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    whole = transformers.SiglipModel.from_pretrained(full).eval()
    x = pixels(SMALL).float()
    with torch.no_grad():
        found, expected = theirs.eval()(x), whole.vision_model(x)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(found.pooler_output, expected.pooler_output)


def test_extracted_for_timm(full: Path, tmp_path: Path) -> None:
    run("extract", full, tmp_path / "out", "--format", "timm")
    tower: Any = timm.create_model(
        f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0
    ).eval()
    x = pixels(SMALL).float()
    with torch.no_grad():
        assert relative_error(load(full).embed(x), tower(x)) <= 1e-5
    assert "layout   timm, no prefix" in run("inspect", tmp_path / "out").stdout


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_extracted_in_another_dtype(dtype: str, full: Path, tmp_path: Path) -> None:
    run("extract", full, tmp_path / "out", "--dtype", dtype)
    expected = load(full, dtype=getattr(torch, dtype)).state_dict()
    assert all(
        torch.equal(tensor, expected[name])
        for name, tensor in load(tmp_path / "out").state_dict().items()
    )
    assert (
        inspect(tmp_path / "out")["tower"]["bytes"] == PARAMETERS * getattr(torch, dtype).itemsize
    )


@pytest.mark.parametrize("kind", ["timm-gap", "naflex", "npz", "idefics3"])
def test_other_towers(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    original = SigLipVisionModel(replace(ODD, naflex=kind == "naflex"))
    randomise(original)
    if kind == "timm-gap":
        timm.models.save_for_hf(
            timm_tower("vit_base_patch16_siglip_gap_224"), str(source), safe_serialization=True
        )
    elif kind == "idefics3":
        build("idefics3")[0].save_pretrained(source)
    elif kind == "naflex":
        original.save_timm(source)
    else:
        source = source / "a.npz"
        write_npz(
            source, flax(replace(ODD, image_size=42), original.state_dict(), scanned=True), "img/"
        )
    printed = run("extract", source, tmp_path / "out").stdout
    assert ("interpolation='navit': pass it to from_hf" in printed) == (kind == "idefics3")
    assert (" and vector [1, 72] of" in printed) == (kind != "idefics3")
    model, again = load(source), load(tmp_path / "out")
    assert again.config == replace(model.config, interpolation=None)
    assert all(
        torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items()
    )


def test_one_of_several_towers(several: Path, tmp_path: Path) -> None:
    run("extract", several, tmp_path / "out", "--prefix", "b.")
    expected = load(several, prefix="b.").state_dict()
    assert all(
        torch.equal(tensor, expected[name])
        for name, tensor in load(tmp_path / "out").state_dict().items()
    )


def test_from_the_hub(hub: Hub, full: Path, cached: Path, tmp_path: Path) -> None:
    hub.repositories["google/a"] = Repository(full)
    printed = run("extract", "google/a", tmp_path / "out", "--revision", "v1").stdout
    assert f"source   google/a at commit {hub.repositories['google/a'].commit}\n" in printed
    hub.requests.clear()
    run("extract", "google/a", tmp_path / "again", "--revision", "v1", "--offline")
    assert not hub.requests


def test_where_nothing_is_written(full: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for folder, says in (
        (out, "is not empty; pass another folder, or --force"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "no" / "where", "does not exist"),
        (full, "is not empty"),
    ):
        assert says in run("extract", full, folder, code=2).stderr
    for source in (full, full / "model.safetensors"):
        assert (
            "holds the checkpoint itself" in run("extract", source, full, "--force", code=2).stderr
        )
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_into_an_empty_folder_and_by_force(full: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    run("extract", full, out)
    (out / "precious").write_text("mine")
    (out / "model.safetensors").write_text("lost")
    run("extract", full, out, "--force")
    assert (out / "precious").read_text() == "mine"
    assert load(out).config == SMALL


def wrong_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    save = SigLipVisionModel.save_hf

    def damaged(self: SigLipVisionModel, folder: Path) -> None:
        save(self, folder)
        edit_tensors(folder, lambda tensors: {name: -tensor for name, tensor in tensors.items()})

    monkeypatch.setattr(SigLipVisionModel, "save_hf", damaged)


def wrong_config(monkeypatch: pytest.MonkeyPatch) -> None:
    save = SigLipVisionModel.save_hf

    def damaged(self: SigLipVisionModel, folder: Path) -> None:
        save(self, folder)
        edit_config(folder, hidden_act="gelu")

    monkeypatch.setattr(SigLipVisionModel, "save_hf", damaged)


def wrong_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "outputs_of_noise", lambda model: [torch.rand(2)])


def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(model: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(extraction, "outputs_of_noise", interrupt)


@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        (
            wrong_weights,
            1,
            "what was written is not what was read, and has been removed; different: pooling_head",
        ),
        (
            wrong_config,
            1,
            "out: the configuration is not the one that these weights were saved with",
        ),
        (
            wrong_outputs,
            1,
            "and has been removed; different: what it computes of a picture of noise\n",
        ),
        (interrupted, 130, "interrupted\n"),
    ],
)
@pytest.mark.parametrize("exists", [False, True], ids=["new", "empty"])
def test_nothing_stays_behind(
    exists: bool,
    fault: Callable[[pytest.MonkeyPatch], None],
    code: int,
    says: str,
    full: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if exists:
        (tmp_path / "out").mkdir()
    before = sorted(tmp_path.rglob("*"))
    fault(monkeypatch)
    done = run("extract", full, tmp_path / "out", code=code)
    assert says in done.stderr
    assert done.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_loaded_or_is_nothing_for_timm(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = checkpoint(replace(SMALL, layer_norm_eps=1e-5))
    done = run("extract", folder, tmp_path / "out", "--format", "timm", code=1)
    assert done.stderr == "timm's SigLIP towers have layer_norm_eps 1e-6, this one has 1e-05\n"
    edit_tensors(
        folder, lambda tensors: {name: t for name, t in tensors.items() if "fc1" not in name}
    )
    assert "missing tensors (8):" in run("extract", folder, tmp_path / "out", code=1).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_bits_are_compared_and_not_values() -> None:
    zero, nan = torch.zeros(2), torch.full((2,), torch.nan)
    assert extraction.is_same(nan, nan.clone())
    assert not extraction.is_same(zero, -zero)
    assert not extraction.is_same(zero, zero.double())
    assert not extraction.is_same(zero, torch.zeros(2, 1))
    assert not extraction.is_same(zero, None)


# --- export ---------------------------------------------------------------------------------------


def test_exported_for_other_programs(full: Path, tmp_path: Path) -> None:
    import onnxruntime

    out = tmp_path / "tower.onnx"
    told = run("export", full, out).stdout
    assert f"written  {out} (" in told
    assert "compared with the tower, in batches of 1, 2 and 5: differs by " in told
    x, model = pixels(SMALL, 3).float(), load(full)
    (tokens, *_) = onnxruntime.InferenceSession(out).run(None, {"pixel_values": x.numpy()})
    with torch.inference_mode():
        assert relative_error(torch.from_numpy(tokens), model(x).double()) < 1e-5
    run("export", full, tmp_path / "tower.pt2", "--format", "program")
    assert torch.export.load(tmp_path / "tower.pt2").module()(x)[0].shape == tokens.shape


def test_what_cannot_be_exported(
    full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        "must be named *.pt2" in run("export", full, "a.onnx", "--format", "package", code=2).output
    )
    assert "does not exist" in run("export", full, tmp_path / "no" / "a.onnx", code=2).output
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert (
        "a.onnx is not written: it needs" in run("export", full, tmp_path / "a.onnx", code=1).stderr
    )
    assert not (tmp_path / "a.onnx").exists()


# --- list, and the command itself -----------------------------------------------------------------


def test_list() -> None:
    rows = json.loads(run("list", "--json").stdout)["published"]
    printed = run("list").stdout.splitlines()
    assert len(rows) == len(printed) - 1 == len(PUBLISHED) == 28
    assert "\n".join(printed) in (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    for row, line, published in zip(rows, printed[1:], PUBLISHED, strict=True):
        assert row["repo"] == published.repo
        assert row["vision_parameters"] == published.vision_parameters
        assert row["vision_bytes"] == published.vision_bytes == 4 * published.vision_parameters
        assert row["share"] == published.vision_parameters / published.total_parameters
        assert (row["embed_dim"], row["patch_size"]) == (
            published.config.embed_dim,
            published.config.patch_size,
        )
        assert row["resample"] == {2: "bilinear", 3: "bicubic"}[published.resample]
        assert line.startswith(f"{published.repo} ")
        image = "any" if row["naflex"] else str(published.config.image_size)
        assert line.split()[1:4] == [row["size"], image, str(row["patch_size"])]
        assert f" {published.vision_parameters:,} " in line
    assert printed[1].split()[-3:] == ["371.5", "MB", "46%"]


def test_the_installed_command(full: Path) -> None:
    def out_of(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(COMMAND), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert out_of("--version").stdout == f"siglip-port {version('siglip-port')}\n"
    done = out_of("inspect", full)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == run("inspect", full).stdout
    done = out_of("inspect", full / "nothing.safetensors")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1


def test_without_the_extra() -> None:
    code = "import sys; sys.modules['typer'] = None; from siglip_port.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == "siglip-port needs typer, which is not installed: install siglip-port[cli]\n"
    )

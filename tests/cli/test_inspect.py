"""`siglip-port inspect`: output, downloads and exit codes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from siglip_port import SigLipVisionModel
from siglip_port.checkpoint import layouts
from siglip_port.checkpoint.formats import read_header
from tests.helpers.checkpoints import (
    ODD,
    SMALL,
    MakeCheckpoint,
    edit_config,
    edit_tensors,
    shard,
)
from tests.helpers.commands import inspect, run, stored_entry
from tests.helpers.flax import flax, write_npz
from tests.helpers.hub_server import Fault, Hub, Repository
from tests.helpers.other_libraries import timm_encoder
from tests.helpers.vision_language_models import build

PARAMETERS = sum(tensor.numel() for tensor in SigLipVisionModel(SMALL).state_dict().values())


def test_inspect_whole_model(whole_model: Path) -> None:
    inspection = inspect(whole_model)
    header = read_header(whole_model / "model.safetensors").tensors
    assert inspection.keys() == {
        *(
            "source",
            "commit",
            "files",
            "unread",
            "encoders",
            "layout",
            "prefix",
            "title",
            "config",
            "evidence",
        ),
        *("encoder", "total", "entries", "ignored", "problem"),
    }
    assert (inspection["source"], inspection["commit"], inspection["problem"]) == (
        str(whole_model),
        None,
        None,
    )
    assert (inspection["files"], inspection["unread"]) == (["model.safetensors"], [])
    assert inspection["encoders"] == [{"layout": "huggingface", "prefix": "vision_model."}]
    assert (inspection["layout"], inspection["prefix"]) == ("huggingface", "vision_model.")
    assert inspection["config"] == asdict(SMALL)
    assert inspection["encoder"]["parameters"] == PARAMETERS
    assert inspection["encoder"]["bytes"] == 4 * PARAMETERS
    assert inspection["total"]["tensors"] == len(header)
    assert inspection["total"]["bytes"] == sum(stored.nbytes for stored in header.values())
    assert inspection["ignored"].keys() == {"logit scale and bias", "text encoder"}
    assert sum(inspection["ignored"].values()) + inspection["encoder"]["tensors"] == len(header)
    fc1 = stored_entry(inspection, "vision_model.encoder.layers.{0...2}.mlp.fc1.weight")
    assert fc1 == {
        "parameters": ["transformer.encoder.encoder_blocks.{0...2}.mlp.fc1.weight"],
        "stored": "vision_model.encoder.layers.{0...2}.mlp.fc1.weight",
        "transform": "",
        "shape": [40, 24],
        "dtype": "F32",
        "nan": 0,
        "inf": 0,
    }
    assert (
        len(stored_entry(inspection, "vision_model.head.attention.in_proj_bias")["parameters"]) == 3
    )


def test_inspect_output(whole_model: Path) -> None:
    printed = run("inspect", whole_model).stdout
    inspection = inspect(whole_model)
    for entry in inspection["entries"]:
        assert entry["stored"] in printed
        assert all(name in printed for name in entry["parameters"])
        assert str(entry["shape"]) in printed
    assert all(f"{name}={value!r}" in printed for name, value in asdict(SMALL).items())
    assert f"encoder  {PARAMETERS:,} parameters, 90.7 kB\n" in printed
    assert "encoders --layout huggingface --prefix vision_model.\n" in printed
    count = inspection["ignored"]["text encoder"]
    assert f"ignored  logit scale and bias (2), text encoder ({count})\n" in printed
    assert "total    " in printed
    assert "headers  match the configuration\n" in printed
    assert "\x1b" not in printed
    assert "…" not in printed
    assert not any(line.endswith(" ") for line in printed.splitlines())


def test_inspect_shards(whole_model: Path) -> None:
    whole = inspect(whole_model)
    shard(whole_model)
    inspection = inspect(whole_model)
    assert len(inspection["files"]) == 3
    assert {**inspection, "files": None} == {**whole, "files": None}


def test_inspect_missing_shards(whole_model: Path) -> None:
    """Shards without encoder tensors are not needed; otherwise all missing tensors are named."""
    shard(whole_model)
    index = whole_model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["text_model.extra"] = "elsewhere.safetensors"
    index.write_text(json.dumps(content))
    assert inspect(whole_model)["unread"] == ["elsewhere.safetensors"]
    assert "kB, without elsewhere.safetensors\n" in run("inspect", whole_model).stdout
    (whole_model / "model-00001-of-00003.safetensors").unlink()
    inspection = inspect(whole_model, code=1)
    problem = inspection["problem"]
    missing = "model-00001-of-00003.safetensors"
    assert problem.startswith(f"{whole_model}: shards are missing or damaged: {missing}; copy")
    assert " (layout: HuggingFace, prefix vision_model) does not match its configuration" in problem
    assert None in [entry["dtype"] for entry in inspection["entries"]]


def test_inspect_vision_language_model(tmp_path: Path) -> None:
    whole, _ = build("paligemma")
    whole.save_pretrained(tmp_path)
    inspection = inspect(tmp_path)
    assert inspection["title"] == "HuggingFace, prefix " + inspection["prefix"].rstrip(".")
    assert "vision_tower" in inspection["prefix"]
    assert inspection["ignored"].keys() >= {"language model", "projector"}
    assert inspection["config"]["pooling_head"] is False
    assert inspection["encoder"]["parameters"] < inspection["total"]["parameters"]


def test_inspect_timm(tmp_path: Path) -> None:
    timm.models.save_for_hf(
        timm_encoder("vit_base_patch16_siglip_224"), str(tmp_path), safe_serialization=True
    )
    inspection = inspect(tmp_path)
    assert (inspection["layout"], inspection["prefix"], inspection["title"]) == (
        "timm",
        "",
        "timm, no prefix",
    )
    assert inspection["config"] == asdict(replace(ODD, hidden_act="gelu"))
    assert stored_entry(inspection, "pos_embed")["transform"] == "[1, position, out]"
    assert stored_entry(inspection, "blocks.{0...10}.attn.qkv.weight")["parameters"] == [
        f"transformer.encoder.encoder_blocks.{{0...10}}.self_attn.{name}_proj.weight"
        for name in "qkv"
    ]
    assert "encoders --layout timm --prefix ''\n" in run("inspect", tmp_path).stdout


@pytest.mark.parametrize("scanned", [False, True], ids=["indexed", "scanned"])
def test_inspect_npz(scanned: bool, tmp_path: Path) -> None:
    original = SigLipVisionModel(replace(ODD, image_size=42))
    write_npz(
        tmp_path / "a.npz",
        flax(original.config, original.state_dict(), scanned=scanned),
        "params/img/",
    )
    inspection = inspect(tmp_path / "a.npz")
    assert inspection["files"] == ["a.npz"]
    assert inspection["encoder"]["parameters"] == sum(
        tensor.numel() for tensor in original.state_dict().values()
    )
    name = "encoderblock" if scanned else "encoderblock_{0...10}"
    query = stored_entry(
        inspection, f"params/img/Transformer/{name}/MultiHeadDotProductAttention_0/query/kernel"
    )
    assert query["parameters"] == [
        "transformer.encoder.encoder_blocks.{0...10}.self_attn.q_proj.weight"
    ]
    assert query["transform"] == ("blocks stacked, " if scanned else "") + "[in, head, out of head]"
    assert query["shape"] == ([11] if scanned else []) + [72, 4, 18]
    assert inspection["ignored"] == {"logit scale and bias": 1, "text encoder": 1}


def test_inspect_blocks_of_several_dtypes(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    name = "encoder.layers.1.mlp.fc1.bias"
    edit_tensors(folder, lambda tensors: {**tensors, name: tensors[name].half()})
    inspection = inspect(folder)
    assert stored_entry(inspection, name)["dtype"] == "F16"
    assert stored_entry(inspection, "encoder.layers.{0,2}.mlp.fc1.bias")["dtype"] == "F32"


def test_inspect_nan_and_inf(checkpoint: MakeCheckpoint) -> None:
    """Counts are by tensor, for the encoder only."""
    folder = checkpoint(prefix="vision_model.")
    assert "values   all finite\n" in run("inspect", folder).stdout
    fc1, norm = "vision_model.encoder.layers.{}.mlp.fc1.weight", "vision_model.post_layernorm.bias"

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for number in (0, 2):
            tensors[fc1.format(number)][1, :2] = torch.nan
        tensors[norm][:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
        return {**tensors, "text_model.w": torch.tensor(torch.nan)}

    edit_tensors(folder, spoil)
    inspection = inspect(folder)
    counts = {
        entry["stored"]: (entry["nan"], entry["inf"])
        for entry in inspection["entries"]
        if entry["nan"] or entry["inf"]
    }
    assert counts == {fc1.format("{0,2}"): (4, 0), norm: (1, 2)}
    assert stored_entry(inspection, fc1.format(1))["nan"] == 0
    printed = run("inspect", folder).stdout
    assert f"values   NaN or Inf in {fc1.format('{0,2}')}, {norm}; see the table below\n" in printed
    assert "1 NaN, 2 Inf\n" in printed


def test_inspect_several_encoders(two_encoders: Path) -> None:
    encoders = [
        {"layout": "huggingface", "prefix": "a."},
        {"layout": "huggingface", "prefix": "b."},
    ]
    for command in (["inspect", two_encoders], ["extract", two_encoders, two_encoders / "out"]):
        result = run(*command, code=1)
        assert result.stdout == ""
        assert result.stderr == (
            "the checkpoint contains several vision encoders; pass one of: "
            "--layout huggingface --prefix a.; --layout huggingface --prefix b.\n"
        )
    inspection = inspect(two_encoders, code=1)
    assert inspection.keys() == {"source", "commit", "encoders", "problem"}
    assert inspection["encoders"] == encoders
    inspection = inspect(two_encoders, "--prefix", "b.")
    assert (inspection["prefix"], inspection["encoders"]) == ("b.", encoders)
    assert inspect(two_encoders, "--layout", "huggingface", "--prefix", "a.")["ignored"] == {
        "other tensors": inspection["encoder"]["tensors"]
    }


def test_inspect_wrong_config(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    edit_config(folder, intermediate_size=41)
    result = run("inspect", folder, code=1)
    assert "headers  do not match the configuration\n" in result.stdout
    assert "[40, 24]" in result.stdout
    assert "shape: expected [41, 24] from config.json, got [40, 24] (4):" in result.stderr
    assert inspect(folder, code=1)["problem"] == result.stderr.rstrip("\n")


def test_inspect_damaged_file(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    for more in ([], ["--json"]):
        result = run("inspect", folder, *more, code=1)
        assert result.stdout == ""
        assert "model.safetensors is not a valid safetensors file" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["inspect"], 2, "Missing argument"),
        (["inspect", "nowhere"], 1, "'nowhere' is neither a local path nor a Hub id"),
        (
            ["inspect", "nowhere", "--layout", "x"],
            2,
            "must be one of huggingface, huggingface-naflex, ",
        ),
        (["extract", "nowhere", "out", "--dtype", "int8"], 2, "int8"),
        (["extract", "nowhere", "out", "--format", "jax"], 2, "jax"),
        (["nothing"], 2, "nothing"),
    ],
)
def test_wrong_arguments(arguments: list[str], code: int, message: str) -> None:
    result = run(*arguments, code=code)
    assert message in result.stderr
    assert result.stdout == ""


# --- inspect on the Hub ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "ranges"), [(0, 1), (3000, 2)], ids=["short header", "long header"]
)
def test_inspect_hub_fetches_headers_only(
    more: int, ranges: int, hub: Hub, whole_model: Path, hub_cache: Path
) -> None:
    text = {f"text_model.{i}": torch.zeros(1) for i in range(more)} | {
        "text_model.large": torch.zeros(1_000_000)
    }
    edit_tensors(whole_model, lambda tensors: {**tensors, **text})
    hub.repositories["google/a"] = Repository(whole_model)
    local, inspection = inspect(whole_model), inspect("google/a")
    unread = [{**entry, "nan": None, "inf": None} for entry in local["entries"]]
    commit = hub.repositories["google/a"].commit
    assert inspection == {**local, "source": "google/a", "commit": commit, "entries": unread}
    assert "values   not read (headers only)\n" in run("inspect", "google/a").stdout
    assert hub.requests["CDN RANGE model.safetensors"] == ranges
    assert not {"GET model.safetensors", "CDN GET model.safetensors"} & hub.requests.keys()
    assert hub.sent["model.safetensors"] < 500_000
    assert not list(hub_cache.rglob("model.safetensors"))


def test_inspect_hub_shards(hub: Hub, whole_model: Path, hub_cache: Path) -> None:
    shard(whole_model)
    hub.repositories["google/a"] = Repository(whole_model)
    inspection = inspect("google/a", "--revision", "v1")
    assert (inspection["problem"], inspection["unread"], len(inspection["files"])) == (None, [], 3)
    assert not [request for request in hub.requests if "GET model-" in request]
    assert (
        sum(
            count
            for request, count in hub.requests.items()
            if request.startswith("CDN RANGE model-")
        )
        == 3
    )
    (whole_model / "model-00002-of-00003.safetensors").unlink()
    assert inspect("google/a", code=1)["unread"] == ["model-00002-of-00003.safetensors"]


def test_inspect_hub_cache(hub: Hub, whole_model: Path, hub_cache: Path) -> None:
    hub.repositories["google/a"] = Repository(whole_model)
    assert (
        "google/a: config.json is not in the local cache"
        in run("inspect", "google/a", "--offline", code=1).stderr
    )
    SigLipVisionModel.from_hf("google/a")
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


def test_inspect_hub_without_config(hub: Hub, tmp_path: Path, hub_cache: Path) -> None:
    (tmp_path / "served").mkdir()
    layout, state = layouts.BIG_VISION, SigLipVisionModel(SMALL).state_dict()
    tensors = layout.to_stored(
        state, SMALL.num_encoder_blocks, SMALL.num_attention_heads, layout.rules(True)
    )
    save_file(
        {name: t.contiguous() for name, t in tensors.items()},
        tmp_path / "served" / "model.safetensors",
    )
    hub.repositories["google/a"] = Repository(tmp_path / "served")
    inspection = inspect("google/a")
    assert (inspection["commit"], inspection["layout"]) == (
        hub.repositories["google/a"].commit,
        "big_vision",
    )
    assert inspection["config"] == asdict(SMALL)
    assert (
        hub.requests["HEAD model.safetensors"] == hub.requests["CDN RANGE model.safetensors"] == 1
    )


def test_inspect_hub_damaged_file(hub: Hub, whole_model: Path, hub_cache: Path) -> None:
    hub.repositories["google/a"] = Repository(whole_model)
    weights = whole_model / "model.safetensors"
    for content in (
        b"",
        b"version https://git-lfs.github.com/spec/v1",
        (9).to_bytes(8, "little") + b"no header",
    ):
        weights.write_bytes(content)
        assert (
            "google/a: model.safetensors is not a valid safetensors"
            in run("inspect", "google/a", code=1).stderr
        )


def test_inspect_hub_errors(hub: Hub, whole_model: Path, hub_cache: Path) -> None:
    hub.repositories["google/a"] = Repository(whole_model)
    hub.faults = [Fault("reset", "CDN RANGE model.safetensors", times=None)]
    assert (
        "google/a: cannot download model.safetensors" in run("inspect", "google/a", code=1).stderr
    )
    assert "google/b: no such repository on the Hub" in run("inspect", "google/b", code=1).stderr

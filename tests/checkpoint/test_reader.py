"""Loading: every kind of file is read exactly, and every problem is reported."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    Siglip2Config,
    Siglip2ForImageClassification,
    Siglip2VisionConfig,
    SiglipForImageClassification,
    SiglipModel,
)

from siglip_port import CheckpointError, SigLipVisionConfig, SigLipVisionModel, pack
from siglip_port.checkpoint import layouts
from siglip_port.checkpoint.key_rules import Layout
from siglip_port.checkpoint.source import WEIGHTS
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.siglip import reference as references
from siglip_port.parity.stress_weights import randomize
from tests.helpers.checkpoints import (
    ODD,
    SHALLOW,
    SMALL,
    MakeCheckpoint,
    adding,
    dropping,
    edit_config,
    edit_tensors,
    pixels,
    renaming,
    shard,
)
from tests.helpers.damaged_files import assert_refused, read_raw, write_raw
from tests.helpers.other_libraries import write_hf_encoder, write_two_encoders

load = SigLipVisionModel.from_hf


@pytest.mark.parametrize(
    ("kind", "ignored"),
    [
        (SiglipModel, {"logit scale and bias": 2, "text encoder": 22}),
        (SiglipForImageClassification, {"image classifier": 2, "pooling head": 11}),
    ],
)
@pytest.mark.parametrize("in_shards", [False, True], ids=["one file", "shards"])
@torch.no_grad()
def test_whole_models(
    tmp_path: Path, kind: type[SiglipModel], ignored: dict[str, int], in_shards: bool
) -> None:
    write_two_encoders(tmp_path, kind)
    if in_shards:
        shard(tmp_path)
    model = load(tmp_path)
    reference = references.load(tmp_path, pooling_head=True, dtype=torch.float32)
    expected = reference.side().run(pixels(SMALL).float())
    torch.testing.assert_close(model(pixels(SMALL)), expected["tokens"])
    is_classifier = kind is SiglipForImageClassification
    pooled = expected["tokens"].mean(1) if is_classifier else expected["pooled"]
    torch.testing.assert_close(model.embed(pixels(SMALL)), pooled)
    assert model.provenance is not None
    assert model.provenance.ignored == ignored
    head = 0 if is_classifier else 11
    assert model.provenance.tensors_read == 16 * SMALL.num_encoder_blocks + 5 + head
    assert len(model.provenance.files) == (3 if in_shards else 1)


@pytest.mark.parametrize("with_architectures", [True, False])
@torch.no_grad()
def test_classifier(tmp_path: Path, with_architectures: bool) -> None:
    """It classifies the mean of the tokens, and the pooling head in its file is not trained."""
    write_two_encoders(tmp_path, SiglipForImageClassification)
    if not with_architectures:
        edit_config(tmp_path, architectures=None)
    model = load(tmp_path)
    assert model.provenance is not None
    assert model.provenance.evidence.pooling == (
        "mean of the tokens, of a classifier; pooling_head=True loads its unused head"
    )
    reference = SiglipForImageClassification.from_pretrained(tmp_path)
    head = torch.nn.functional.linear(
        model.embed(pixels(SMALL)), reference.classifier.weight, reference.classifier.bias
    )
    torch.testing.assert_close(head, reference(pixels(SMALL)).logits)
    by_head = load(tmp_path, pooling_head=True).embed(pixels(SMALL))
    assert relative_error(by_head, model.embed(pixels(SMALL))) > 0.1


@torch.no_grad()
def test_naflex_classifier(tmp_path: Path) -> None:
    """Its mean leaves out the padding."""
    vision = Siglip2VisionConfig(
        hidden_size=24,
        intermediate_size=30,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_patches=9,
        patch_size=4,
    )
    reference = Siglip2ForImageClassification(Siglip2Config(vision_config=vision.to_dict()))
    randomize(reference)
    reference.save_pretrained(tmp_path)
    model = load(tmp_path)
    images = pack([torch.rand(3, 8, 16), torch.rand(3, 12, 12)], 4)
    logits = torch.nn.functional.linear(
        model.embed(**images), reference.classifier.weight, reference.classifier.bias
    )
    torch.testing.assert_close(logits, reference.eval()(**images).logits)


@pytest.mark.parametrize("prefix", ["", "vision_model."])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_vision_only_models(checkpoint: MakeCheckpoint, prefix: str, dtype: torch.dtype) -> None:
    folder = checkpoint(prefix=prefix, dtype=dtype)
    stored = load_file(folder / "model.safetensors")
    model = load(folder)
    state = model.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {dtype}
    assert torch.equal(state["pooling_head.probe"], stored[f"{prefix}head.probe"])
    fused = stored[f"{prefix}head.attention.in_proj_weight"]
    for i, name in enumerate("qkv"):
        assert torch.equal(
            state[f"pooling_head.attention.{name}_proj.weight"], fused[24 * i : 24 * i + 24]
        )
    assert not model.training
    assert not [name for name, p in model.named_parameters() if p.is_meta or not p.requires_grad]


def test_position_ids(checkpoint: MakeCheckpoint) -> None:
    for prefix in ("", "vision_model."):
        folder = checkpoint(prefix=prefix, name=f"ids{prefix}")
        ids = {f"{prefix}embeddings.position_ids": torch.arange(4)[None]}
        edit_tensors(folder, adding(ids))
        provenance = load(folder).provenance
        assert provenance is not None
        assert provenance.ignored == {"position ids": 1}


def test_pooling_head(checkpoint: MakeCheckpoint) -> None:
    with_head = checkpoint(name="with")
    without = checkpoint(replace(SMALL, pooling_head=False), name="without")
    assert load(with_head).config.pooling_head
    assert load(with_head, pooling_head=True).config.pooling_head
    headless = load(with_head, pooling_head=False)
    assert not headless.config.pooling_head
    assert headless.provenance is not None
    assert headless.provenance.ignored == {"pooling head": 11}
    assert not load(without).config.pooling_head
    assert not load(without, pooling_head=False).config.pooling_head
    with pytest.raises(
        CheckpointError, match="has no pooling head, which pooling_head=True requires; omit"
    ):
        load(without, pooling_head=True)


def test_unread_head(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    edit_tensors(
        folder,
        lambda t: {k: v.to(torch.int8) if k.startswith("head.") else v for k, v in t.items()},
    )
    assert load(folder, pooling_head=False).pooling_head is None
    with pytest.raises(CheckpointError, match="got I8"):
        load(folder)


@pytest.mark.parametrize("vision_use_head", [True, False, ...])
@pytest.mark.parametrize("has_head", [True, False])
def test_head_by_file(checkpoint: MakeCheckpoint, vision_use_head: object, has_head: bool) -> None:
    """transformers 4.40 writes a head beside `vision_use_head: false`; others omit the key."""
    folder = checkpoint(replace(SMALL, pooling_head=has_head))
    edit_config(folder, vision_use_head=vision_use_head)
    assert (load(folder).pooling_head is not None) == has_head


def test_mixed_dtypes(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    edit_tensors(
        folder, lambda t: {k: v.bfloat16() if "mlp" in k else v.half() for k, v in t.items()}
    )
    model = load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.provenance is not None
    assert set(model.provenance.stored_dtypes) == {torch.bfloat16, torch.float16}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_mapped_weights(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    model = load(folder)
    maps = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(folder / "model.safetensors"))
    ]
    for name, parameter in model.named_parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in maps), name
    before = (folder / "model.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    assert (folder / "model.safetensors").read_bytes() == before


FC1 = "encoder.layers.1.mlp.fc1.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (dropping(rf"^{FC1}$"), r"missing tensors \(1\):\n    encoder.layers.1.mlp.fc1.weight\n"),
        (
            dropping(r"fc1.bias"),
            r"missing .*\(4\):\n    encoder.layers.\{0...2\}.mlp.fc1.bias\n    head.mlp.fc1.bias\n",
        ),
        (
            dropping(r"layers.2"),
            r"missing tensors \(16\):(?s:.*)encoder.layers.2.self_attn.q_proj.bias\n",
        ),
        (dropping(r"head.probe"), r"missing tensors \(1\):\n    head.probe\n"),
        (dropping(r"embeddings"), r"missing tensors \(3\):\n    embeddings.patch_embedding.bias"),
        (
            lambda t: {**t, "extra.weight": t[FC1]},
            r"unexpected tensors, .*\(1\):\n    extra.weight\n",
        ),
        (
            lambda t: {**t, "text_model.x": t[FC1]},
            r"unexpected tensors, .*\(1\):\n    text_model.x\n",
        ),
        (
            renaming(r"layers\.2\.", "layers.3."),
            r"missing tensors \(16\):(?s:.*)unexpected tensors.*\(16\):",
        ),
        (
            renaming(r"fc1", "fc_1"),
            r"missing tensors \(8\):(?s:.*)unexpected tensors.*\(8\):\n    "
            r"encoder.layers.\{0...2\}.mlp.fc_1",
        ),
        (
            lambda t: {**t, FC1: t[FC1].T},
            r"shape: expected \[40, 24\] from config.json, got \[24, 40\] \(1\):\n    " + FC1,
        ),
        (
            lambda t: {**t, FC1: t[FC1].flatten()},
            r"shape: expected \[40, 24\] from config.json, got \[960\]",
        ),
        (
            lambda t: {
                **t,
                "head.attention.in_proj_weight": t["head.attention.in_proj_weight"][:48],
            },
            r"shape: expected \[72, 24\] from config.json, got \[48, 24\] \(1\):\n    "
            r"head.attention.in_proj_weight",
        ),
        (
            lambda t: {k: v[..., :-1] if "position" in k else v for k, v in t.items()},
            r"shape: expected \[4, 24\] from config.json, got \[4, 23\]",
        ),
        (
            lambda t: {**t, FC1: t[FC1].to(torch.int8)},
            r"dtype: expected one of F64, F32, F16, BF16, got I8 \(1\):",
        ),
        (lambda t: {**t, FC1: t[FC1].to(torch.float8_e4m3fn)}, "got F8_E4M3"),
        (
            lambda t: {**t, **{f"vision_model.{k}": v.clone() for k, v in t.items()}},
            r"several vision encoders.*prefix=''; layout='huggingface', prefix='vision_model.'",
        ),
        (
            renaming("^", "x"),
            r"no SigLIP vision encoder .* start with: xencoder \(48\), xhead \(11\)",
        ),
        (
            lambda t: {**t, "embeddings.class_embedding": t["head.probe"].flatten()},
            "refused: HuggingFace, no prefix: has a class token",
        ),
        (lambda _: {}, "no SigLIP vision encoder .* start with: nothing"),
    ],
)
def test_wrong_tensors(
    checkpoint: MakeCheckpoint, edit: Callable[..., dict[str, Tensor]], message: str
) -> None:
    folder = checkpoint()
    edit_tensors(folder, edit)
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder)
    assert str(folder) in str(error.value)


def test_all_problems_are_reported_at_once(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint()
    edit_tensors(
        folder, lambda t: dropping("layer_norm1.bias")({**t, "extra": t[FC1], FC1: t[FC1].T})
    )
    monkeypatch.setattr(
        "siglip_port.checkpoint.key_rules.split", lambda *_: pytest.fail("a tensor was read")
    )
    with pytest.raises(CheckpointError) as error:
        load(folder)
    assert str(error.value).splitlines() == [
        f"{folder} (layout: HuggingFace, no prefix) does not match its configuration",
        "  missing tensors (3):",
        "    encoder.layers.{0...2}.layer_norm1.bias",
        "  shape: expected [40, 24] from config.json, got [24, 40] (1):",
        f"    {FC1}",
        "  unexpected tensors, not in the key map (1):",
        "    extra",
        "Nothing was loaded; check that the weights and config.json are complete and belong "
        "together.",
    ]


def test_long_message(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint()
    edit_tensors(folder, lambda t: {**t, **{f"extra_{i}": torch.zeros(1) for i in range(500)}})
    with pytest.raises(CheckpointError, match=r"\(500\):(?s:.*)\.\.\. and 460 more") as error:
        load(folder)
    assert len(str(error.value).splitlines()) < 50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": 48},
            r"shape: expected \[48, 3, 8, 8\] from config.json, got \[24, 3, 8, 8\]",
        ),
        (
            {"num_hidden_layers": 2},
            r"unexpected tensors.*\(16\):\n    encoder.layers.2.layer_norm1.bias",
        ),
        (
            {"num_hidden_layers": 4},
            r"missing tensors \(16\):\n    encoder.layers.3.layer_norm1.bias",
        ),
        (
            {"num_hidden_layers": ...},
            r"missing tensors \(144\):\n    encoder.layers.\{3...11\}.layer_norm1.bias",
        ),
        (
            {"num_hidden_layers": 10**12},
            "config.json has 1000000000000 blocks, but the weights have only 64 tensors",
        ),
        ({"intermediate_size": 2**62}, "the configuration has impossible sizes"),
        ({"image_size": 10**15}, "the configuration has impossible sizes"),
        ({"image_size": 24}, r"shape: expected \[9, 24\] from config.json, got \[4, 24\]"),
        (
            {"num_attention_heads": 7},
            "embed_dim must be divisible by num_attention_heads, got 24 and 7",
        ),
        ({"hidden_size": "24"}, "embed_dim must be a positive integer, got '24'"),
        (
            {"hidden_act": "quick_gelu"},
            "hidden_act must be one of gelu_pytorch_tanh, gelu, got 'quick_gelu'",
        ),
        (
            {"model_type": "siglip2_vision_model"},
            r"describes a NaFlex encoder \(siglip2\), but the shape of the patch embedding is that",
        ),
        ({"vision_config": {}}, r"missing tensors"),
    ],
)
def test_wrong_configs(checkpoint: MakeCheckpoint, changes: dict[str, Any], message: str) -> None:
    folder = checkpoint()
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


# The header is the first 6 kB of the file.
PLACES = st.integers(0, 40) | st.integers(0, 6_000) | st.integers(0, 100_000)


@given(
    st.binary(max_size=64), PLACES, st.sampled_from(["insert", "overwrite", "truncate", "replace"])
)
def test_damaged_bytes(
    weights_file: tuple[Path, bytes], noise: bytes, position: int, damage: str
) -> None:
    """A damaged file raises CheckpointError, unless only weight values are damaged."""
    path, content = weights_file
    damaged = {
        "insert": content[:position] + noise + content[position:],
        "overwrite": content[:position] + noise + content[position + len(noise) :],
        "truncate": content[:position],
        "replace": noise,
    }[damage]
    path.write_bytes(damaged)
    try:
        model = load(path)
    except CheckpointError:
        assert damaged != content
    else:
        assert model.state_dict().keys() == SigLipVisionModel(SMALL).state_dict().keys()
        assert len(damaged) == len(content)


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    references.write_random_checkpoint(folder, SMALL)
    path = folder / "model.safetensors"
    return path, path.read_bytes()


def test_only_encoder_is_read(
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Other tensors, of any dtype, are not read, and their shards need not exist."""
    tensors = {f"model.vision_tower.{n}": t for n, t in write_hf_encoder(tmp_path).items()}
    other_tensors = {
        f"model.language_model.layers.{i}.w": torch.ones(3, dtype=torch.int8) for i in range(5000)
    }
    save_file(tensors, tmp_path / "encoder.safetensors")
    (tmp_path / "model.safetensors").unlink()
    weight_map = {
        **dict.fromkeys(tensors, "encoder.safetensors"),
        **dict.fromkeys(other_tensors, "absent.safetensors"),
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model = load(tmp_path)
    assert model.provenance is not None
    assert model.provenance.ignored == {"language model": 5000}
    assert model.provenance.bytes_read == sum(t.nbytes for t in tensors.values())
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("layout", layouts.LAYOUTS, ids=lambda layout: layout.name)
def test_round_trip_of_layouts(layout: Layout, tmp_path: Path) -> None:
    """Every layout can be stored by its table, loaded, saved and loaded again, bit for bit."""
    config = replace(ODD, pooling_head=bool(layout.head), naflex=layout.naflex, image_size=42)
    original = SigLipVisionModel(config)
    randomize(original)
    rules = layout.rules(config.pooling_head)
    separator = "/" if "big_vision" in layout.name else "."
    stored = layout.to_stored(
        original.state_dict(), 11, config.num_attention_heads, rules, f"a{separator}b{separator}"
    )
    save_file({n: t.contiguous() for n, t in stored.items()}, tmp_path / "encoder.safetensors")
    # The configuration selects a layout whose shapes are those of another one.
    name = layout.name if layout.model_types else None
    model = load(tmp_path / "encoder.safetensors", config=config, layout=name)
    loaded = [model]
    model.save_hf(tmp_path / "hf")
    loaded.append(load(tmp_path / "hf"))
    model.save_timm(tmp_path / "timm")
    loaded.append(load(tmp_path / "timm"))
    for other in loaded:
        assert other.config == config
        assert all(torch.equal(t, other.state_dict()[n]) for n, t in original.state_dict().items())
        assert all(t.is_contiguous() for t in other.state_dict().values())


def test_too_many_blocks(encoder_copy: Path) -> None:
    """Expanding this many blocks would take minutes and all memory."""
    header, data = read_raw(encoder_copy / WEIGHTS)
    header |= {
        f"text_model.{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        for i in range(20_000)
    }
    write_raw(encoder_copy / WEIGHTS, header, data)
    edit_config(encoder_copy, num_hidden_layers=20_000)
    assert_refused(encoder_copy, "config.json has 20000 blocks, limit is 1000")


def test_config_override(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint(SHALLOW)
    edit_config(folder, hidden_act="quick_gelu")
    with pytest.raises(CheckpointError, match="hidden_act must be one of"):
        load(folder)
    assert load(folder, config=SHALLOW).config == SHALLOW
    with pytest.raises(CheckpointError, match=r"shape: expected \[102, 72\]"):
        load(folder, config=replace(SHALLOW, mlp_hidden_dim=102))
    assert load(folder, config=SHALLOW, interpolation="timm").config.interpolation == "timm"
    assert isinstance(SHALLOW, SigLipVisionConfig)

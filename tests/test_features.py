"""What the tower gives beside its tokens.

Hidden states, attention maps, and itself, as a checkpoint of others.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from transformers import SiglipImageProcessorPil, SiglipVisionModel

from siglip_port import CheckpointError, SigLipVisionConfig, SigLipVisionModel, pack
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.siglip.reference import hf_config
from siglip_port.parity.stress_weights import randomise
from tests.helpers.checkpoints import ODD, MakeCheckpoint, edit_config, pixels
from tests.helpers.other_libraries import build

SMALL_ODD = replace(ODD, num_encoder_blocks=3)
load = SigLipVisionModel.from_hf


@pytest.fixture
def pair(checkpoint: MakeCheckpoint) -> tuple[SigLipVisionModel, Any]:
    """The port and the reference, of the same weights, in float64."""
    folder = checkpoint(SMALL_ODD)
    reference = SiglipVisionModel.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    return load(folder, dtype=torch.float64), reference


# --- hidden states --------------------------------------------------------------------------------


@torch.no_grad()
def test_hidden_states_equal_the_reference(pair: tuple[SigLipVisionModel, Any]) -> None:
    port, reference = pair
    reference.set_attn_implementation("sdpa")
    x = pixels(SMALL_ODD)
    expected = reference(x, output_hidden_states=True).hidden_states
    layers = [0, 1, 2, 3, -1, -2, -4, 2]
    for ours, layer in zip(port.hidden_states(x, layers), layers, strict=True):
        assert relative_error(ours, expected[layer]) <= 1e-10
    tokens, first = port.hidden_states(x, (-1, 0), post_layernorm=True)
    assert torch.equal(tokens, port(x))
    assert torch.equal(first, port.transformer.post_layernorm(port.hidden_states(x, [0])[0]))


@torch.no_grad()
def test_hidden_states_as_maps() -> None:
    port = SigLipVisionModel(replace(SMALL_ODD, interpolation="hf")).eval()
    x = torch.randn(2, 3, 30, 52)  # 4 x 7 patches
    (tokens,), (maps,) = port.hidden_states(x, [2]), port.hidden_states(x, [2], as_maps=True)
    assert maps.shape == (2, 72, 4, 7)
    for y in range(4):
        for column in range(7):
            assert torch.equal(maps[:, :, y, column], tokens[:, 7 * y + column])
    with pytest.raises(ValueError, match="as_maps needs pictures of one shape"):
        port.hidden_states(**pack(list(x), 7), layers=[2], as_maps=True)


def test_later_blocks_do_not_run() -> None:
    port = SigLipVisionModel(SMALL_ODD).eval()
    ran: list[int] = []

    def note(i: int, *_: object) -> None:
        ran.append(i)

    for i, block in enumerate(port.transformer.encoder.encoder_blocks):
        block.register_forward_hook(functools.partial(note, i))
    x = pixels(SMALL_ODD).float()
    calls: list[tuple[Callable[[], object], list[int]]] = [
        (lambda: port.hidden_states(x, [0]), []),
        (lambda: port.hidden_states(x, [1, 0]), [0]),
        (lambda: port.hidden_states(x, [-2]), [0, 1]),
        (lambda: port.attention_maps(x, [0]), []),
        (lambda: port.attention_maps(x, [1]), [0]),
    ]
    for call, expected in calls:
        ran.clear()
        call()
        assert ran == expected


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([4], "layers must lie between -4 and 3, got 4"),
        ([0, -5], "got -5"),
        ([], "layers must be one or more whole numbers"),
        (2, "layers must be one or more whole numbers in a list or tuple, got 2"),
        (["2"], "layers must be one or more whole numbers"),
    ],
)
def test_layers_that_are_none(layers: Any, message: str) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=message):
        SigLipVisionModel(SMALL_ODD).hidden_states(pixels(SMALL_ODD).float(), layers)


@pytest.mark.parametrize(
    "kind", ["llava_onevision", "paligemma", "gemma3", "idefics2", "idefics3", "smolvlm"]
)
@torch.no_grad()
def test_what_vision_language_models_feed_to_their_language_model(
    kind: str, tmp_path: Path
) -> None:
    """The table of docs/checkpoints.md.

    What enters the projector, caught in the model's own vision path.
    """
    whole, _ = build(kind)
    randomise(whole)
    whole = whole.double().eval()
    whole.save_pretrained(tmp_path)
    port = load(tmp_path)
    caught: list[Tensor] = []
    path = whole.model
    projector: nn.Module = (
        path.connector if hasattr(path, "connector") else path.multi_modal_projector
    )
    projector.register_forward_pre_hook(
        lambda _, args, kwargs: caught.append(args[0] if args else kwargs["image_hidden_states"]),
        with_kwargs=True,
    )
    x = pixels(port.config)
    if kind in ("paligemma", "gemma3"):
        path.get_image_features(x)
    elif kind == "llava_onevision":
        size = port.config.image_size
        path.get_image_features(x[None], image_sizes=torch.tensor([[size, size]]))
    else:
        path.get_image_features(x[None])
    expected = caught[0].flatten(0, -3)
    if kind == "llava_onevision":
        (features,) = port.hidden_states(x, [-1])
        assert relative_error(port(x), expected) > 1e-2  # not the tokens after post_layernorm
    else:
        features = port(x)
    assert relative_error(features, expected) <= 1e-10


# --- attention maps -------------------------------------------------------------------------------


@torch.no_grad()
def test_attention_maps_equal_the_reference(pair: tuple[SigLipVisionModel, Any]) -> None:
    """To 1e-6 in float64 too.

    The softmax of the reference's eager attention is float32 whatever the dtype.
    """
    port, reference = pair
    x = pixels(SMALL_ODD)
    expected = reference(x, output_attentions=True).attentions
    for ours, layer in zip(port.attention_maps(x, [2, 0, -2]), (2, 0, -2), strict=True):
        assert ours.shape == (2, 4, 36, 36)
        assert relative_error(ours, expected[layer]) <= 1e-6
        assert relative_error(ours.sum(-1), torch.ones(2, 4, 36)) <= 1e-12
    with pytest.raises(ValueError, match="layers must lie between -3 and 2, got 3"):
        port.attention_maps(x, [3])


@torch.no_grad()
def test_the_map_is_what_the_block_computes_with(pair: tuple[SigLipVisionModel, Any]) -> None:
    port, _ = pair
    x = pixels(SMALL_ODD)
    block: Any = port.transformer.encoder.encoder_blocks[1]
    (state,), (attention,) = port.hidden_states(x, [1]), port.attention_maps(x, [1])
    normed = block.layer_norm1(state)
    values = block.self_attn.v_proj(normed).view(2, 36, 4, 18).transpose(1, 2)
    context = (attention @ values).transpose(1, 2).flatten(2)
    assert relative_error(block.self_attn.out_proj(context), block.self_attn(normed)) <= 1e-12


@torch.no_grad()
def test_the_probes_attention_equals_the_reference(pair: tuple[SigLipVisionModel, Any]) -> None:
    port, reference = pair
    tokens = port(pixels(SMALL_ODD))
    probe = reference.head.probe.repeat(2, 1, 1)
    _, expected = reference.head.attention(probe, tokens, tokens, average_attn_weights=False)
    ours = port.pooling_attention(tokens)
    assert ours.shape == (2, 4, 36)
    assert relative_error(ours, expected[:, :, 0]) <= 1e-10


@torch.no_grad()
def test_attention_to_padding_is_none() -> None:
    port = SigLipVisionModel(replace(SMALL_ODD, naflex=True, image_size=42)).eval()
    inputs = pack([torch.randn(3, 14, 21), torch.randn(3, 28, 28)], 7)
    (attention,) = port.attention_maps(**inputs, layers=[1])
    assert not attention[0, :, :, 6:].any()
    probe = port.pooling_attention(port(**inputs), inputs["pixel_attention_mask"])
    assert not probe[0, :, 6:].any()
    assert relative_error(probe.sum(-1), torch.ones(2, 4)) <= 1e-6
    with pytest.raises(ValueError, match="no pooling head, so nothing attends to the tokens"):
        SigLipVisionModel(replace(SMALL_ODD, pooling_head=False)).pooling_attention(
            torch.ones(1, 36, 72)
        )


# --- pooling --------------------------------------------------------------------------------------


@torch.no_grad()
def test_pooling_by_the_mean() -> None:
    port = SigLipVisionModel(
        replace(SMALL_ODD, pooling_head=False, mean_pooling=True, interpolation="hf")
    ).eval()
    x = pixels(SMALL_ODD).float()
    assert torch.equal(port.embed(x), port(x).mean(1))
    inputs = pack([torch.randn(3, 14, 21), torch.randn(3, 28, 28)], 7)
    tokens = port(**inputs)
    assert relative_error(port.embed(**inputs)[0], tokens[0, :6].mean(0)) <= 1e-6
    half = port.half().pool(torch.full((2, 1024, 72), 80.0).half(), torch.ones(2, 1024))
    assert (
        relative_error(half, torch.full((2, 72), 80.0)) <= 1e-2
    )  # a sum of float16 would overflow
    with pytest.raises(ValueError, match="mean_pooling and pooling_head exclude each other"):
        replace(SMALL_ODD, mean_pooling=True)


# --- as a checkpoint of others --------------------------------------------------------------------


@pytest.mark.parametrize("naflex", [False, True], ids=["fixed", "naflex"])
@pytest.mark.parametrize("head", [True, False], ids=["head", "headless"])
@torch.no_grad()
def test_transformers_loads_what_is_saved(naflex: bool, head: bool, tmp_path: Path) -> None:
    config = replace(SMALL_ODD, naflex=naflex, pooling_head=head, image_size=42)
    port = SigLipVisionModel(config).double().eval()
    randomise(port)
    port.save_hf(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "model.safetensors", "preprocessor_config.json"]
    model = transformers.Siglip2VisionModel if naflex else SiglipVisionModel
    reference, info = model.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    x = pixels(config)
    inputs: dict[str, Any] = {**pack(list(x), 7)} if naflex else {"pixel_values": x}
    output = reference.double().eval()(**inputs)
    assert relative_error(port(x), output.last_hidden_state) <= 1e-10
    if head:
        assert relative_error(port.embed(x), output.pooler_output) <= 1e-10
    written = json.loads((tmp_path / "config.json").read_text())
    architecture = set(vars(hf_config(config))) & set(type(hf_config(config)).__annotations__)
    assert {
        name: getattr(hf_config(config), name) for name in architecture
    }.items() <= written.items()
    again = load(tmp_path)
    assert again.config == config
    assert all(torch.equal(t, port.state_dict()[n]) for n, t in again.state_dict().items())


def test_the_image_processor_is_written_too(tmp_path: Path) -> None:
    """transformers' own reads it, and it is that of the published checkpoints."""
    SigLipVisionModel(SMALL_ODD).save_hf(tmp_path / "v1")
    processor = SiglipImageProcessorPil.from_pretrained(tmp_path / "v1")
    assert processor.size == {"height": 45, "width": 45}
    assert (processor.resample, *processor.image_mean, *processor.image_std) == (3, *[0.5] * 6)
    SigLipVisionModel(replace(SMALL_ODD, naflex=True)).save_hf(tmp_path / "naflex")
    naflex = transformers.AutoImageProcessor.from_pretrained(tmp_path / "naflex")
    assert type(naflex).__name__.startswith("Siglip2ImageProcessor")
    assert (naflex.patch_size, naflex.max_num_patches, naflex.resample) == (7, 36, 2)


PUBLISHED_PROCESSOR = {
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "SiglipProcessor",
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 45, "width": 45},
}


@pytest.mark.parametrize(
    ("folder", "beside", "expected"),
    [
        ("siglip-small", None, {"resample": 3}),
        ("siglip2-small", None, {"resample": 2}),
        ("siglip-small", PUBLISHED_PROCESSOR, PUBLISHED_PROCESSOR),
        ("siglip2-small", {"image_processor_type": "SiglipImageProcessor"}, {"resample": 3}),
        (
            "siglip-small",
            {"do_normalize": False, "resample": 0},
            {"do_normalize": False, "resample": 0},
        ),
        ("siglip-small", {"size": {"shortest_edge": 45}}, {"size": {"shortest_edge": 45}}),
        ("siglip-small", {"size": 45}, {"size": 45}),
        (
            "smolvlm",
            {
                "image_processor_type": "SmolVLMImageProcessor",
                "resample": 1,
                "image_mean": [0.4] * 3,
                "size": {"x": 9},
            },
            {
                "resample": 1,
                "image_mean": [0.4] * 3,
                "image_std": [0.5] * 3,
                "size": {"height": 45, "width": 45},
            },
        ),
        (
            "siglip2-experiments/../siglip-small",
            {**PUBLISHED_PROCESSOR, "resample": 3, "size": {"height": 384, "width": 384}},
            {**PUBLISHED_PROCESSOR, "resample": 3},
        ),
        (
            "siglip-small",
            {"image_processor_type": "X", "resample": True, "image_mean": [float("nan")] * 3},
            {"resample": 3},
        ),
    ],
)
def test_the_image_processor_of_the_source_is_kept(
    folder: str,
    beside: dict[str, Any] | None,
    expected: dict[str, Any],
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
) -> None:
    source = checkpoint(SMALL_ODD, name=folder)
    if beside is not None:
        (source / "preprocessor_config.json").write_text(json.dumps(beside))
    load(source).save_hf(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert expected.items() <= written.items()
    assert written["image_processor_type"] == "SiglipImageProcessor"
    assert load(tmp_path / "out").preprocessor_config == written


def test_where_else_the_image_processor_is_looked_for(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    (tmp_path / "siglip2-experiments").mkdir()
    source = checkpoint(SMALL_ODD, name="siglip2-experiments/siglip-small")
    assert (
        load(source).preprocessor_config["resample"] == 3
    )  # the folder around it says nothing of it
    inner = {"image_processor_type": "Gemma3ImageProcessor", "resample": 2, "image_mean": [0.4] * 3}
    (source / "processor_config.json").write_text(
        json.dumps({"image_processor": inner})
    )  # as transformers 5 has it
    found = load(source).preprocessor_config
    assert (found["resample"], found["image_mean"], found["image_std"]) == (2, [0.4] * 3, [0.5] * 3)
    (source / "preprocessor_config.json").write_text("not json")
    assert (
        load(source).preprocessor_config == found
    )  # this one is not looked for, as by transformers
    (source / "processor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json is not readable JSON"):
        load(source)


def test_a_processor_that_is_no_json_is_not_written(tmp_path: Path) -> None:
    model = SigLipVisionModel(SMALL_ODD)
    model.preprocessor_config = {"image_mean": {0.5}}
    with pytest.raises(CheckpointError, match=r"could not be written to .*not JSON serializable"):
        model.save_hf(tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh"])
@torch.no_grad()
def test_timm_loads_what_is_saved(act: str, tmp_path: Path) -> None:
    port = SigLipVisionModel(replace(SMALL_ODD, hidden_act=act, image_size=46)).eval()
    randomise(port)
    port.save_timm(tmp_path)
    tower: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    x = pixels(port.config).float()
    assert relative_error(port(x), tower.forward_features(x)) <= 1e-5
    assert relative_error(port.embed(x), tower(x)) <= 1e-5
    assert (
        load(tmp_path).config == port.config
    )  # the size of a picture too, which timm's architecture says otherwise


def test_what_timm_has_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="timm's SigLIP towers have layer_norm_eps 1e-6, this one has 1e-05"
    ):
        SigLipVisionModel(replace(SMALL_ODD, layer_norm_eps=1e-5)).save_timm(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_named_architecture_overrides_the_files(checkpoint: MakeCheckpoint) -> None:
    folder = checkpoint(SMALL_ODD)
    edit_config(folder, hidden_act="quick_gelu")
    with pytest.raises(CheckpointError, match="hidden_act must be one of"):
        load(folder)
    assert load(folder, config=SMALL_ODD).config == SMALL_ODD
    with pytest.raises(CheckpointError, match=r"shape: expected \[102, 72\]"):
        load(folder, config=replace(SMALL_ODD, mlp_hidden_dim=102))
    assert load(folder, config=SMALL_ODD, interpolation="timm").config.interpolation == "timm"
    assert isinstance(SMALL_ODD, SigLipVisionConfig)

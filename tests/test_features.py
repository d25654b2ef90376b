"""Hidden states, attention maps and mean pooling."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import SiglipVisionModel

from siglip_port import SigLipVisionModel, pack
from siglip_port.parity.metrics import relative_error
from tests.helpers.checkpoints import SHALLOW, SMALL, MakeCheckpoint, pixels
from tests.helpers.models import random_model
from tests.helpers.training import backward

load = SigLipVisionModel.from_hf


@pytest.fixture
def pair(checkpoint: MakeCheckpoint) -> tuple[SigLipVisionModel, Any]:
    """Port and reference with the same weights, in float64."""
    folder = checkpoint(SHALLOW)
    reference = SiglipVisionModel.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    return load(folder, dtype=torch.float64), reference


# --- hidden states --------------------------------------------------------------------------------


@torch.no_grad()
def test_hidden_states(pair: tuple[SigLipVisionModel, Any]) -> None:
    port, reference = pair
    reference.set_attn_implementation("sdpa")
    x = pixels(SHALLOW)
    expected = reference(x, output_hidden_states=True).hidden_states
    layers = [0, 1, 2, 3, -1, -2, -4, 2]
    for output, layer in zip(port.hidden_states(x, layers), layers, strict=True):
        assert relative_error(output, expected[layer]) <= 1e-10
    tokens, first = port.hidden_states(x, (-1, 0), post_layernorm=True)
    assert torch.equal(tokens, port(x))
    assert torch.equal(first, port.transformer.post_layernorm(port.hidden_states(x, [0])[0]))


@torch.no_grad()
def test_hidden_states_as_maps() -> None:
    port = SigLipVisionModel(replace(SHALLOW, interpolation="hf")).eval()
    x = torch.randn(2, 3, 30, 52)  # 4 x 7 patches
    (tokens,), (maps,) = port.hidden_states(x, [2]), port.hidden_states(x, [2], as_maps=True)
    assert maps.shape == (2, 72, 4, 7)
    for y in range(4):
        for column in range(7):
            assert torch.equal(maps[:, :, y, column], tokens[:, 7 * y + column])
    with pytest.raises(ValueError, match="as_maps is not supported for packed patches"):
        port.hidden_states(**pack(list(x), 7), layers=[2], as_maps=True)


def test_later_blocks_are_not_run() -> None:
    port = SigLipVisionModel(SHALLOW).eval()
    ran: list[int] = []

    def record(i: int, *_: object) -> None:
        ran.append(i)

    for i, block in enumerate(port.transformer.encoder.encoder_blocks):
        block.register_forward_hook(functools.partial(record, i))
    x = pixels(SHALLOW).float()
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
        ([4], "layers must be between -4 and 3, got 4"),
        ([0, -5], "got -5"),
        ([], "layers must be a non-empty list"),
        (2, "layers must be a non-empty list or tuple of integers, got 2"),
        (["2"], "layers must be a non-empty list"),
    ],
)
def test_invalid_layers(layers: Any, message: str) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=message):
        SigLipVisionModel(SHALLOW).hidden_states(pixels(SHALLOW).float(), layers)


# --- embeddings of images -------------------------------------------------------------------------


def test_embeddings_of_images_can_be_trained_on() -> None:
    model = random_model()
    images = [np.full((9, 9, 3), value, np.uint8) for value in (0, 99, 255)]
    with torch.inference_mode():
        in_inference_mode = model.embed_images(images)
    for embeddings in (model.embed_images(images, batch_size=2), in_inference_mode):
        assert not embeddings.requires_grad
        probe = torch.nn.Linear(embeddings.shape[1], 2)
        backward(probe(embeddings).square().sum())
        assert probe.weight.grad is not None
        assert probe.weight.grad.any()
        expected = embeddings * 2
        assert torch.equal(embeddings.mul_(2), expected)


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_model_without_rgb(channels: int) -> None:
    model = random_model(replace(SMALL, num_channels=channels))
    message = (
        rf"^num_channels of the model must be 3 \(RGB channels\) to read images, got {channels}; "
        "pass pixel_values to model.embed yourself$"
    )
    with pytest.raises(ValueError, match=message):
        model.embed_images([np.zeros((9, 9, 3), np.uint8)])
    assert model.embed(pixels(model.config).float()).shape == (2, 24)
    with pytest.raises(ValueError, match=f"the number of channels must be {channels}$"):
        model.embed(pixels(SMALL).float())


# --- attention maps -------------------------------------------------------------------------------


@torch.no_grad()
def test_attention_maps(pair: tuple[SigLipVisionModel, Any]) -> None:
    """The tolerance is 1e-6 because the reference's eager attention has a float32 softmax."""
    port, reference = pair
    x = pixels(SHALLOW)
    expected = reference(x, output_attentions=True).attentions
    for output, layer in zip(port.attention_maps(x, [2, 0, -2]), (2, 0, -2), strict=True):
        assert output.shape == (2, 4, 36, 36)
        assert relative_error(output, expected[layer]) <= 1e-6
        assert relative_error(output.sum(-1), torch.ones(2, 4, 36)) <= 1e-12
    with pytest.raises(ValueError, match="layers must be between -3 and 2, got 3"):
        port.attention_maps(x, [3])


@torch.no_grad()
def test_attention_map_reproduces_block_output(pair: tuple[SigLipVisionModel, Any]) -> None:
    port, _ = pair
    x = pixels(SHALLOW)
    block: Any = port.transformer.encoder.encoder_blocks[1]
    (state,), (attention,) = port.hidden_states(x, [1]), port.attention_maps(x, [1])
    normed = block.layer_norm1(state)
    values = block.self_attn.v_proj(normed).view(2, 36, 4, 18).transpose(1, 2)
    context = (attention @ values).transpose(1, 2).flatten(2)
    assert relative_error(block.self_attn.out_proj(context), block.self_attn(normed)) <= 1e-12


@torch.no_grad()
def test_pooling_attention(pair: tuple[SigLipVisionModel, Any]) -> None:
    port, reference = pair
    tokens = port(pixels(SHALLOW))
    probe = reference.head.probe.repeat(2, 1, 1)
    _, expected = reference.head.attention(probe, tokens, tokens, average_attn_weights=False)
    output = port.pooling_attention(tokens)
    assert output.shape == (2, 4, 36)
    assert relative_error(output, expected[:, :, 0]) <= 1e-10


@torch.no_grad()
def test_no_attention_to_padding() -> None:
    port = SigLipVisionModel(replace(SHALLOW, naflex=True, image_size=42)).eval()
    inputs = pack([torch.randn(3, 14, 21), torch.randn(3, 28, 28)], 7)
    (attention,) = port.attention_maps(**inputs, layers=[1])
    assert not attention[0, :, :, 6:].any()
    probe = port.pooling_attention(port(**inputs), inputs["pixel_attention_mask"])
    assert not probe[0, :, 6:].any()
    assert relative_error(probe.sum(-1), torch.ones(2, 4)) <= 1e-6
    with pytest.raises(
        ValueError, match="this model has no pooling head; load a checkpoint that has one"
    ):
        SigLipVisionModel(replace(SHALLOW, pooling_head=False)).pooling_attention(
            torch.ones(1, 36, 72)
        )


# --- pooling --------------------------------------------------------------------------------------


@torch.no_grad()
def test_mean_pooling() -> None:
    port = SigLipVisionModel(
        replace(SHALLOW, pooling_head=False, mean_pooling=True, interpolation="hf")
    ).eval()
    x = pixels(SHALLOW).float()
    assert torch.equal(port.embed(x), port(x).mean(1))
    inputs = pack([torch.randn(3, 14, 21), torch.randn(3, 28, 28)], 7)
    tokens = port(**inputs)
    assert relative_error(port.embed(**inputs)[0], tokens[0, :6].mean(0)) <= 1e-6
    half = port.half().pool(torch.full((2, 1024, 72), 80.0).half(), torch.ones(2, 1024))
    assert (
        relative_error(half, torch.full((2, 72), 80.0)) <= 1e-2
    )  # a sum of float16 would overflow
    with pytest.raises(ValueError, match="mean_pooling and pooling_head are mutually exclusive"):
        replace(SHALLOW, mean_pooling=True)

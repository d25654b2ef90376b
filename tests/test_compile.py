"""`torch.compile` and `torch.export` give the same results."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from siglip_port import SigLipVisionConfig, SigLipVisionModel
from siglip_port.parity.metrics import relative_error
from tests.helpers.checkpoints import SHALLOW, SMALL
from tests.helpers.models import random_float64_model
from tests.helpers.training import (
    GRADIENT_TOLERANCE,
    NAFLEX,
    RESIZED,
    TOLERANCE,
    backward,
    gradients,
    images,
    worst_error,
)


@pytest.fixture
def compiler() -> Iterator[None]:
    """Reset the compiler, whose recompile limit would otherwise be shared between tests."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# One block suffices: all blocks have the same graph.
IMAGES = replace(SHALLOW, num_encoder_blocks=1)
IMAGES_RESIZED = replace(RESIZED, num_encoder_blocks=1)
PACKED = replace(NAFLEX, num_encoder_blocks=1)

SHAPES = [(2, 3), (4, 2), (1, 5)]


def shapes_as_ints() -> dict[str, Any]:
    """Packed patches with shapes as pairs of ints, which are constants for the compiler."""
    shapes = torch.tensor(SHAPES)
    mask = (torch.arange(8) < shapes.prod(1, keepdim=True)).long()
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(3, 8, 3 * 7 * 7, generator=generator, dtype=torch.float64)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": SHAPES}


BATCHES: dict[str, tuple[SigLipVisionConfig, Callable[[], dict[str, Any]]]] = {
    "images": (IMAGES, lambda: {"pixel_values": images(IMAGES)}),
    "interpolated": (IMAGES_RESIZED, lambda: {"pixel_values": images(IMAGES, 31)}),
    "packed": (PACKED, shapes_as_ints),
    "packed, no mask": (PACKED, lambda: {**shapes_as_ints(), "pixel_attention_mask": None}),
}


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("images", marks=pytest.mark.slow),
        "interpolated",
        "packed",
        pytest.param("packed, no mask", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_compile(name: str) -> None:
    config, make_batch = BATCHES[name]
    model = random_float64_model(config)
    batch = make_batch()
    tokens = model(**batch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(**batch), tokens) <= TOLERANCE
    embed = torch.compile(model.embed, fullgraph=True, backend="aot_eager")
    assert relative_error(embed(**batch), model.embed(**batch)) <= TOLERANCE
    mask = batch.get("pixel_attention_mask")
    pool = torch.compile(model.pool, fullgraph=True, backend="aot_eager")
    assert relative_error(pool(tokens, mask), model.pool(tokens, mask)) <= TOLERANCE


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", [pytest.param("images", marks=pytest.mark.slow), "packed"])
def test_compiled_gradients(name: str) -> None:
    """Also with gradient checkpointing."""
    config, make_batch = BATCHES[name]
    model = random_float64_model(config).train()
    batch = make_batch()
    backward(model.embed(**batch).square().mean())
    expected = gradients(model)
    model.gradient_checkpointing_enable()
    embed = torch.compile(model.embed, fullgraph=True, backend="aot_eager")
    backward(embed(**batch).square().mean())
    assert worst_error(gradients(model), expected)[0] <= GRADIENT_TOLERANCE


@pytest.mark.usefixtures("compiler")
def test_compiled_once_for_all_steps() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model = random_float64_model(RESIZED).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for _ in range(3):
        backward(compiled(images(RESIZED, 31)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@torch.no_grad()
def test_compile_other_shapes() -> None:
    """Each list of shapes compiles a new graph."""
    model = random_float64_model(PACKED)
    embed = torch.compile(model.embed, fullgraph=True, backend="eager")
    for shapes in (SHAPES, [(3, 2), (2, 4), (5, 1)], [(5, 5)] * 3):
        patches = torch.ones(3, 25, 3 * 7 * 7).double()
        expected = model.embed(patches, spatial_shapes=shapes)
        assert relative_error(embed(patches, spatial_shapes=shapes), expected) <= TOLERANCE


@pytest.mark.usefixtures("compiler")
@torch.no_grad()
def test_compile_other_sizes() -> None:
    """Other image sizes recompile without a graph break."""
    model = random_float64_model(IMAGES_RESIZED)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for side, batch in ((31, 2), (38, 2), (45, 3), (66, 4)):
        x = images(IMAGES, side, batch)
        assert relative_error(compiled(x), model(x)) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++")), reason="inductor needs a C++ compiler"
)
@torch.no_grad()
def test_inductor() -> None:
    config = replace(SMALL, num_encoder_blocks=1, pooling_head=False, mean_pooling=True)
    model = random_float64_model(config)
    x = images(config)
    embed = torch.compile(model.embed, fullgraph=True)
    assert relative_error(embed(x), model.embed(x)) <= TOLERANCE


class Embed(nn.Module):
    """`embed` as a module, because `torch.export` exports `forward`."""

    def __init__(self, model: SigLipVisionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.embed(pixel_values)


@pytest.mark.parametrize(
    ("side", "strict"),
    [
        pytest.param(45, False, marks=pytest.mark.slow),
        (31, False),
        pytest.param(45, True, marks=pytest.mark.slow),
        pytest.param(31, True, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_export(side: int, strict: bool, tmp_path: Path) -> None:
    """Dynamic batch size, with and without interpolated positions."""
    model = random_float64_model(IMAGES if side == IMAGES.image_size else IMAGES_RESIZED)
    for module in (model, Embed(model)):
        program = torch.export.export(
            module,
            (images(IMAGES, side),),
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
            strict=strict,
        )
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        for batch in (1, 5):
            x = images(IMAGES, side, batch)
            assert relative_error(loaded(x), module(x)) <= TOLERANCE

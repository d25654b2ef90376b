from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from siglip_port.parity.siglip import reference, regimes
from siglip_port.patches import pack
from siglip_port.validation import MAX_PIXEL
from tests.helpers.checkpoints import SMALL

NAFLEX = replace(SMALL, naflex=True, image_size=5 * SMALL.patch_size)


def test_names_are_unique() -> None:
    every = [
        *regimes.image_regimes(SMALL, 1),
        *regimes.grid_regimes(NAFLEX, 1),
        *regimes.packed_regimes(NAFLEX, 1),
    ]
    names = [regime.name for regime in every]
    assert len(set(names)) == len(names)


def test_batches() -> None:
    sizes = [len(regime.inputs) for regime in regimes.batch_regimes(SMALL, 1)]
    assert sizes == [1, 3, 9, 33]


def test_pixels_leave_usual_range_but_are_accepted() -> None:
    images: dict[str, Any] = {
        regime.name: regime.inputs for regime in regimes.pixel_regimes(SMALL, 1)
    }
    largest = images["pixels up to 9.5"].abs().max()
    assert 5 < largest < MAX_PIXEL
    assert (images["constant images"].flatten(1).std(1) == 0).all()
    assert images["one pixel set"].unique().tolist() == [-0.75, 0.25, 1.25]


@pytest.mark.parametrize(
    ("arrange", "is_expanded"),
    [
        (regimes.to_transposed, False),
        (regimes.to_channels_last, False),
        (regimes.to_slice, False),
        (regimes.to_expanded_channels, True),
        (regimes.to_expanded_batch, True),
    ],
)
def test_arranged_images_are_equal_but_not_contiguous(
    arrange: Callable[[Tensor], Tensor], is_expanded: bool
) -> None:
    images = torch.rand(1, 1, 8, 8).repeat(2, 3, 1, 1) if is_expanded else torch.rand(2, 3, 8, 8)
    arranged = arrange(images)
    assert torch.equal(arranged, images)
    assert not arranged.is_contiguous()
    assert (0 in arranged.stride()) == is_expanded


def test_grids_differ_from_own() -> None:
    grids = set()
    for regime in regimes.grid_regimes(NAFLEX, 1):
        assert isinstance(regime.inputs, Tensor)
        height, width = regime.inputs.shape[2:]
        grids.add((height // NAFLEX.patch_size, width // NAFLEX.patch_size))
    assert {(5, 5), (8, 8), (3, 3), (4, 6), (6, 4), (5, 8), (1, 9), (1, 1), (1, 25)} <= grids


def test_packed_noise_is_as_packed_by_port() -> None:
    packed = regimes.pack_noise(NAFLEX, [(2, 3), (1, 4)], 1, 10)
    images = []
    patch = NAFLEX.patch_size
    for patches, (rows, columns) in zip(packed["pixel_values"], ((2, 3), (1, 4)), strict=True):
        cells = patches[: rows * columns].unflatten(1, (patch, patch, 3))
        grid = cells.unflatten(0, (rows, columns)).permute(4, 0, 2, 1, 3)
        images.append(grid.reshape(3, rows * patch, columns * patch))
    for name, tensor in pack(images, patch, 10).items():
        assert torch.equal(packed[name], tensor), name  # type: ignore[arg-type]


def test_default_mask_follows_from_shapes() -> None:
    packed = regimes.pack_noise(NAFLEX, regimes.MANY_SHAPES, 1)
    mask = packed.pop("pixel_attention_mask")
    assert not mask.all()
    assert torch.equal(reference.patch_positions(packed), mask.bool())


def test_padding_is_hidden() -> None:
    tokens = torch.ones(2, 3, 4)
    defined = torch.tensor([[True, True, False], [True, False, False]])
    hidden = reference.hide_padding(tokens, defined)
    assert hidden.sum(2).tolist() == [[4, 4, 0], [4, 0, 0]]
    assert reference.hide_padding(tokens, None) is tokens

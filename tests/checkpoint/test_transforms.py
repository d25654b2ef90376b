"""Transforms of single tensors: exact, and inverse to each other."""

from __future__ import annotations

import pytest
import torch

from siglip_port.checkpoint import transforms
from siglip_port.checkpoint.transforms import Transform

TRANSFORMS = [
    transform for transform in vars(transforms).values() if isinstance(transform, Transform)
]
SHAPES: dict[str, tuple[int, ...]] = {
    "patch": (8, 3, 5, 5),
    "positions": (9, 8),
    "linear": (8, 6),
    "bias": (8,),
}
KINDS = {
    "": "patch",
    "[in, out]": "linear",
    "[in, head, out of head]": "linear",
    "[head, in of head, out]": "linear",
    "[head, out of head]": "bias",
    "[1, position, out]": "positions",
    "[y, x, out]": "positions",
    "[1, y, x, out]": "positions",
}


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: transform.name or "plain")
def test_round_trip(transform: Transform) -> None:
    shape = SHAPES[KINDS.get(transform.name, "patch")]
    tensor = torch.randn(shape)
    stored = transform.to_stored(tensor, 2)
    assert torch.equal(transform.from_stored(stored, shape), tensor)
    # Values are only moved.
    assert torch.equal(stored.flatten().sort().values, tensor.flatten().sort().values)
    assert torch.equal(transform.to_stored(transform.from_stored(stored, shape), 2), stored)


def test_unique_names() -> None:
    assert len({transform.name for transform in TRANSFORMS}) == len(TRANSFORMS)


def test_channel_order_in_patches() -> None:
    weight = torch.arange(2 * 3 * 2 * 2.0).view(2, 3, 2, 2)
    stored = transforms.PATCHES.to_stored(weight, 1)
    assert stored[1].tolist() == [
        weight[1, c, y, x].item() for y in range(2) for x in range(2) for c in range(3)
    ]
    channels = transforms.PATCHES_CHANNEL_FIRST.to_stored(weight, 1)
    assert channels[1].tolist() == [
        weight[1, c, y, x].item() for c in range(3) for y in range(2) for x in range(2)
    ]

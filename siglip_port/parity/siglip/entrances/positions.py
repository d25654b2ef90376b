"""Position embeddings for other grids, by rules that transformers does not have."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from siglip_port import patches
from siglip_port.parity.metrics import relative_error
from siglip_port.parity.results import Finding
from siglip_port.parity.siglip.entrances.subject import Subject

SIZES = ((4, 3), (3, 5), (9, 7), (5, 8))
"""Height and width of the new grids; that of the table is 5 x 5."""

BOUND = 1e-5
"""Pillow computes in float32."""

Resize = Callable[[NDArray[np.float32], int, int], NDArray[np.float32]]
"""Function [h, w] -> [height, width]."""


def check_interpolate_positions(_: Subject) -> Iterator[Finding]:
    """Compare rules with the same filter in Pillow and NumPy, channel by channel."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(25, 3, generator=generator)
    for rule, resize in RULES.items():
        for height, width in SIZES:
            if rule == "crop" and max(height, width) > 5:
                continue
            actual = patches.interpolate_positions(table, (height, width), rule)
            error = relative_error(actual, resize_channels(resize, table, height, width))
            if not error <= BOUND:
                yield Finding(f"interpolation={rule!r}, {height} x {width} patches", error=error)


def resize_channels(resize: Resize, table: Tensor, height: int, width: int) -> Tensor:
    """Resize a table [25, D] channel by channel: [height * width, D]."""
    channels = table.T.unflatten(1, (5, 5)).numpy()
    resized = [resize(channel, height, width) for channel in channels]
    return torch.from_numpy(np.stack(resized, axis=-1)).flatten(0, 1)


def resize_with_pillow(
    channel: NDArray[np.float32], height: int, width: int
) -> NDArray[np.float32]:
    """Resize as timm: bicubic, antialiased."""
    image = Image.fromarray(np.ascontiguousarray(channel))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def resize_with_aligned_corners(
    channel: NDArray[np.float32], height: int, width: int
) -> NDArray[np.float32]:
    """Resize as `scipy.ndimage.zoom(order=1)`: linear, first and last position stay."""
    places = np.arange(5)
    columns = np.linspace(0, 4, width)
    rows = np.linspace(0, 4, height)
    wide = np.stack([np.interp(columns, places, row) for row in channel])
    tall = np.stack([np.interp(rows, places, column) for column in wide.T], axis=1)
    return tall.astype(np.float32)


RULES: dict[str, Resize] = {
    "timm": resize_with_pillow,
    "big_vision": resize_with_aligned_corners,
    "crop": lambda channel, height, width: channel[:height, :width],
}
"""Name of a rule -> the same in another library."""

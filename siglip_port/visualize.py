"""Figures of what a tower has learned and of what it makes of a picture, drawn with matplotlib, which is an extra.

Matplotlib's global state is left alone: figures are made without pyplot, and drawn by Agg, which
needs no screen. Sources of the kinds of figures: Dosovitskiy et al. 2020, arXiv 2010.11929, figure
7 (filters, positions); Oquab et al. 2023, arXiv 2304.07193, figure 1 (tokens).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name the field uses)
from torch import Tensor

from siglip_port.atomic import commit_files, staging_dir
from siglip_port.image_processing import ImageProcessor, Picture, Pixels
from siglip_port.model import SigLipVisionModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POOLING = "pooling_attention.png"
"""The figure that only towers with an attention pooling head have."""

_FILTERS = (4, 7)  # principal components of the filters that are shown, downwards and across
_POSITIONS = 7  # at most so many positions downwards and across whose similarities are shown
_LAID_OVER = 0.65  # opacity of what is laid over a picture
_TINY = 1e-300  # instead of 0 in a denominator


@dataclass(frozen=True)
class Seen:
    """A picture as a tower sees it.

    Attributes:
        pixels: the batch of one that the tower takes.
        rgb: the same for people, [h * P, w * P, 3], 0 to 1: the pixels that lie in whole patches.
        grid: patches downwards and across, (h, w).
    """

    pixels: Pixels
    rgb: Tensor
    grid: tuple[int, int]


def see(model: SigLipVisionModel, picture: Picture) -> Seen:
    """Prepares a picture as the model's `preprocessor_config` says, and undoes the normalising for people.

    Args:
        model: of fixed size, or NaFlex.
        picture: a file, its contents, a picture of Pillow's, or an array or tensor of uint8.

    Raises:
        siglip_port.image_processing.ImageError: the picture cannot be read, or holds no patch.
        ValueError: `preprocessor_config` cannot be followed.
    """
    processor, size = ImageProcessor.from_config(model.preprocessor_config), model.config.patch_size
    values = processor.one(picture)  # [3, H, W]
    pixels = processor.batch([values])
    rows, columns = (side // size for side in values.shape[1:])
    rgb = values[:, : rows * size, : columns * size].movedim(0, -1).double()
    if processor.mean is not None and processor.std is not None:
        rgb = rgb * torch.tensor(processor.std).double() + torch.tensor(processor.mean).double()
    rgb = rgb / (255 * (1.0 if processor.rescale_factor is None else processor.rescale_factor))
    return Seen(pixels, rgb.clamp(0, 1), (rows, columns))


def components(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Principal components of rows about their mean, those of the largest variance first, in float64.

    A direction is given the sign that makes its largest number positive. Those that rounding alone
    tells from nothing are left out.

    Args:
        rows: [N, D], all finite.

    Returns:
        How far the rows lie along the components, [N, K]; and the components, of unit length, [K,
        D].
    """
    rows = rows.detach().cpu().double()
    left, lengths, directions = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    kept = lengths > rows.norm() * max(rows.shape) * torch.finfo(rows.dtype).eps
    signs = directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()  # [K, 1]
    return (left * lengths * signs[:, 0])[:, kept], (directions * signs)[kept]


def principal(tokens: Tensor) -> Tensor:
    """How far tokens lie along their first three principal components: [N, D] -> [N, 3], float64.

    Where there are fewer components, the last are zero.
    """
    along = components(tokens)[0][:, :3]
    return F.pad(along, (0, 3 - along.shape[1]))


def colours(values: Tensor) -> Tensor:
    """Spreads each column over 0 to 1, from its first to its 99th percentile: [N, 3] -> [N, 3]."""
    low, high = (torch.quantile(values, share, dim=0) for share in (0.01, 0.99))
    return ((values - low) / (high - low).clamp(min=_TINY)).clamp(0, 1)


def similarities(positions: Tensor) -> Tensor:
    """Cosine of each position embedding with each other one: [N, D] -> [N, N], float64."""
    unit = F.normalize(positions.detach().cpu().double(), dim=1)
    return unit @ unit.T


def spread(side: int, most: int) -> list[int]:
    """At most so many of the numbers from 0 to side - 1, evenly spread from the first to the last."""
    return [
        round(n) for n in torch.linspace(0, side - 1, min(side, most), dtype=torch.float64).tolist()
    ]


def mosaic(tiles: Tensor, columns: int, empty: float) -> Tensor:
    """Lays tiles out row by row, with one pixel between them.

    Args:
        tiles: [K, h, w] or [K, h, w, 3].
        columns: how many stand beside each other.
        empty: what is put between them and where the last row has none.

    Returns:
        [rows * (h + 1) - 1, columns * (w + 1) - 1], or with the 3.
    """
    height, width = tiles.shape[1:3]
    rows = max(-(-len(tiles) // columns), 1)
    whole = tiles.new_full(
        (rows * (height + 1) - 1, columns * (width + 1) - 1, *tiles.shape[3:]), empty
    )
    for number, tile in enumerate(tiles):
        top, left = number // columns * (height + 1), number % columns * (width + 1)
        whole[top : top + height, left : left + width] = tile
    return whole


@torch.inference_mode()
def draw(model: SigLipVisionModel, picture: Picture, folder: str | os.PathLike[str]) -> list[Path]:
    """Draws what a model has learned, and what it makes of a picture.

    The same of both gives the same bytes.

    The files are `patches.png`, `patch_embedding.png`, `position_embedding.png`, `tokens_pca.png`,
    and, if the model has an attention pooling head, `pooling_attention.png`.

    Args:
        model: of fixed size or NaFlex, in `eval()` mode.
        picture: a file, its contents, a picture of Pillow's, or an array or tensor of uint8.
        folder: where to; made if it does not exist. Files of these names are replaced, all of them
            or none.

    Returns:
        The files.

    Raises:
        siglip_port.image_processing.ImageError: the picture cannot be read.
        ValueError: the model does not take such pictures, or what it computes is NaN or infinite.
        OSError: the folder cannot be written to.
        ModuleNotFoundError: matplotlib is not installed.
    """
    seen, embeddings = see(model, picture), model.transformer.embeddings
    pixels: dict[str, Any] = {
        name: part.to(embeddings.patch_embedding.weight.device)
        for name, part in seen.pixels.items()
        if isinstance(part, Tensor)
    }
    tokens = model(**pixels)  # [1, N, D]
    number = seen.grid[0] * seen.grid[1]  # what comes after these is padding
    if not tokens[0, :number].isfinite().all():
        raise ValueError(
            "the tower makes tokens of this picture that are NaN or infinite: see `siglip-port "
            "inspect`"
        )
    figures = {
        "patches.png": _patches(seen),
        "patch_embedding.png": _filters(embeddings.patch_embedding.weight),
        "position_embedding.png": _positions(embeddings.position_embedding.weight),
        "tokens_pca.png": _tokens(seen, tokens[0, :number]),
    }
    if model.pooling_head is not None:
        attention = model.pooling_attention(tokens, pixels.get("pixel_attention_mask"))  # [1, H, N]
        figures[POOLING] = _attention(seen, attention[0, :, :number])
    with staging_dir(Path(folder)) as place:
        for name, figure in figures.items():
            # Without the release of matplotlib, which would change the bytes.
            figure.savefig(place / name, format="png", dpi=150, metadata={"Software": None})
        commit_files([place / name for name in figures], Path(folder))
    return [Path(folder) / name for name in figures]


def _figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that keeps what is in it apart."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _height(grid: tuple[int, int]) -> float:
    """The height of a panel for a picture, over its width.

    That of the picture, unless it is a strip.
    """
    return min(max(grid[0] / grid[1], 0.15), 2.5)


def _show(axes: Axes, rgb: Tensor, title: str) -> None:
    axes.imshow(rgb.numpy(), interpolation="nearest")
    axes.set_title(title)
    axes.axis("off")


def _over(axes: Axes, seen: Seen, values: Tensor, title: str, most: float = 1.0) -> Any:  # noqa: ANN401 (matplotlib's)
    """Lays values of the patches, [h, w] from 0 to the most, or colours [h, w, 3], over the picture in grey."""
    _show(axes, seen.rgb.mean(-1, keepdim=True).expand(-1, -1, 3), title)
    height, width = seen.rgb.shape[:2]
    return axes.imshow(
        values.numpy(),
        cmap="inferno",
        vmin=0,
        vmax=most,
        alpha=_LAID_OVER,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        interpolation="nearest",
    )


def _patches(seen: Seen) -> Figure:
    (rows, columns), (height, width) = seen.grid, seen.rgb.shape[:2]
    figure = _figure(6, 6 * _height(seen.grid) + 0.4)
    axes = figure.subplots()
    size = height // rows
    _show(
        axes, seen.rgb, f"{height} x {width} pixels: {rows} x {columns} patches of {size} x {size}"
    )
    for colour, line in (("black", 1.2), ("white", 0.5)):  # to be seen on dark and on bright
        axes.hlines(
            [size * n - 0.5 for n in range(rows + 1)], -0.5, width - 0.5, colour, linewidth=line
        )
        axes.vlines(
            [size * n - 0.5 for n in range(columns + 1)], -0.5, height - 0.5, colour, linewidth=line
        )
    return figure


def _filters(weight: Tensor) -> Figure:
    """Of the filters of the patch embedding, [D, 3, P, P]."""
    along, directions = components(weight.flatten(1))
    shares = along.square().sum(0) / along.square().sum().clamp(min=_TINY)
    shown = directions[: _FILTERS[0] * _FILTERS[1]]
    tiles = shown.unflatten(1, weight.shape[1:]).movedim(1, -1)  # [K, P, P, 3]
    tiles = 0.5 + 0.5 * tiles / tiles.abs().amax((1, 2, 3), keepdim=True)
    figure = _figure(7, 4.6)
    _show(
        figure.subplots(),
        mosaic(tiles, _FILTERS[1], empty=1.0),
        f"The first {len(shown)} principal components of the {len(weight)} filters:\n"
        f"{shares[: len(shown)].sum():.0%} of their variance. Each in its own scale, grey is 0",
    )
    return figure


def _positions(table: Tensor) -> Figure:
    """Of the learned positions, [N, D], of a square grid."""
    side = round(len(table) ** 0.5)
    chosen = spread(side, _POSITIONS)
    tiles = (
        similarities(table)
        .unflatten(0, (side, side))
        .unflatten(2, (side, side))[chosen][:, chosen]
        .flatten(0, 1)
    )
    figure = _figure(7, 6.4)
    axes = figure.subplots()
    drawn = axes.imshow(
        mosaic(tiles, len(chosen), empty=torch.nan).numpy(), vmax=1, interpolation="nearest"
    )
    centres = [number * (side + 1) + (side - 1) / 2 for number in range(len(chosen))]
    axes.set_xticks(centres, [str(n) for n in chosen])
    axes.set_yticks(centres, [str(n) for n in chosen])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel("column of the position")
    axes.set_ylabel("row of the position")
    axes.set_title(f"Position embeddings, {side} x {side}: cosine of one with all others")
    figure.colorbar(drawn, ax=axes, label="cosine", shrink=0.8)
    return figure


def _tokens(seen: Seen, tokens: Tensor) -> Figure:
    """Of the tokens, [h * w, D]."""
    centred = tokens.detach().cpu().double()
    along = principal(centred)
    total = (centred - centred.mean(0)).square().sum().clamp(min=_TINY)
    shares = ", ".join(f"{share:.0%}" for share in along.square().sum(0) / total)
    figure = _figure(12, 4 * _height(seen.grid) + 0.8)
    figure.suptitle(
        f"First three principal components of the tokens as red, green, blue: {shares} of the "
        "variance"
    )
    painted = colours(along).unflatten(0, seen.grid)
    picture, both, alone = figure.subplots(1, 3)
    _show(picture, seen.rgb, "the picture")
    _over(both, seen, painted, "laid over it")
    _show(alone, painted, "the components")
    return figure


def _attention(seen: Seen, attention: Tensor) -> Figure:
    """Of the probe's attention, [H, h * w]."""
    # In even shares, and never finer than twice one: else what is even would look like what is
    # sharp.
    maps = (attention.detach().cpu().double() * attention.shape[1]).unflatten(1, seen.grid)
    columns, shape = min(len(maps), 4), _height(seen.grid)
    rows = -(-len(maps) // columns)
    figure = _figure(5.5 + 2 * columns, max(rows * (2 * shape + 0.3), 5 * shape + 1) + 0.6)
    figure.suptitle("The attention of the pooling head's probe; 1 is an even share for each patch")
    halves: Any = figure.subfigures(1, 2, width_ratios=(5, 2 * columns))
    (left, right), mean = halves, maps.mean(0)
    axes = left.subplots()
    drawn = _over(axes, seen, mean, f"mean of {len(maps)} heads", max(2.0, float(mean.max())))
    # Beneath a tall picture, its numbers would be cut off.
    left.colorbar(drawn, ax=axes, shrink=0.7, location="bottom" if shape <= 1 else "right")
    panels = right.subplots(rows, columns, squeeze=False).flatten()
    for number, (axes, values) in enumerate(zip(panels, maps, strict=False)):
        most = max(2.0, float(values.max()))
        _over(axes, seen, values, f"head {number}: 0 to {most:.3g}", most)
        axes.title.set_fontsize("small")
    for axes in panels[len(maps) :]:
        axes.axis("off")
    return figure

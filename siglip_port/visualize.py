"""Plots of what a model has learned, and of what it makes of an image.

Drawn with matplotlib, which is an extra. Its global state is left alone: figures are made without
pyplot, and drawn by Agg, which needs no screen. Sources of the kinds of plots: Dosovitskiy et al.
2020, arXiv 2010.11929, figure 7 (filters, positions); Oquab et al. 2023, arXiv 2304.07193,
figure 1 (tokens).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 (the name the field uses)
from torch import Tensor

from siglip_port.atomic import commit_files, staging_dir
from siglip_port.extras import require
from siglip_port.image_processing import ImageInput, ImageProcessor, Pixels, move_pixels
from siglip_port.model import SigLipVisionModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

POOLING_PLOT = "pooling_attention.png"
"""The plot that only models with an attention pooling head have."""

FILTER_ROWS = 4
FILTER_COLUMNS = 7
"""Principal components of the filters that are shown, downwards and across."""

MAX_POSITIONS = 7
"""Of positions downwards and across whose similarities are shown."""

OVERLAY_OPACITY = 0.65
TINY = 1e-300  # instead of 0 in a denominator


@dataclass(frozen=True)
class ModelView:
    """An image as a model sees it.

    Attributes:
        pixels: the batch of one that the model takes.
        rgb: the same for people, [h * P, w * P, 3], 0 to 1: the pixels that lie in whole patches.
        grid: patches downwards and across, (h, w).
    """

    pixels: Pixels
    rgb: Tensor
    grid: tuple[int, int]

    @property
    def panel_height(self) -> float:
        """The height of a panel over its width: that of the image, unless it is a strip."""
        rows, columns = self.grid
        return min(max(rows / columns, 0.15), 2.5)


def model_view(model: SigLipVisionModel, image: ImageInput) -> ModelView:
    """Prepare an image as the model's `preprocessor_config` says, and undo its normalization.

    Args:
        model: of fixed size, or NaFlex.
        image: a file, its contents, an image of Pillow's, or an array or tensor of uint8.

    Raises:
        siglip_port.image_processing.ImageError: the image cannot be read, or holds no patch.
        ValueError: `preprocessor_config` cannot be followed.
    """
    processor = ImageProcessor.from_config(model.preprocessor_config)
    patch_size = model.config.patch_size
    values = processor.one(image)  # [3, H, W]
    pixels = processor.batch([values])
    rows = values.shape[1] // patch_size
    columns = values.shape[2] // patch_size
    rgb = values[:, : rows * patch_size, : columns * patch_size].movedim(0, -1).double()
    if processor.mean is not None and processor.std is not None:
        rgb = rgb * torch.tensor(processor.std).double() + torch.tensor(processor.mean).double()
    rgb = rgb / (255 * processor.factor)
    return ModelView(pixels, rgb.clamp(0, 1), (rows, columns))


# --- what is computed -----------------------------------------------------------------------------


def principal_components(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Principal components of rows about their mean, in float64.

    Those of the largest variance come first. A direction is given the sign that makes its largest
    number positive. Those that rounding alone tells from nothing are left out.

    Args:
        rows: [N, D], all finite.

    Returns:
        How far the rows lie along the components, [N, K]; and the components, of unit length, [K,
        D].
    """
    rows = rows.detach().cpu().double()
    bases, lengths, directions = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    significant = lengths > rows.norm() * max(rows.shape) * torch.finfo(rows.dtype).eps
    signs = directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()  # [K, 1]
    scores = bases * lengths * signs[:, 0]
    return scores[:, significant], (directions * signs)[significant]


def first_three_scores(tokens: Tensor) -> Tensor:
    """How far tokens lie along their first three principal components: [N, D] -> [N, 3], float64.

    Where there are fewer components, the last are zero.
    """
    scores = principal_components(tokens)[0][:, :3]
    return F.pad(scores, (0, 3 - scores.shape[1]))


def to_colors(values: Tensor) -> Tensor:
    """Spread each column over 0 to 1, from its first to its 99th percentile: [N, 3] -> [N, 3]."""
    low = torch.quantile(values, 0.01, dim=0)
    high = torch.quantile(values, 0.99, dim=0)
    return ((values - low) / (high - low).clamp(min=TINY)).clamp(0, 1)


def cosine_similarities(positions: Tensor) -> Tensor:
    """Cosine of each position embedding with each other one: [N, D] -> [N, N], float64."""
    unit = F.normalize(positions.detach().cpu().double(), dim=1)
    return unit @ unit.T


def evenly_spaced(side: int, max_count: int) -> list[int]:
    """At most so many of the numbers from 0 to side - 1, from the first to the last."""
    numbers = torch.linspace(0, side - 1, min(side, max_count), dtype=torch.float64)
    return [round(number) for number in numbers.tolist()]


def mosaic(tiles: Tensor, columns: int, empty: float) -> Tensor:
    """Lay tiles out row by row, with one pixel between them.

    Args:
        tiles: [K, h, w] or [K, h, w, 3].
        columns: how many stand beside each other.
        empty: what is put between them and where the last row has none.

    Returns:
        [rows * (h + 1) - 1, columns * (w + 1) - 1], or with the 3.
    """
    height, width = tiles.shape[1:3]
    rows = max(-(-len(tiles) // columns), 1)
    size = (rows * (height + 1) - 1, columns * (width + 1) - 1)
    canvas = tiles.new_full((*size, *tiles.shape[3:]), empty)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        top = row * (height + 1)
        left = column * (width + 1)
        canvas[top : top + height, left : left + width] = tile
    return canvas


# --- the plots ------------------------------------------------------------------------------------


@torch.inference_mode()
def draw(model: SigLipVisionModel, image: ImageInput, folder: str | os.PathLike[str]) -> list[Path]:
    """Draw what a model has learned, and what it makes of an image.

    The files are `patches.png`, `patch_embedding.png`, `position_embedding.png`, `tokens_pca.png`,
    and, if the model has an attention pooling head, `pooling_attention.png`. The same model and
    image give the same bytes.

    Args:
        model: of fixed size or NaFlex, in `eval()` mode.
        image: a file, its contents, an image of Pillow's, or an array or tensor of uint8.
        folder: where to; made if it does not exist. Files of these names are replaced, all of them
            or none.

    Returns:
        The files.

    Raises:
        siglip_port.image_processing.ImageError: the image cannot be read.
        ValueError: the model does not take such images, or what it computes is NaN or infinite.
        OSError: the folder cannot be written to.
        siglip_port.extras.MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib")
    folder = Path(folder)
    view = model_view(model, image)
    figures = draw_figures(model, view)
    with staging_dir(folder) as staging:
        files = []
        for name, figure in figures.items():
            files.append(staging / name)
            # Without the release of matplotlib, which would change the bytes.
            figure.savefig(staging / name, format="png", dpi=150, metadata={"Software": None})
        commit_files(files, folder)
    return [folder / name for name in figures]


def draw_figures(model: SigLipVisionModel, view: ModelView) -> dict[str, Figure]:
    """Draw the figures of `draw`, by the names of their files."""
    embeddings = model.transformer.embeddings
    pixels = move_pixels(view.pixels, model.device)
    tokens: Tensor = model(**pixels)  # [1, N, D]
    number = view.grid[0] * view.grid[1]  # what comes after these is padding
    image_tokens = tokens[0, :number]
    if not image_tokens.isfinite().all():
        raise ValueError(
            "the encoder makes tokens of this image that are NaN or infinite: see `siglip-port "
            "inspect`"
        )
    figures = {
        "patches.png": draw_patches(view),
        "patch_embedding.png": draw_filters(embeddings.patch_embedding.weight),
        "position_embedding.png": draw_positions(embeddings.position_embedding.weight),
        "tokens_pca.png": draw_tokens(view, image_tokens),
    }
    if model.pooling_head is not None:
        attention = model.pooling_attention(tokens, pixels.get("pixel_attention_mask"))  # [1, H, N]
        figures[POOLING_PLOT] = draw_attention(view, attention[0, :, :number])
    return figures


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure, in inches, that keeps what is in it apart."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def show_image(axes: Axes, rgb: Tensor, title: str) -> None:
    """Show an image, [h, w, 3]."""
    axes.imshow(rgb.numpy(), interpolation="nearest")
    axes.set_title(title)
    axes.axis("off")


def show_overlay(
    axes: Axes, view: ModelView, values: Tensor, title: str, maximum: float = 1.0
) -> AxesImage:
    """Lay values of the patches over the image in gray.

    Args:
        axes: where to.
        view: the image.
        values: [h, w] from 0 to the maximum, or colors [h, w, 3].
        title: of the axes.
        maximum: of the values.
    """
    show_image(axes, view.rgb.mean(-1, keepdim=True).expand(-1, -1, 3), title)
    height, width = view.rgb.shape[:2]
    return axes.imshow(
        values.numpy(),
        cmap="inferno",
        vmin=0,
        vmax=maximum,
        alpha=OVERLAY_OPACITY,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        interpolation="nearest",
    )


def draw_patches(view: ModelView) -> Figure:
    """Draw the image with the borders of its patches."""
    rows, columns = view.grid
    height, width = view.rgb.shape[:2]
    size = height // rows
    figure = new_figure(6, 6 * view.panel_height + 0.4)
    axes = figure.subplots()
    title = f"{height} x {width} pixels: {rows} x {columns} patches of {size} x {size}"
    show_image(axes, view.rgb, title)
    horizontal = [size * number - 0.5 for number in range(rows + 1)]
    vertical = [size * number - 0.5 for number in range(columns + 1)]
    for color, line in (("black", 1.2), ("white", 0.5)):  # to be seen on dark and on bright
        axes.hlines(horizontal, -0.5, width - 0.5, color, linewidth=line)
        axes.vlines(vertical, -0.5, height - 0.5, color, linewidth=line)
    return figure


def draw_filters(weight: Tensor) -> Figure:
    """Draw principal components of the filters of the patch embedding, [D, 3, P, P]."""
    scores, directions = principal_components(weight.flatten(1))
    shares = scores.square().sum(0) / scores.square().sum().clamp(min=TINY)
    directions = directions[: FILTER_ROWS * FILTER_COLUMNS]
    tiles = directions.unflatten(1, weight.shape[1:]).movedim(1, -1)  # [K, P, P, 3]
    tiles = 0.5 + 0.5 * tiles / tiles.abs().amax((1, 2, 3), keepdim=True)
    figure = new_figure(7, 4.6)
    title = (
        f"The first {len(directions)} principal components of the {len(weight)} filters:\n"
        f"{shares[: len(directions)].sum():.0%} of their variance. Each in its own scale, gray is 0"
    )
    show_image(figure.subplots(), mosaic(tiles, FILTER_COLUMNS, empty=1.0), title)
    return figure


def draw_positions(table: Tensor) -> Figure:
    """Draw the similarities of the learned positions, [N, D], of a square grid."""
    side = round(len(table) ** 0.5)
    chosen = evenly_spaced(side, MAX_POSITIONS)
    similarities = cosine_similarities(table).unflatten(0, (side, side)).unflatten(2, (side, side))
    tiles = similarities[chosen][:, chosen].flatten(0, 1)
    figure = new_figure(7, 6.4)
    axes = figure.subplots()
    picture = mosaic(tiles, len(chosen), empty=torch.nan)
    shown = axes.imshow(picture.numpy(), vmax=1, interpolation="nearest")
    centers = [number * (side + 1) + (side - 1) / 2 for number in range(len(chosen))]
    labels = [str(number) for number in chosen]
    axes.set_xticks(centers, labels)
    axes.set_yticks(centers, labels)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel("column of the position")
    axes.set_ylabel("row of the position")
    axes.set_title(f"Position embeddings, {side} x {side}: cosine of one with all others")
    figure.colorbar(shown, ax=axes, label="cosine", shrink=0.8)
    return figure


def draw_tokens(view: ModelView, tokens: Tensor) -> Figure:
    """Draw the principal components of the tokens, [h * w, D], as colors."""
    tokens = tokens.detach().cpu().double()
    scores = first_three_scores(tokens)
    total = (tokens - tokens.mean(0)).square().sum().clamp(min=TINY)
    shares = ", ".join(f"{share:.0%}" for share in scores.square().sum(0) / total)
    figure = new_figure(12, 4 * view.panel_height + 0.8)
    figure.suptitle(
        f"First three principal components of the tokens as red, green, blue: {shares} of the "
        "variance"
    )
    colors = to_colors(scores).unflatten(0, view.grid)
    image_axes, overlay_axes, color_axes = figure.subplots(1, 3)
    show_image(image_axes, view.rgb, "the image")
    show_overlay(overlay_axes, view, colors, "laid over it")
    show_image(color_axes, colors, "the components")
    return figure


def draw_attention(view: ModelView, attention: Tensor) -> Figure:
    """Draw the attention of the pooling head's probe, [H, h * w]."""
    # In even shares, and never finer than twice one: else what is even would look like what is
    # sharp.
    maps = (attention.detach().cpu().double() * attention.shape[1]).unflatten(1, view.grid)
    columns = min(len(maps), 4)
    rows = -(-len(maps) // columns)
    height = max(rows * (2 * view.panel_height + 0.3), 5 * view.panel_height + 1)
    figure = new_figure(5.5 + 2 * columns, height + 0.6)
    figure.suptitle("The attention of the pooling head's probe; 1 is an even share for each patch")
    mean_part, heads_part = figure.subfigures(1, 2, squeeze=False, width_ratios=(5, 2 * columns))[0]
    mean = maps.mean(0)
    axes = mean_part.subplots()
    maximum = max(2.0, float(mean.max()))
    shown = show_overlay(axes, view, mean, f"mean of {len(maps)} heads", maximum)
    # Beneath a tall image, its numbers would be cut off.
    location = "bottom" if view.panel_height <= 1 else "right"
    mean_part.colorbar(shown, ax=axes, shrink=0.7, location=location)
    panels = heads_part.subplots(rows, columns, squeeze=False).flatten()
    for number, (axes, values) in enumerate(zip(panels, maps, strict=False)):
        maximum = max(2.0, float(values.max()))
        title = f"head {number}: 0 to {maximum:.3g}"
        show_overlay(axes, view, values, title, maximum)
        axes.title.set_fontsize("small")
    for axes in panels[len(maps) :]:
        axes.axis("off")
    return figure
